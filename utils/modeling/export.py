"""Write what was trained atomically, and compare what anybody would load with it."""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from utils.config import UserError
from utils.execution.passes import unwrap
from utils.execution.sharding import gather_tensor, without_zero3
from utils.files import flush_to_disk, make_folder, move_files, raise_disk_errors, write_json
from utils.launch.output_dir import UNCHECKED, find_checkpoints
from utils.launch.times import timed
from utils.modeling.families import record_head

logger = logging.getLogger(__name__)
CONFIG_FILES = ("config.json", "adapter_config.json")


@timed("export")
def export_model(accelerator: Accelerator, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str):
    """Write the full model, or the adapter alone, and the tokenizer into `folder`; every process must call it."""
    model = unwrap(model)
    state_dict = gather_state_dict(accelerator, model)
    if accelerator.is_main_process:
        advice = "; when it can, export it with --resume_from_checkpoint latest" * bool(find_checkpoints(folder))
        write_model(accelerator, model, tokenizer, state_dict, Path(folder), "output_dir", advice)


def write_model(
    accelerator: Accelerator,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: dict[str, torch.Tensor],
    folder: Path,
    setting: str,
    advice: str = "",
    obsolete: Iterable[Path] = (),
):
    """Atomically: the files are first written beside, and what stock transformers reads from them is compared with
    `state_dict`; only when they are in place and on the disk, what is `obsolete` goes. For one process alone."""
    if not isinstance(model, PeftModel):
        record_head(model)
    unchecked = folder / UNCHECKED
    if unchecked.is_symlink():  # what it leads to is not ours
        unchecked.unlink()
    shutil.rmtree(unchecked, ignore_errors=True)
    try:
        make_folder(folder)
        with raise_disk_errors(unchecked):
            model.save_pretrained(unchecked, state_dict=state_dict)
            if isinstance(model, PeftModel):
                model.generation_config.save_pretrained(unchecked)
                rename_magnitudes(unchecked / "adapter_model.safetensors")
                sort_targets(unchecked / "adapter_config.json")
            save_tokenizer(tokenizer, unchecked)
        for path in unchecked.glob("*.safetensors"):
            shutil.copymode(unchecked / "tokenizer_config.json", path)  # safetensors lets nobody else read them
    except OSError as error:
        shutil.rmtree(unchecked, ignore_errors=True)
        raise UserError(f"--{setting} {folder}: the model could not be written: {error.strerror}{advice}") from error
    (unchecked / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    with without_zero3(accelerator):
        compare_with_folder(state_dict, unchecked)
    written = {path.name for path in unchecked.iterdir()}
    # The config last, and an old one first of all: a folder without it does not pass for a finished model.
    for path in obsolete:
        if path.name in CONFIG_FILES:
            path.unlink()
            flush_to_disk(folder)
    move_files(unchecked, folder, last=CONFIG_FILES)
    for path in obsolete:
        if path.name not in (*written, *CONFIG_FILES):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    logger.info("saved %s and verified it by reading it back", folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path):
    """In words that transformers 4 reads as well: it knows no TokenizersBackend, T5's tokens by their old name, and
    gives a tokenizer without a class of its own token types, which generate() refuses, unless it is told not to."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.setdefault("model_input_names", tokenizer.model_input_names)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path, config)


def rename_magnitudes(path: Path):
    """Give DoRA's vectors in an adapter's file the names that PEFT and all versions of transformers read. By those
    that PEFT writes, without `.weight`, transformers 5.23 does not find them, and takes the base's instead."""
    tensors = load_file(path)
    if any(name.endswith("lora_magnitude_vector") for name in tensors):
        renamed = {re.sub("lora_magnitude_vector$", r"\g<0>.weight", name): tensors[name] for name in tensors}
        save_file(renamed, path, metadata={"format": "pt"})


def sort_targets(path: Path):
    """Sort target_modules: PEFT writes a set, whose order differs from process to process."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    write_json(path, config)


def gather_state_dict(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole of what is exported on the main process, a LoRA adapter or all weights; every process must call it.
    Tensors that are one stay one."""
    gathered, state_dict = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(model, PeftModel) and ".lora_" not in name:
            continue
        if id(tensor) not in gathered:
            whole = gather_tensor(tensor)
            gathered[id(tensor)] = whole.cpu() if accelerator.is_main_process else None
        state_dict[name] = gathered[id(tensor)]
    return state_dict


def compare_with_folder(state_dict: dict[str, torch.Tensor], folder: Path):
    """RuntimeError unless stock transformers reads from `folder` the very tensors of `state_dict`: what it makes of
    their names is seen in a model without weights, and the values in the files, one at a time, so that no second
    model is in memory."""
    model, report = AutoModelForSeq2SeqLM.from_pretrained(
        folder, device_map="meta", output_loading_info=True, trust_remote_code=False
    )
    loaded = {shorten(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    differing = [name for names in report.values() for name in names]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in folder.glob("*.safetensors")]
        # By the tensor that it becomes: of tied weights, which are one, only one is stored.
        stored = {id(loaded.get(shorten(name), name)): (file, name) for file in files for name in file.keys()}
        if len(stored) != sum(len(file.keys()) for file in files):
            differing.append("one of two tensors that were not tied")
        if all(shorten(name) in loaded for _, name in stored.values()):

            def read(name: str) -> torch.Tensor | None:
                file, stored_name = stored.get(id(loaded.get(name)), (None, None))
                return file and file.get_tensor(stored_name)

        else:  # T5Gemma 2's are stored under other names: which is which shows only once they are loaded
            whole = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=False)
            read = {shorten(name): tensor for name, tensor in whole.state_dict().items()}.get
        for name, tensor in state_dict.items():
            value = read(shorten(name))
            if value is None or value.dtype != tensor.dtype or not have_same_bits(value, tensor):
                differing.append(name)
    if differing:
        raise RuntimeError(f"{folder} does not load as it was trained: {differing[0]} differs")


def have_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Unlike Tensor.equal, for which nan is not nan."""
    a, b = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (a, b))
    return a.equal(b)


def shorten(name: str) -> str:
    """A weight's name without what PEFT puts around it: the same in the trained model, the file and a loaded one."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")
