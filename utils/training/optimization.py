"""The optimizer, its schedule, and how many updates they are for."""

import math

import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import get_scheduler

from utils.config import TrainingConfig
from utils.data.batching import num_steps_per_epoch
from utils.execution.sharding import whole_shape


def num_train_steps(config: TrainingConfig, num_examples: int) -> int:
    """Optimizer updates of the run."""
    steps = config.num_train_epochs * num_steps_per_epoch(num_examples, config.total_train_batch_size)
    return config.max_train_steps or math.ceil(steps)


def build_optimizer(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable, with weight decay on matrices alone, not on the layer norms' scales."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trainable, "lr": config.learning_rate}]
    if ratio := getattr(config, "loraplus_lr_ratio", None):
        # Hayou et al., 2024. PEFT has a rate of its own for embeddings' adapters, and decays DoRA's vectors.
        lr = config.learning_rate
        groups = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_lr_embedding=lr
        ).param_groups
    split = []
    for group in groups:
        matrices = [p for p in group["params"] if len(whole_shape(p)) >= 2]
        vectors = [p for p in group["params"] if len(whole_shape(p)) < 2]
        split.append({"params": matrices, "lr": group["lr"], "weight_decay": config.weight_decay})
        split.append({"params": vectors, "lr": group["lr"], "weight_decay": 0.0})
    return torch.optim.AdamW([group for group in split if group["params"]], lr=config.learning_rate, fused=True)


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Stepped once per update. Not to be prepared: Accelerate would step it once per process."""
    num_warmup_steps = math.ceil(config.warmup_ratio * num_steps)
    return get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps, num_steps)
