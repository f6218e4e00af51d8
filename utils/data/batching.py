"""The plan of a run: which examples each optimizer step takes, in which micro-batches, and their tensors.

A pure function of the seed, the step and the lengths: the examples of a step are the same whatever the number of
processes.
"""

from collections.abc import Iterable, Iterator

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from utils.data.micro_batches import plan_micro_batches


def measure_lengths(data: datasets.Dataset) -> np.ndarray:
    """(num_examples, 2): source and target tokens of each example."""
    tokens = data.with_format("arrow")[:]
    lengths = [pc.list_value_length(tokens[name]).to_numpy() for name in ("input_ids", "labels")]
    return np.stack(lengths, axis=1).astype(int)


def num_steps_per_epoch(num_examples: int, total_train_batch_size: int) -> int:
    """Whole steps in the set; the rest of the shuffled epoch is left out. A set smaller than one batch is one step."""
    return max(1, num_examples // total_train_batch_size)


def select_examples(num_examples: int, total_train_batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the examples of a step, counted from 0; each epoch is a permutation of its own."""
    epoch, step_in_epoch = divmod(step, num_steps_per_epoch(num_examples, total_train_batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order[step_in_epoch * total_train_batch_size :][:total_train_batch_size]


def plan_steps(
    lengths: np.ndarray,
    total_train_batch_size: int,
    per_device_train_batch_size: int,
    seed: int,
    rank: int,
    world: int,
    launch_cost: float,
    steps: Iterable[int],
) -> Iterator[list[np.ndarray]]:
    """The micro-batches of one rank, turn by turn, for each of `steps`."""
    token_limit = per_device_train_batch_size * lengths.max(axis=0)
    for step in steps:
        examples = select_examples(len(lengths), total_train_batch_size, seed, step)
        yield plan_micro_batches(examples, lengths, rank, world, token_limit, launch_cost)


def plan_pass(
    lengths: np.ndarray, per_device_batch_size: int, rank: int, world: int, launch_cost: float
) -> Iterator[np.ndarray]:
    """The micro-batches of one rank in one pass over the whole set, for evaluation."""
    token_limit = per_device_batch_size * lengths.max(axis=0)
    longest_first = np.lexsort((-lengths[:, 1], -lengths[:, 0]))
    # Some turns are planned together: enough to save most padding, and few enough to plan in no time.
    size = 8 * per_device_batch_size * world
    for start in range(0, len(longest_first), size):
        examples = longest_first[start : start + size]
        yield from plan_micro_batches(examples, lengths, rank, world, token_limit, launch_cost)


def round_up(lengths: np.ndarray, multiple: int) -> np.ndarray:
    return -(-lengths // multiple) * multiple


def collate(examples: pa.Table, pad_token_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Tensors of shape (examples, longest source) and (examples, longest target), padded on the right to a multiple;
    `targets` are the real target tokens alone, and `target_positions` where they stand among the flattened labels.

    No examples give one row of nothing but padding: an empty micro-batch runs through the model with a loss of 0.
    """
    if not len(examples):
        examples = pa.table({"input_ids": [[pad_token_id]], "labels": [[-100]]})
    input_ids, attention_mask = pad_lists(examples["input_ids"], pad_token_id, multiple)
    labels, _ = pad_lists(examples["labels"], -100, multiple)
    # Worked out here and not on the device, which would have to be waited for to know how many there are.
    target_positions = labels.flatten().ne(-100).nonzero().squeeze(1)
    return {
        "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels,
        "target_positions": target_positions, "targets": labels.flatten()[target_positions],
    }  # fmt: skip


def pad_lists(column: pa.ChunkedArray, padding: int, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, longest): a column of lists, padded, and its mask, 1 for real tokens and 0 for padding. Making a Python
    object per token would hold the GIL, which the training thread needs."""
    lists = column.combine_chunks()
    lengths = np.diff(lists.offsets)
    is_real = np.arange(round_up(lengths.max(), multiple)) < lengths[:, None]
    padded = np.full(is_real.shape, padding)
    padded[is_real] = lists.flatten()
    return torch.from_numpy(padded), torch.from_numpy(is_real.astype(int))
