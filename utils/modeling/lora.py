"""What train_lora.py has and train_full.py has not: a frozen base, an adapter on it, and the two merged into one."""

import dataclasses
import importlib.util
import logging
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from utils.config import LoraTrainingConfig, UserError
from utils.execution.sharding import without_zero3
from utils.execution.strategies import is_sharded
from utils.files import make_folder, write_json
from utils.launch.hub import explain_hub_errors
from utils.launch.output_dir import MERGED_FROM, UNCHECKED, describe_merge, find_run_files
from utils.launch.times import timed
from utils.modeling.adapters import check_adapter, check_patterns
from utils.modeling.export import write_model
from utils.modeling.families import shift_targets
from utils.modeling.generation_config import read_settings, set_generation_config
from utils.modeling.loading import check_folder, load_model
from utils.prompting import find_prompt

logger = logging.getLogger(__name__)
NUM_COMPARED = 4  # training examples that the merged model must agree on
# Largest difference of two logits over the largest logit. Rounding gave 2e-7 to 1.5e-6, up to flan-t5-base's shape; a
# merge into a weight that two layers share 0.7.
LARGEST_DIFFERENCE = 1e-4


@timed("the model")
def load_frozen_base(accelerator: Accelerator, config: LoraTrainingConfig) -> PreTrainedModel:
    """The model that gets an adapter. It needs no small updates, so half the bytes of fp32 do, or an eighth."""
    name, attention = config.model_name_or_path, config.attn_implementation
    if config.load_in_4bit:
        check_4bit(accelerator, config)
    if config.load_in_4bit and not config.preflight:
        # As in QLoRA (Dettmers et al., 2023); what is no matrix of a linear layer stays in bf16.
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        return load_model(name, attention, torch.bfloat16, quantization_config=four_bits)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    return load_model(name, attention, dtype, without_weights=config.preflight)


def check_4bit(accelerator: Accelerator, config: LoraTrainingConfig):
    if is_sharded(accelerator):
        strategy = accelerator.distributed_type.value
        raise UserError(f"--load_in_4bit: {strategy} cannot shard 4-bit weights; leave it out")
    if config.assume_memory:
        return
    if accelerator.device.type != "cuda":
        raise UserError("--load_in_4bit needs a GPU, and there is none; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit: bitsandbytes is not installed; pip install -r requirements-4bit.txt")


def add_lora(model: PreTrainedModel, config: LoraTrainingConfig) -> PeftModel:
    """The model with its weights frozen and a trainable fp32 adapter beside each target module."""
    if (Path(config.model_name_or_path) / "adapter_config.json").is_file():
        raise UserError(
            f"--model_name_or_path {config.model_name_or_path}: holds an adapter, and a second one on it could not "
            "name its base: train on the first one's base, or on a full model"
        )
    if config.adapter_name_or_path:
        return load_trainable_adapter(model, config)
    targets = config.lora_target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"  # PEFT's word
    else:
        check_targets(model, targets)
    lora_config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, r=config.lora_r, lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout, target_modules=targets,
        use_rslora=config.use_rslora, use_dora=config.use_dora,
    )  # fmt: skip
    torch.manual_seed(config.seed)  # the adapter's first weights are random, and the same on each process
    try:
        return get_peft_model(model, lora_config)  # casts the adapter to fp32, also over a bf16 base
    except ValueError as error:
        raise UserError(f"--lora_target_modules {' '.join(config.lora_target_modules)}: {error}") from error


def check_targets(model: PreTrainedModel, targets: list[str]):
    """UserError if one of them is not the name of linear layers. PEFT asks only that one of them exists."""
    modules = dict(model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    for target in targets:
        found = {name for name in modules if f".{name}".endswith(f".{target}")}
        if not found or not found <= linear:
            names = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"--lora_target_modules {' '.join(targets)}: {model.config.model_type} has no linear layers named "
                f"{target!r}, but {', '.join(names)}"
            )


