"""`--per_device_train_batch_size auto`: on a GPU, as many examples of full length as its memory holds."""

import dataclasses
import logging
import math

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from utils.config import TrainingConfig, UserError
from utils.data.batching import collate, measure_lengths, round_up
from utils.data.prefetch import move_batch
from utils.execution.passes import accumulate, backward, unwrap
from utils.execution.sharding import whole_shape
from utils.execution.strategies import is_deepspeed, is_sharded
from utils.launch.times import timed
from utils.training.resources.assumed_gpu import estimated_device
from utils.training.resources.memory_estimate import MicroBatch, estimate_memory, find_offloaded
from utils.training.step import compute_target_logits, compute_training_losses

logger = logging.getLogger(__name__)
SIZE_ON_CPU = 16  # a CPU does not say what fits: the kernel kills a process that takes too much
USED_SHARE = 0.9  # of the memory; the rest is for what other kernels and fragmentation take


def choose_batch_size(
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: datasets.Dataset,
    config: TrainingConfig,
    remembered: int | None,
) -> TrainingConfig:
    """The config with a number in place of `auto`, the same on every process. Call it with a prepared model.

    Args:
        remembered: what the run that is resumed had, so that its steps are cut alike.
    """
    if config.per_device_train_batch_size != "auto":
        return config
    size = remembered or SIZE_ON_CPU
    if not remembered and accelerator.device.type == "cuda":
        size = find_batch_size(accelerator, model, data, config)
    return dataclasses.replace(config, per_device_train_batch_size=size)


@timed("batch size")
def find_batch_size(
    accelerator: Accelerator, model: torch.nn.Module, data: datasets.Dataset, config: TrainingConfig
) -> int:
    """How many of the longest source with the longest target fit into the memory of every process's GPU: extrapolated
    from the peak memory of one example's gradient and of two's, and then tried."""
    longest_source, longest_target = (int(index) for index in measure_lengths(data).argmax(axis=0))
    example = {"input_ids": [data[longest_source]["input_ids"]], "labels": [data[longest_target]["labels"]]}

    def measure(size: int) -> float:
        try:
            return measure_peak(accelerator, model, config, {name: ids * size for name, ids in example.items()})
        except torch.OutOfMemoryError:
            if is_sharded(accelerator):  # the others may be waiting for this process
                raise
            return math.inf

    measure(1)  # leaves what the next ones find in place: gradients, workspaces of the libraries
    memory = USED_SHARE * measure_memory(accelerator) - count_moments(accelerator, model)
    most = count_most(accelerator, config, len(data))
    fits = min(gather_object([count_fitting(measure(1), measure(2), memory, most)]))
    # A peak is the highest of several phases, which grow at different rates: the line is a lower bound.
    while fits > 2 and max(gather_object([measure(fits) > memory])):
        fits = fits * 3 // 4
    if not is_deepspeed(accelerator):
        model.zero_grad()
    torch.cuda.empty_cache()
    if fits == 0:
        raise UserError(
            f"--per_device_train_batch_size auto: not even one example of {len(example['input_ids'][0])} source and "
            f"{len(example['labels'][0])} target tokens fits into memory; try --gradient_checkpointing, "
            "--max_source_length or another strategy"
        )
    if accelerator.is_main_process:
        logger.info("per_device_train_batch_size auto: %d examples of full length", fits)
    return fits


def count_moments(accelerator: Accelerator, model: torch.nn.Module) -> int:
    """Bytes of AdamW's two moments on this process, which are made in the first update."""
    if is_deepspeed(accelerator):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if "optimizer" in find_offloaded(settings):
            return 0
    num_trained = sum(whole_shape(parameter).numel() for parameter in model.parameters() if parameter.requires_grad)
    return 2 * 4 * num_trained // (accelerator.num_processes if is_sharded(accelerator) else 1)


def estimate_batch_size(
    accelerator: Accelerator, model: torch.nn.Module, lengths: np.ndarray, config: TrainingConfig, free: int
) -> TrainingConfig:
    """Roughly what choose_batch_size will choose, for a model on the meta device and `free` bytes per process."""
    size = SIZE_ON_CPU
    if estimated_device(accelerator, config).type == "cuda":
        size = max(1, estimate_fitting(accelerator, model, lengths, config, free))
    return dataclasses.replace(config, per_device_train_batch_size=size)


def estimate_fitting(
    accelerator: Accelerator, model: torch.nn.Module, lengths: np.ndarray, config: TrainingConfig, free: int
) -> int:
    source, target = round_up(lengths.max(axis=0), config.length_multiple).tolist()

    def estimate(size: int) -> int:
        micro_batch = MicroBatch(size, source, target, size * source, size * target)
        return sum(estimate_memory(accelerator, model, config, micro_batch, None, accumulating=True)[0].values())

    one, memory = estimate(1), USED_SHARE * free
    fits = count_fitting(one, estimate(2), memory, count_most(accelerator, config, len(lengths)))
    # The highest of several phases, each linear in the number of examples: convex, so that a chord is above it.
    while fits > 1 and (needed := estimate(fits)) > memory:
        fits = 1 + int((memory - one) * (fits - 1) / (needed - one))
    return fits


def count_most(accelerator: Accelerator, config: TrainingConfig, num_examples: int) -> int:
    """Examples of an update for one process."""
    return math.ceil(min(config.total_train_batch_size, num_examples) / accelerator.num_processes)


def count_fitting(one: float, two: float, memory: float, most: int) -> int:
    """How many examples, at most `most`, fit into so many bytes, of which one example takes `one` and two `two`."""
    if memory < one:
        return 0
    return min(most, 1 + int((memory - one) / max(1, two - one)))  # inf: nothing more fits


def measure_peak(
    accelerator: Accelerator, model: torch.nn.Module, config: TrainingConfig, examples: dict[str, list]
) -> int:
    """Peak bytes of GPU memory while the gradient of 0 times the loss is accumulated: DeepSpeed cannot discard one."""
    unwrapped = unwrap(model)
    batch = collate(pa.table(examples), unwrapped.config.pad_token_id, config.length_multiple)
    batch = move_batch(batch, unwrapped, accelerator.device)
    torch.cuda.reset_peak_memory_stats(accelerator.device)
    model.train()
    with accumulate(accelerator, model, last=False):
        loss = compute_training_losses(compute_target_logits(accelerator, model, batch), batch["targets"], config)[0]
        backward(accelerator, model, 0 * loss)
    return torch.cuda.max_memory_allocated(accelerator.device)


def measure_memory(accelerator: Accelerator) -> int:
    """Bytes of the GPU's memory that this process has or can get."""
    return torch.cuda.mem_get_info(accelerator.device)[0] + torch.cuda.memory_reserved(accelerator.device)
