"""The examples of one step, cut into micro-batches and dealt to the processes.

The only place that does arithmetic with ranks. A pure function of the examples' lengths: every process works out the
same plan without a word to the others.
"""

import math

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

MOST_EXAMPLES_PLANNED_TOGETHER = 1024
# What a micro-batch costs beside its tokens, in units of micro_batch_cost. An H200 waited 0.12 s a micro-batch for its
# launches, time enough to compute 16,384 tokens. A CPU adds up gradients: fully training 22.7 M parameters, 256 was
# faster than 64 and 1,024. Other devices are taken for GPUs.
LAUNCH_COSTS = {"cpu": 256, "cuda": 16_384}


def launch_cost_on(device: torch.device) -> int:
    return LAUNCH_COSTS.get(device.type, LAUNCH_COSTS["cuda"])


def plan_micro_batches(
    examples: np.ndarray, lengths: np.ndarray, rank: int, world: int, token_limit: np.ndarray, launch_cost: float
) -> list[np.ndarray]:
    """The micro-batches of one rank, turn by turn; all ranks have as many turns.

    Sorting and cutting inside the step changes no gradient, since the loss is normalised by the whole step's target
    tokens. With fewer examples than micro-batches some are empty; they still take part in the collectives.

    Args:
        lengths: (num_examples in the set, 2), source and target tokens.
        token_limit: (2,), the most source and target tokens of a micro-batch, padding included. With those of N
            examples of full length it takes no more memory than they do: attention's squares are smaller, too.
        launch_cost: of a micro-batch, see LAUNCH_COSTS.
    """
    plans, group = plan_group(examples, lengths, rank, world, token_limit, launch_cost)
    return plans[rank - group[0]]


def plan_group(
    examples: np.ndarray, lengths: np.ndarray, rank: int, world: int, token_limit: np.ndarray, launch_cost: float
) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """plan_micro_batches of all ranks that share their examples with `rank`; and these ranks, in order."""
    shares = divide(examples, lengths, world)
    num_turns = max(
        math.ceil(choose_num_pieces(lengths[share], token_limit, launch_cost) / len(ranks)) for share, ranks in shares
    )
    share, group = next((share, ranks) for share, ranks in shares if rank in ranks)
    return cut_and_deal(share, lengths, num_turns, len(group), token_limit), group


