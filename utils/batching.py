"""The plan of one optimizer step: which examples, cut into which micro-batches, for which process.

All of it is a pure function of the seed, the step and the lengths, so every process works out the same plan without a
word to the others, and the examples of a step are the same whatever the number of processes. The only place that does
arithmetic with ranks.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence


def measure_lengths(data: datasets.Dataset) -> np.ndarray:
    """(num_examples, 2): source and target tokens of each example."""
    return np.array([[len(ids) for ids in data[name]] for name in ("input_ids", "labels")]).T


def num_steps_per_epoch(num_examples: int, total_train_batch_size: int) -> int:
    """Whole steps in the set; the rest of the shuffled epoch is left out. A set smaller than one batch is one step."""
    return max(1, num_examples // total_train_batch_size)


def num_micro_batches(num_examples: int, total_train_batch_size: int, per_device_batch_size: int, world: int) -> int:
    """Micro-batches that each of `world` processes computes for one step: the gradient accumulation steps."""
    return math.ceil(min(num_examples, total_train_batch_size) / (per_device_batch_size * world))


def select_examples(num_examples: int, total_train_batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the examples of a step, counted from 0; each epoch is a permutation of its own."""
    epoch, step_in_epoch = divmod(step, num_steps_per_epoch(num_examples, total_train_batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order[step_in_epoch * total_train_batch_size :][:total_train_batch_size]


def plan_micro_batches(
    examples: np.ndarray, lengths: np.ndarray, num_turns: int, world: int
) -> list[list[np.ndarray]]:
    """`plan[rank][turn]`: the examples cut into exactly world x num_turns micro-batches of similar length.

    Sorting inside the step spares most padding and changes no gradient, since the loss is normalised by the whole
    step's target tokens. The micro-batches of one turn are neighbours in length, so that no rank waits for another.
    With fewer examples than micro-batches some are empty; they still take their turn, for the collectives' sake.

    Args:
        lengths: (num_examples in the set, 2), source and target tokens.
    """
    source_lengths, target_lengths = lengths[examples].T
    longest_first = examples[np.lexsort((examples, -target_lengths, -source_lengths))]
    micro_batches = np.array_split(longest_first, world * num_turns)
    return [micro_batches[rank::world] for rank in range(world)]


def plan_steps(
    lengths: np.ndarray,
    total_train_batch_size: int,
    per_device_train_batch_size: int,
    seed: int,
    rank: int,
    world: int,
    steps: Iterable[int],
) -> Iterator[np.ndarray]:
    """The micro-batches of one rank, turn by turn, for each of `steps`."""
    num_turns = num_micro_batches(len(lengths), total_train_batch_size, per_device_train_batch_size, world)
    for step in steps:
        examples = select_examples(len(lengths), total_train_batch_size, seed, step)
        yield from plan_micro_batches(examples, lengths, num_turns, world)[rank]


def plan_pass(lengths: np.ndarray, per_device_batch_size: int, rank: int, world: int) -> Iterator[np.ndarray]:
    """The micro-batches of one rank in one pass over the whole set, for evaluation."""
    num_turns = math.ceil(len(lengths) / (per_device_batch_size * world))
    yield from plan_micro_batches(np.arange(len(lengths)), lengths, num_turns, world)[rank]


def collate(examples: dict[str, list], pad_token_id: int, shift_right: Callable) -> dict[str, torch.Tensor]:
    """Tensors of shape (examples, longest source) and (examples, longest target), padded on the right.

    No examples give one row of nothing but padding: an empty micro-batch runs through the model with a loss of 0.

    Args:
        shift_right: makes the decoder's input of the labels, as the model's own method does.
    """
    input_ids = [torch.tensor(ids) for ids in examples["input_ids"]] or [torch.tensor([pad_token_id])]
    labels = [torch.tensor(ids) for ids in examples["labels"]] or [torch.tensor([-100])]
    attention_mask = [torch.ones_like(ids) for ids in input_ids]
    # Cross-entropy skips -100, so padding has no part in the loss.
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(attention_mask, batch_first=True),
        "decoder_input_ids": shift_right(padded_labels),
        "labels": padded_labels,
    }


def deal(items: list, rank: int, world: int) -> list:
    """This process's share of the items."""
    return items[rank::world]
