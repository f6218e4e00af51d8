"""The plan of a run: which examples each optimizer step takes, in which micro-batches, and their tensors.

A pure function of the seed, the step and the lengths: the examples of a step are the same whatever the number of
processes.
"""

from collections.abc import Iterable, Iterator

import datasets
import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from utils.data.micro_batches import plan_micro_batches


def measure_lengths(data: datasets.Dataset) -> np.ndarray:
    """(num_examples, 2): source and target tokens of each example."""
    return np.array([[len(ids) for ids in data[name]] for name in ("input_ids", "labels")]).T


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


def collate(examples: dict[str, list], pad_token_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Tensors of shape (examples, longest source) and (examples, longest target), padded on the right to a multiple;
    `targets` are the real target tokens alone, and `target_positions` where they stand among the flattened labels.

    No examples give one row of nothing but padding: an empty micro-batch runs through the model with a loss of 0.
    """

    def join(sequences: list[torch.Tensor], padding: int) -> torch.Tensor:
        joined = pad_sequence(sequences, batch_first=True, padding_value=padding)
        return pad(joined, (0, -joined.shape[1] % multiple), value=padding)

    input_ids = [torch.tensor(ids) for ids in examples["input_ids"]] or [torch.tensor([pad_token_id])]
    labels = [torch.tensor(ids) for ids in examples["labels"]] or [torch.tensor([-100])]
    attention_mask = [torch.ones_like(ids) for ids in input_ids]
    padded_labels = join(labels, -100)
    # Worked out here and not on the device, which would have to be waited for to know how many there are.
    target_positions = padded_labels.flatten().ne(-100).nonzero().squeeze(1)
    return {
        "input_ids": join(input_ids, pad_token_id), "attention_mask": join(attention_mask, 0),
        "labels": padded_labels, "target_positions": target_positions,
        "targets": padded_labels.flatten()[target_positions],
    }  # fmt: skip