def use_settings_of_adapter(config: LoraTrainingConfig) -> LoraTrainingConfig:
    """The config with the settings of --adapter_name_or_path, if there is one, in place of its own."""
    path = config.adapter_name_or_path
    if path is None:
        return config
    check_folder(path, "adapter_name_or_path")
    prompt = config.prompt
    with explain_hub_errors("adapter_name_or_path", path, "model"):
        adapter = PeftConfig.from_pretrained(path)
        if (Path(path) / GENERATION_CONFIG_NAME).is_file():
            prompt = find_prompt(read_settings(path, f"--adapter_name_or_path {path}"))
    if not isinstance(adapter, LoraConfig):
        raise UserError(f"--adapter_name_or_path {path}: {adapter.peft_type.value} is not LoRA")
    if adapter.modules_to_save:
        names = ", ".join(adapter.modules_to_save)
        raise UserError(f"--adapter_name_or_path {path}: it also holds all of {names}, which is not trained here")
    targets = adapter.target_modules
    return dataclasses.replace(
        config, lora_r=adapter.r, lora_alpha=adapter.lora_alpha, lora_dropout=adapter.lora_dropout,
        lora_target_modules=[targets] if isinstance(targets, str) else sorted(targets),
        use_rslora=adapter.use_rslora, use_dora=adapter.use_dora, **prompt._asdict(),
    )  # fmt: skip


def load_trainable_adapter(model: PreTrainedModel, config: LoraTrainingConfig) -> PeftModel:
    path = config.adapter_name_or_path
    with explain_hub_errors("adapter_name_or_path", path, "model"):
        check_patterns(PeftConfig.from_pretrained(path), model, f"--adapter_name_or_path {path}")
        adapted = PeftModel.from_pretrained(model, path, is_trainable=True)
    check_adapter(adapted, Path(path) / "adapter_model.safetensors", "adapter_name_or_path")
    # It may have been moved since; what is exported names the one that it was trained on last.
    adapted.peft_config["default"].base_model_name_or_path = model.name_or_path
    return adapted


@timed("merge")
def merge_adapter(
    accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, data: datasets.Dataset, config: LoraTrainingConfig
):
    """Write the base and the adapter that output_dir holds as one full model in fp32 into --merge_into,
    atomically. Both are loaded anew: the trained base may be rounded to fewer bits, or sharded.

    UserError if the merged model does not answer as the two do, by more than rounding.
    """
    if accelerator.is_main_process:
        with without_zero3(accelerator):
            base = load_model(config.model_name_or_path, config.attn_implementation, torch.float32)
            set_generation_config(base, config)
            model = PeftModel.from_pretrained(base, config.output_dir).eval()
            before = compute_logits(model, data)
            model = model.merge_and_unload()
            difference = float((compute_logits(model, data) - before).abs().max() / before.abs().max())
            if not difference <= LARGEST_DIFFERENCE:  # `not` also refuses nan
                raise UserError(
                    f"--merge_into {config.merge_into}: nothing written: the merged model's logits differ from those "
                    f"of base and adapter by {difference:.1e} of the largest; {config.output_dir} holds the adapter"
                )
            folder = Path(config.merge_into)
            held = [path for path in find_run_files(folder) if path.name not in (UNCHECKED, MERGED_FROM)]
            make_folder(folder)
            write_json(folder / MERGED_FROM, describe_merge(config))  # first: the rest is this run's from now on
            write_model(accelerator, model, tokenizer, model.state_dict(), folder, "merge_into", obsolete=held)
        logger.info("merged base and adapter: logits differ by %.1e of the largest", difference)
    accelerator.wait_for_everyone()


@torch.no_grad()
def compute_logits(model: torch.nn.Module, data: datasets.Dataset) -> torch.Tensor:
    """(target tokens, vocabulary), of the first NUM_COMPARED examples."""
    logits = []
    for example in data.select(range(min(NUM_COMPARED, len(data)))):
        decoder_input_ids = shift_targets(model, torch.tensor([example["labels"]]))
        logits.append(
            model(input_ids=torch.tensor([example["input_ids"]]), decoder_input_ids=decoder_input_ids).logits[0]
        )
    return torch.cat(logits)
