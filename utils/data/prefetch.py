"""The plan's micro-batches on the device, collated ahead of time by a thread."""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from utils.config import TrainingConfig
from utils.data.batching import collate, plan_steps, round_up, select_examples
from utils.data.micro_batches import launch_cost_on
from utils.execution.passes import unwrap
from utils.modeling.families import shift_targets

NUM_BATCHES_AHEAD = 32


@dataclass
class Step:
    """The data of one optimizer update. Counts are over all processes; micro_batches and seconds_waited are this
    process's."""

    number: int  # from 1
    micro_batches: list[dict[str, torch.Tensor]]
    num_examples: int
    num_source_tokens: int
    num_target_tokens: int
    seconds_waited: float


def load_steps(
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: datasets.Dataset,
    lengths: np.ndarray,
    config: TrainingConfig,
    numbers: Sequence[int],
) -> Iterator[Step]:
    """Yield the data of the given steps, cut into micro-batches."""
    total, size = config.total_train_batch_size, config.per_device_train_batch_size
    rank, world = accelerator.process_index, accelerator.num_processes
    launch_cost = launch_cost_on(accelerator.device)
    multiple = config.length_multiple
    padded = round_up(lengths, multiple)
    plan = plan_steps(padded, total, size, config.seed, rank, world, launch_cost, (n - 1 for n in numbers))
    nums_micro_batches = deque()  # of the steps that are planned already

    def flatten() -> Iterator[np.ndarray]:
        for micro_batches in plan:
            nums_micro_batches.append(len(micro_batches))
            yield from micro_batches

    batches = load_batches(accelerator, model, data, flatten(), multiple)
    for number in numbers:
        started = time.perf_counter()
        examples = select_examples(len(lengths), total, config.seed, number - 1)
        num_source_tokens, num_target_tokens = (int(tokens) for tokens in lengths[examples].sum(axis=0))
        first = next(batches)  # a step has one at least
        micro_batches = [first, *itertools.islice(batches, nums_micro_batches.popleft() - 1)]
        waited = time.perf_counter() - started
        yield Step(number, micro_batches, len(examples), num_source_tokens, num_target_tokens, waited)


def load_batches(
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: datasets.Dataset,
    plan: Iterator[np.ndarray],
    multiple: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """The plan's micro-batches on the device, their lengths padded to a multiple. A thread plans and collates some
    ahead, so that the device need not wait for them."""
    model, data = unwrap(model), data.with_format("arrow")

    def make_batch() -> tuple[np.ndarray, dict[str, torch.Tensor]] | None:
        indices = next(plan, None)
        if indices is None:
            return None
        batch = collate(data[indices], model.config.pad_token_id, multiple)
        if accelerator.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return indices, batch

    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = deque(thread.submit(make_batch) for _ in range(NUM_BATCHES_AHEAD))
        while (made := ahead.popleft().result()) is not None:
            ahead.append(thread.submit(make_batch))
            indices, batch = made
            yield move_batch(batch, model, accelerator.device) | {"indices": indices}


def move_batch(
    batch: dict[str, torch.Tensor], model: PreTrainedModel, device: torch.device
) -> dict[str, torch.Tensor]:
    """A collated batch as the model takes it, on the device."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    if len(batch["targets"]):
        batch["decoder_input_ids"] = shift_targets(model, labels)
    else:  # an empty micro-batch, of whose labels some families cannot make anything
        batch["decoder_input_ids"] = torch.full_like(labels, model.config.decoder_start_token_id)
    return batch
