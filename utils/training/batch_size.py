"""`--per_device_train_batch_size auto`: the largest micro-batches that the device holds."""

import logging
import math

import datasets
import numpy as np
import torch
from accelerate import Accelerator

from utils.config import TrainingConfig, UserError
from utils.data.batching import collate
from utils.data.prefetch import move_batch
from utils.training.step import compute_target_logits, compute_training_loss

logger = logging.getLogger(__name__)


def find_batch_size(
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: datasets.Dataset,
    lengths: np.ndarray,
    config: TrainingConfig,
) -> int:
    """Most examples of full length whose forward and backward pass fit on the device of every process, by bisection
    from the worst that the plan could ask for: the longest source with the longest target, as often as a step has
    examples for a process."""
    longest_source, longest_target = (int(index) for index in lengths.argmax(axis=0))
    example = {"input_ids": [data[longest_source]["input_ids"]], "labels": [data[longest_target]["labels"]]}
    # AdamW's two moments and the gradient of the micro-batches before are not there yet, but will be.
    to_come = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(3)]
    fits, too_many = 0, None
    size = math.ceil(min(config.total_train_batch_size, len(data)) / accelerator.num_processes)
    while size > fits:
        if fits_device(accelerator, model, {name: values * size for name, values in example.items()}):
            fits = size
        else:
            too_many = size
        size = fits if too_many is None else (fits + too_many) // 2
    del to_come
    fits = int(accelerator.gather(torch.tensor([fits], device=accelerator.device)).min())
    if fits == 0:
        source, target = lengths.max(axis=0)
        raise UserError(
            f"--per_device_train_batch_size auto: not even one example of {source} source and {target} target tokens "
            "fits into memory; try --gradient_checkpointing, --max_source_length or another strategy"
        )
    if accelerator.is_main_process:
        logger.info("per_device_train_batch_size auto: %d examples of full length fit", fits)
    return fits


def fits_device(accelerator: Accelerator, model: torch.nn.Module, examples: dict[str, list]) -> bool:
    """Whether these examples' gradient can be computed; it is thrown away."""
    unwrapped = accelerator.unwrap_model(model)
    try:
        batch = move_batch(collate(examples, unwrapped.config.pad_token_id), unwrapped, accelerator.device)
        with accelerator.no_sync(model):
            loss = compute_training_loss(compute_target_logits(accelerator, model, batch), batch["targets"])
            accelerator.backward(loss)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