def divide(examples: np.ndarray, lengths: np.ndarray, world: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The examples, longest first, and the ranks that compute them. The dynamic programming's time grows with the
    square of the examples: large steps are dealt to groups of ranks, each of which plans its share of long and short
    ones by itself."""
    source_lengths, target_lengths = lengths[examples].T
    longest_first = examples[np.lexsort((examples, -target_lengths, -source_lengths))]
    num_groups = min(world, math.ceil(len(examples) / MOST_EXAMPLES_PLANNED_TOGETHER))
    groups = np.array_split(np.arange(world), num_groups)
    return [(longest_first[np.isin(np.arange(len(examples)) % world, group)], group) for group in groups]


def choose_num_pieces(lengths: np.ndarray, token_limit: np.ndarray, launch_cost: float) -> int:
    """Pieces of the contiguous cut that costs least in all when each piece costs `launch_cost` more: the more that is,
    the fewer and larger they are."""
    n = len(lengths)
    costs = compute_piece_costs(lengths, np.arange(n, 0, -1), token_limit)
    best, num_pieces = np.zeros(n + 1), np.zeros(n + 1, dtype=int)
    for end in range(1, n + 1):
        totals = best[:end] + costs[end, n - end :]  # by where the last piece starts
        start = totals.argmin()
        best[end], num_pieces[end] = totals[start] + launch_cost, num_pieces[start] + 1
    return int(num_pieces[n])


def pack(lengths: np.ndarray, token_limit: np.ndarray) -> list[int]:
    """Sizes of the fewest contiguous pieces that keep to the limit: each takes as many examples as it can, which is
    the best, since any part of a piece that fits does too."""
    most_source, most_target = token_limit.tolist()
    sizes, size, longest_source, longest_target = [], 0, 0, 0
    for source, target in lengths.tolist():
        longest_source, longest_target = max(longest_source, source), max(longest_target, target)
        if size and ((size + 1) * longest_source > most_source or (size + 1) * longest_target > most_target):
            sizes.append(size)
            size, longest_source, longest_target = 0, source, target
        size += 1
    return [*sizes, size]


def compute_piece_costs(lengths: np.ndarray, sizes: np.ndarray, token_limit: np.ndarray) -> np.ndarray:
    """(n + 1, sizes): cost of the piece of so many examples before each end; infinite where the limit or the start is
    passed. `sizes` falls by 1 to 1 or 0."""
    n, largest_size = len(lengths), int(sizes[0])
    source_lengths, target_lengths = lengths.T
    starts = np.arange(n + 1)[:, None] - sizes
    possible = (starts >= 0) & (starts < n)
    longest_source = source_lengths[starts.clip(0, n - 1)]
    # Of the examples before each end, the last 1, 2, 3, ...
    before = np.concatenate([np.zeros(largest_size, dtype=int), target_lengths])
    longest_target = np.maximum.accumulate(sliding_window_view(before, largest_size)[:, ::-1], axis=1)[:, sizes - 1]
    fits = (sizes * longest_source <= token_limit[0]) & (sizes * longest_target <= token_limit[1])
    return np.where(possible & fits, micro_batch_cost(sizes, longest_source, longest_target), np.inf)


def cut_and_deal(
    longest_first: np.ndarray, lengths: np.ndarray, num_turns: int, world: int, token_limit: np.ndarray
) -> list[list[np.ndarray]]:
    """`plan[rank][turn]`: little padding, and no rank waits long for another. Every rank has a turn at the same time:
    the costliest micro-batches come first, and the costliest of a turn goes to the rank that had the least so far."""

    def cut(cost_limit: float) -> tuple[list[np.ndarray], np.ndarray] | None:
        """Micro-batches, costliest first, and their costs."""
        ends = cut_micro_batches(lengths[longest_first], world * num_turns, token_limit, cost_limit)
        if ends is None:
            return None
        micro_batches = np.split(longest_first, ends[:-1])
        costs = np.array([micro_batch_cost(len(b), *lengths[b].max(axis=0, initial=0)) for b in micro_batches])
        costliest_first = np.argsort(-costs, kind="stable")
        return [micro_batches[index] for index in costliest_first], costs[costliest_first]

    micro_batches, costs = cut(math.inf)
    if world > 1:
        # The least total cost leaves pieces of unequal cost. A limit on a piece evens them out at little cost; on
        # DialogSum and 2 to 32 ranks, the tightest of these that can be kept to is nearly always the best.
        fair_share = max(costs.mean(), micro_batch_cost(1, *lengths[longest_first].T).max())
        even = next(filter(None, (cut(factor * fair_share) for factor in (1.1, 1.25, 1.5, 2))), None)
        if even and even[1][::world].sum() < costs[::world].sum():  # a turn takes as long as its costliest micro-batch
            micro_batches, costs = even
    plan, total_costs = [[] for _ in range(world)], np.zeros(world)
    for start in range(0, len(micro_batches), world):
        for rank, number in zip(np.argsort(total_costs, kind="stable"), range(start, start + world), strict=True):
            plan[rank].append(micro_batches[number])
            total_costs[rank] += costs[number]
    return plan


def cut_micro_batches(
    lengths: np.ndarray, num_micro_batches: int, token_limit: np.ndarray, cost_limit: float = math.inf
) -> np.ndarray | None:
    """Ends of the contiguous pieces of least total cost, by dynamic programming.

    best[m][end] = min over size of best[m - 1][end - size] + cost of the `size` examples before `end`.

    Args:
        lengths: (n, 2), source and target tokens, longest source first.
        token_limit: (2,), the most source and target tokens of a piece, padding included.
        cost_limit: the most that a piece may cost.

    Returns:
        (num_micro_batches,): where each piece ends, or None if no cut keeps to the limits. With n < num_micro_batches
        some pieces are empty.
    """
    n = len(lengths)
    # Pieces much larger than the average gain nothing, unless they must be, and only make the table wide.
    largest_size = min(n, max(4 * math.ceil(n / num_micro_batches), *pack(lengths, token_limit)))
    sizes = np.arange(largest_size, -1, -1)
    if n >= num_micro_batches:
        sizes = sizes[:-1]  # no piece is empty
    costs = compute_piece_costs(lengths, sizes, token_limit)
    costs[costs > cost_limit] = np.inf
    if sizes[-1] == 0:
        costs[:, -1] = 0

    best = np.full(n + 1, np.inf)
    best[0] = 0
    choices = []
    for _ in range(num_micro_batches):
        before = np.concatenate([np.full(largest_size, np.inf), best])
        totals = sliding_window_view(before, largest_size + 1)[:, : len(sizes)] + costs
        choice = totals.argmin(axis=1)
        best = np.take_along_axis(totals, choice[:, None], axis=1)[:, 0]
        choices.append(sizes[choice])
    if best[n] == math.inf:
        return None
    ends = [n]
    for size in reversed(choices[1:]):
        ends.append(ends[-1] - size[ends[-1]])
    return np.array(ends[::-1])


def micro_batch_cost(num_examples: int, longest_source: np.ndarray, longest_target: np.ndarray) -> np.ndarray:
    """Time of a micro-batch in units of a short source's token, padding included; attention's share grows with the
    square of the length. Measured with flan-t5-base on a CPU: a source of 512 tokens costs about twice as much a token
    as a short one, and a target's token about as much as two or three."""
    return num_examples * (longest_source * (1 + longest_source / 512) + 2 * longest_target)


def deal(items: list, costs: list[float], rank: int, world: int) -> list:
    """This process's share of the items: each, costliest first, goes to the process that has the least so far."""
    shares, total_costs = [[] for _ in range(world)], [0.0] * world
    for index in sorted(range(len(items)), key=lambda index: -costs[index]):
        least = total_costs.index(min(total_costs))
        shares[least].append(items[index])
        total_costs[least] += costs[index]
    return shares[rank]
