"""The plan of one optimizer step: which examples, cut into which micro-batches, for which process.

All of it is a pure function of the seed, the step and the lengths, so every process works out the same plan without a
word to the others, and the examples of a step are the same whatever the number of processes. The only place that does
arithmetic with ranks.
"""

import math
from collections.abc import Iterable, Iterator

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


def gradient_accumulation_steps(
    num_examples: int, total_train_batch_size: int, per_device_batch_size: int, world: int
) -> int:
    """Micro-batches that each of `world` processes computes for one step: the gradient accumulation steps."""
    return math.ceil(min(num_examples, total_train_batch_size) / (per_device_batch_size * world))


def select_examples(num_examples: int, total_train_batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the examples of a step, counted from 0; each epoch is a permutation of its own."""
    epoch, step_in_epoch = divmod(step, num_steps_per_epoch(num_examples, total_train_batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order[step_in_epoch * total_train_batch_size :][:total_train_batch_size]


def cut_micro_batches(lengths: np.ndarray, num_micro_batches: int, token_limit: np.ndarray) -> np.ndarray:
    """Ends of the contiguous pieces that compute the fewest tokens, padding included, by dynamic programming.

    best[m][end] = min over size of best[m - 1][end - size] + cost of the `size` examples before `end`. A piece costs
    its number of examples times its longest source plus its longest target.

    Args:
        lengths: (n, 2), source and target tokens, longest source first.
        token_limit: (2,), the most source and target tokens of a piece, padding included.

    Returns:
        (num_micro_batches,): where each piece ends. With n < num_micro_batches some pieces are empty.
    """
    n = len(lengths)
    source_lengths, target_lengths = lengths.T
    # Pieces much larger than the average gain nothing and only make the table wide.
    largest_size = min(n, 4 * math.ceil(n / num_micro_batches))
    smallest_size = 1 if n >= num_micro_batches else 0
    costs = np.full((n + 1, largest_size + 1), np.inf)
    costs[:, 0] = 0
    longest_target = np.zeros(n + 1, dtype=int)  # of the `size` examples from each start on
    for size in range(1, largest_size + 1):
        longest_target = np.maximum(longest_target[:-1], target_lengths[size - 1 :])
        num_tokens = size * np.stack([source_lengths[: n - size + 1], longest_target])
        fits = (num_tokens <= token_limit[:, None]).all(axis=0)
        costs[size:, size] = np.where(fits, num_tokens.sum(axis=0), np.inf)

    best = np.full(n + 1, np.inf)
    best[0] = 0
    sizes = []
    for _ in range(num_micro_batches):
        before = np.concatenate([np.full(largest_size, np.inf), best])
        totals = np.lib.stride_tricks.sliding_window_view(before, largest_size + 1)[:, ::-1] + costs
        sizes.append(totals[:, smallest_size:].argmin(axis=1) + smallest_size)
        best = np.take_along_axis(totals, sizes[-1][:, None], axis=1)[:, 0]
    ends = [n]
    for size in reversed(sizes[1:]):
        ends.append(ends[-1] - size[ends[-1]])
    return np.array(ends[::-1])


def plan_micro_batches(
    examples: np.ndarray, lengths: np.ndarray, num_turns: int, world: int, token_limit: np.ndarray
) -> list[list[np.ndarray]]:
    """`plan[rank][turn]`: the examples cut into exactly world x num_turns micro-batches, so that little is padding.

    Sorting and cutting inside the step changes no gradient, since the loss is normalised by the whole step's target
    tokens. The micro-batches of one turn cost about the same, so that no rank waits for another; the ranks take turns
    at the costliest. With fewer examples than micro-batches some are empty; they still take part in the collectives.

    Args:
        lengths: (num_examples in the set, 2), source and target tokens.
        token_limit: (2,), the most source and target tokens of a micro-batch, padding included.
    """
    source_lengths, target_lengths = lengths[examples].T
    longest_first = examples[np.lexsort((examples, -target_lengths, -source_lengths))]
    ends = cut_micro_batches(lengths[longest_first], world * num_turns, token_limit)
    micro_batches = np.split(longest_first, ends[:-1])
    costliest_first = sorted(micro_batches, key=lambda batch: -count_computed_tokens(lengths[batch]))
    turns = [costliest_first[start : start + world] for start in range(0, len(costliest_first), world)]
    return [[turn[(rank + number) % world] for number, turn in enumerate(turns)] for rank in range(world)]


def count_computed_tokens(lengths: np.ndarray) -> int:
    """Source and target tokens of a micro-batch of these (n, 2) lengths, padding included."""
    return len(lengths) * int(lengths.max(axis=0, initial=0).sum())


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
    num_turns = gradient_accumulation_steps(len(lengths), total_train_batch_size, per_device_train_batch_size, world)
    token_limit = per_device_train_batch_size * lengths.max(axis=0)
    for step in steps:
        examples = select_examples(len(lengths), total_train_batch_size, seed, step)
        yield from plan_micro_batches(examples, lengths, num_turns, world, token_limit)[rank]


def plan_pass(lengths: np.ndarray, per_device_batch_size: int, rank: int, world: int) -> Iterator[np.ndarray]:
    """The micro-batches of one rank in one pass over the whole set, for evaluation."""
    token_limit = per_device_batch_size * lengths.max(axis=0)
    longest_first = np.lexsort((-lengths[:, 1], -lengths[:, 0]))
    num_turns = 8  # planned together: enough to save most padding, and few enough to plan in no time
    size = num_turns * per_device_batch_size * world
    for start in range(0, len(longest_first), size):
        examples = longest_first[start : start + size]
        yield from plan_micro_batches(examples, lengths, num_turns, world, token_limit)[rank]


def collate(examples: dict[str, list], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Tensors of shape (examples, longest source) and (examples, longest target), padded on the right; `targets` are
    the real target tokens alone, and `target_positions` where they stand among the flattened labels.

    No examples give one row of nothing but padding: an empty micro-batch runs through the model with a loss of 0.
    """
    input_ids = [torch.tensor(ids) for ids in examples["input_ids"]] or [torch.tensor([pad_token_id])]
    labels = [torch.tensor(ids) for ids in examples["labels"]] or [torch.tensor([-100])]
    attention_mask = [torch.ones_like(ids) for ids in input_ids]
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    # Worked out here and not on the device, which would have to be waited for to know how many there are.
    target_positions = padded_labels.flatten().ne(-100).nonzero().squeeze(1)
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(attention_mask, batch_first=True),
        "labels": padded_labels,
        "target_positions": target_positions,
        "targets": padded_labels.flatten()[target_positions],
    }


def deal(items: list, rank: int, world: int) -> list:
    """This process's share of the items."""
    return items[rank::world]
