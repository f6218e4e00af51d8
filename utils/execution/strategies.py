"""The strategy that the launcher asks for, whole models (DDP) or models that DeepSpeed or FSDP2 shard, given the
script's own settings.

    DDP        whole weights, gradients and moments on each process
    ZeRO-1     moments are sharded
    ZeRO-2     and gradients
    ZeRO-3     and weights
    FSDP2      the same as ZeRO-3, by PyTorch itself
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from utils.config import TrainingConfig, UserError
from utils.launch.processes import asks_for, start_processes


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """The processes of a training. UserError where precision, tracker or strategy cannot be what was asked."""
    if config.mixed_precision == "bf16" and torch.cuda.is_available():
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("--mixed_precision bf16: this GPU has none; use --mixed_precision no")
    tracker = None if config.report_to == "none" else config.report_to
    if tracker and importlib.util.find_spec(tracker) is None:  # Accelerate would continue without it
        raise UserError(f"--report_to {tracker}: the package is not installed; pip install {tracker}")
    accelerator = start_processes(
        mixed_precision="no" if asks_for("DEEPSPEED") else config.mixed_precision,  # DeepSpeed has its own autocast
        log_with=tracker,
        project_dir=Path(config.output_dir) / "tracker",
    )
    strategy = accelerator.distributed_type.value
    if strategy not in ("NO", "DEEPSPEED", "FSDP") and not strategy.startswith("MULTI_"):
        raise UserError(f"the launcher's distributed_type is {strategy}: DDP, DeepSpeed and FSDP2 are supported")
    configure_strategy(accelerator, config)
    return accelerator


# DeepSpeed's own are for models of many billions of parameters: 2 GB of fp32 a bucket, and 4 GB of weights that ZeRO-3
# keeps whole. In numbers of parameters.
BUCKETS = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"), 20_000_000)
BUCKETS |= dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), 50_000_000)


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_sharded(accelerator: Accelerator) -> bool:
    return is_deepspeed(accelerator) or accelerator.distributed_type == DistributedType.FSDP


def name_strategy(accelerator: Accelerator) -> str:
    if is_deepspeed(accelerator):
        return f"DEEPSPEED_ZERO{accelerator.state.deepspeed_plugin.zero_stage}"
    return accelerator.distributed_type.value


def configure_strategy(accelerator: Accelerator, config: TrainingConfig):
    """Give the strategy the script's own settings. UserError where the launcher's contradict them."""
    if is_deepspeed(accelerator):
        configure_deepspeed(accelerator, config)
    elif accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError("the launcher's fsdp_version is 1: only 2 is supported")
        # Autocast over fp32 weights, as everywhere, and not weights and sums in bf16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if is_sharded(accelerator) and config.metric_for_best_model != "loss":
        raise UserError(
            f"--metric_for_best_model {config.metric_for_best_model} generates, which is not for DeepSpeed or "
            "FSDP2: use loss, or evaluate_rouge.py afterwards"
        )


def configure_deepspeed(accelerator: Accelerator, config: TrainingConfig):
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    check_zero_section(settings["zero_optimization"])
    for section in ("optimizer", "scheduler", "amp"):
        if section in settings:
            raise UserError(f"the DeepSpeed config has a section {section!r}; remove it: the script has its own")
    for section in ("fp16", "bf16"):
        if settings.get(section, {}).get("enabled") not in (None, False, "auto"):
            raise UserError(f"the DeepSpeed config enables {section}; remove it: precision is --mixed_precision")
    # DeepSpeed wants numbers of examples and only multiplies them: micro-batches are of unequal size. The loop says
    # itself which one is the last of an update.
    ours = {
        "gradient_clipping": (config.max_grad_norm, "--max_grad_norm"),
        "gradient_accumulation_steps": (1, "worked out from --total_train_batch_size"),
        "train_micro_batch_size_per_gpu": (1, "--per_device_train_batch_size"),
        "train_batch_size": (accelerator.num_processes, "--total_train_batch_size"),
    }
    for name, (value, setting) in ours.items():
        if settings.get(name, "auto") not in ("auto", value):
            raise UserError(f"the DeepSpeed config's {name} is {settings[name]}; remove it: it is {setting}")
        settings[name] = value
    if config.mixed_precision == "bf16":  # as everywhere: autocast over fp32 weights, sums of gradients in fp32
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    for name, value in BUCKETS.items():
        settings["zero_optimization"].setdefault(name, value)
    settings["zero_force_ds_cpu_optimizer"] = False  # the script's AdamW, also where its moments are offloaded


def check_zero_section(section: dict[str, Any]):
    """DeepSpeed checks it too, when the model is loaded and in many lines."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        zero_config = DeepSpeedZeroConfig(**{name: value for name, value in section.items() if value != "auto"})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(f"the DeepSpeed config's {name} is {first['input']!r}: {first['msg']}") from error
    if int(zero_config.stage) == 0:
        raise UserError("the launcher's zero_stage is 0, which shards nothing; take 1, 2 or 3, or no DeepSpeed")
