"""What makes a run the one that it is: with anything else it would not go on from a checkpoint, but be another one."""

import dataclasses
import hashlib
from typing import Any

import torch

from utils.config import TrainingConfig
from utils.strategies import gather_tensor

# Settings that may change when a run goes on. With another value of any other it would be another run; a new setting
# counts as one of those until it is named here. Of model, data and length the fingerprints and counts tell.
FREE_SETTINGS = {
    "model_name_or_path", "dataset_name", "train_file", "validation_file", "test_file", "dialogue_column",
    "summary_column", "max_train_samples", "max_eval_samples", "num_train_epochs", "max_train_steps", "demo",
    "per_device_train_batch_size", "per_device_eval_batch_size", "attn_implementation", "gradient_checkpointing",
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "load_best_model_at_end", "merge_into",
    "logging_steps", "eval_steps", "checkpointing_steps", "checkpoints_total_limit",
    "max_time", "preflight", "report_to",
}  # fmt: skip


def describe_run(config: TrainingConfig, model: torch.nn.Module) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that goes on from it, beside its data and its number of steps."""
    return {**identity_settings(config), "model_fingerprint": fingerprint_model(model)}


def identity_settings(config: TrainingConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_SETTINGS}


def fingerprint_model(model: torch.nn.Module) -> str:
    """Of the weights that training starts from, without a LoRA adapter's: names, shapes and sums of their bits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter = gather_tensor(parameter)
            bits = parameter.contiguous().view(
                {1: torch.int8, 2: torch.int16, 4: torch.int32}[parameter.element_size()]
            )
            # In pieces, of which the sum makes a copy in 64 bits.
            total = sum(int(piece.sum(dtype=torch.int64)) for piece in bits.flatten().split(2**20))
            digest.update(f"{name} {tuple(parameter.shape)} {total}\n".encode())
    return digest.hexdigest()[:16]
