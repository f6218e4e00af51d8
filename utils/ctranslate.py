"""Generation with CTranslate2, which is optional: requirements-ctranslate2.txt. A model is converted once, in fp32."""

import ctypes
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.config import EvaluationConfig, UserError
from utils.decoding import ENCODER_TOKENS

MODEL_TYPES = ("t5", "mt5", "umt5")  # its converter does not know transformers 5's BART


def check_ctranslate2(accelerator: Accelerator, config: EvaluationConfig):
    """UserError where the package is missing, or the device has no such precision."""
    if importlib.util.find_spec("ctranslate2") is None:
        advice = "pip install -r requirements-ctranslate2.txt"
        raise UserError(f"--generation_backend ctranslate2: the package is not installed; {advice}")
    import ctranslate2

    device = accelerator.device.type
    if device not in ("cpu", "cuda"):
        raise UserError(f"--generation_backend ctranslate2: runs on cpu and cuda, not on {device}")
    if device == "cuda":
        try:
            ctypes.CDLL("libcublas.so.12")
        except OSError as error:
            advice = "pip install nvidia-cublas-cu12 and add its folder to LD_LIBRARY_PATH, or use transformers"
            raise UserError(f"--generation_backend ctranslate2: {error}; {advice}") from error
    supported = ctranslate2.get_supported_compute_types(device, accelerator.device.index or 0)
    if config.ctranslate2_compute_type not in supported:
        ours = [name for name in ("float32", "bfloat16", "float16", "int8") if name in supported]
        raise UserError(
            f"--ctranslate2_compute_type {config.ctranslate2_compute_type}: this device has only {', '.join(ours)}"
        )


def load_translator(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name_or_path: str,
    content: str,
    config: EvaluationConfig,
) -> Any:
    """A ctranslate2.Translator of the model, converted unless one of the same `content`, a hash, is there already."""
    import ctranslate2
    from ctranslate2.converters.transformers import _MODEL_LOADERS

    if model.config.model_type not in MODEL_TYPES:
        kind = f"{name_or_path}, a {model.config.model_type} model, only {', '.join(MODEL_TYPES)}"
        raise UserError(f"--generation_backend ctranslate2: does not convert {kind}; use transformers")
    # Beside the model; or in the hub's cache, for a model from there and for a folder that cannot be written to.
    is_own_folder = Path(name_or_path).is_dir() and os.access(name_or_path, os.W_OK)
    parent = (Path(name_or_path) if is_own_folder else Path(HF_HUB_CACHE)) / "ctranslate2"
    folder = parent / content[:16]
    with accelerator.main_process_first():
        if not folder.is_dir():
            # Not by its own converter, which reads a model from disk: ours is in memory, with its adapter merged and
            # a config that tells whether the head is tied, which transformers 5 forgets when it reads one.
            with torch.no_grad():
                write_spec(_MODEL_LOADERS[type(model.config).__name__](model, tokenizer), folder)
    device = accelerator.device
    return ctranslate2.Translator(
        str(folder),
        device=device.type,
        device_index=device.index or 0,
        compute_type=config.ctranslate2_compute_type,
        intra_threads=torch.get_num_threads(),
    )


def write_spec(spec: Any, folder: Path):
    """Write the converted model, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.part"))
    try:
        spec.validate()
        spec.optimize()
        spec.save(str(unfinished))
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def translate_batch(
    translator: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], config: EvaluationConfig
) -> list[tuple[list[int], bool]]:
    """The new tokens of each prompt, and whether they were cut at max_new_tokens."""
    results = translator.translate_batch(
        [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts],
        beam_size=config.num_beams,
        length_penalty=config.length_penalty,
        patience=2,  # at 1 the search ends with the first beams that do, where transformers looks for better ones
        max_input_length=0,  # no limit: they are cut already
        min_decoding_length=0,  # a text may be empty
        max_decoding_length=config.max_new_tokens,
        return_end_token=True,
        max_batch_size=ENCODER_TOKENS,
        batch_type="tokens",
    )
    decoded = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
    return [(ids, ids[-1:] != [tokenizer.eos_token_id]) for ids in decoded]
