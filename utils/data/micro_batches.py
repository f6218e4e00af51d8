"""The examples of one step, cut into micro-batches and dealt to the processes.

The only place that does arithmetic with ranks. A pure function of the examples' lengths: every process works out the
same plan without a word to the others.
"""

import math

import numpy as np
import torch

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
    tokens. Some micro-batches may be empty, as when there are fewer examples than ranks; they still take part in the
    collectives.

    Args:
        lengths: (num_examples in the set, 2), source and target tokens.
        token_limit: (2,), the most source and target tokens of a micro-batch, padding included. With those of N
            examples of full length it takes no more memory than they do: attention's squares are smaller, too.
        launch_cost: of a micro-batch, see LAUNCH_COSTS.
    """
    return plan_ranks(examples, lengths, world, token_limit, launch_cost)[rank]


def plan_ranks(
    examples: np.ndarray, lengths: np.ndarray, world: int, token_limit: np.ndarray, launch_cost: float
) -> list[list[np.ndarray]]:
    """`plan[rank][turn]`: the micro-batches of every rank. The costliest come first, so that those of a turn cost
    about the same, and within a turn the costliest goes to the rank with the least work so far. A single rank waits
    for no other: its cut is the cheapest in all."""
    source_lengths, target_lengths = lengths[examples].T
    longest_first = examples[np.lexsort((examples, -target_lengths, -source_lengths))]
    if world == 1:
        ends = cut_cheaply(lengths[longest_first], token_limit, launch_cost)
    else:
        ends = cut_for_ranks(lengths[longest_first], world, token_limit, launch_cost)
    micro_batches = np.split(longest_first, ends[:-1])
    micro_batches += [longest_first[:0]] * (-len(micro_batches) % world)
    costs = np.array([micro_batch_cost(len(b), *lengths[b].max(axis=0, initial=0)) for b in micro_batches])
    plan, total_costs = [[] for _ in range(world)], np.zeros(world)
    for turn in np.argsort(-costs, kind="stable").reshape(-1, world):
        for rank, number in zip(np.argsort(total_costs, kind="stable"), turn, strict=True):
            plan[rank].append(micro_batches[number])
            total_costs[rank] += costs[number]
    return plan


def cut_cheaply(lengths: np.ndarray, token_limit: np.ndarray, launch_cost: float) -> list[int]:
    """Where to cut into contiguous pieces so that the total cost, a launch for each piece included, is lowest. Dynamic
    programming over where the last piece ends.

    Args:
        lengths: (n, 2), source and target tokens, longest source first; so are those of the functions below.
    """
    source_lengths, target_lengths = lengths.T
    lowest, starts = np.zeros(len(lengths) + 1), [0]
    longest_target = np.zeros(len(lengths), dtype=int)  # of a piece from each start to the current end
    for end in range(1, len(lengths) + 1):
        sizes, longest_source = np.arange(end, 0, -1), source_lengths[:end]
        np.maximum(longest_target[:end], target_lengths[end - 1], out=longest_target[:end])
        fits = (sizes * longest_source <= token_limit[0]) & (sizes * longest_target[:end] <= token_limit[1])
        costs = micro_batch_cost(sizes, longest_source, longest_target[:end]) + launch_cost
        totals = np.where(fits, lowest[:end] + costs, np.inf)
        starts.append(int(totals.argmin()))
        lowest[end] = totals[starts[end]]
    ends = [len(lengths)]
    while start := starts[ends[-1]]:
        ends.append(start)
    return ends[::-1]


def cut_for_ranks(lengths: np.ndarray, world: int, token_limit: np.ndarray, launch_cost: float) -> list[int]:
    """Where to cut into pieces of nearly equal cost, as many as give the turns that take the least time. A turn takes
    as long as its costliest piece plus a launch."""
    ends = pack(lengths, token_limit)
    num_turns, most_turns = math.ceil(len(ends) / world), math.ceil(len(lengths) / world)
    without_padding = micro_batch_cost(1, *lengths.T).sum() / world
    shortest = math.inf
    while num_turns <= most_turns and without_padding + num_turns * launch_cost < shortest:
        ends = cut_evenly(lengths, num_turns * world, token_limit, ends)
        costliest_first = np.sort(piece_costs(lengths, ends))[::-1]
        time = costliest_first[::world].sum() + math.ceil(len(ends) / world) * launch_cost
        if time < shortest:
            shortest, best = time, ends
        num_turns += max(1, num_turns // 16)  # near the best number one more or less makes no difference
    return best


def cut_evenly(lengths: np.ndarray, max_pieces: int, token_limit: np.ndarray, ends: list[int]) -> list[int]:
    """Where to cut into at most max_pieces contiguous pieces so that the costliest is within 1 % of the optimum, found
    by bisecting the cost limit.

    Args:
        ends: such a cut, to begin with.
    """
    costs = micro_batch_cost(1, *lengths.T)
    low = max(costs.max(), costs.sum() / max_pieces)
    high = piece_costs(lengths, ends).max()
    while high > 1.01 * low:
        middle = (low + high) / 2
        tried = pack(lengths, token_limit, middle)
        if len(tried) <= max_pieces:
            ends, high = tried, piece_costs(lengths, tried).max()
        else:
            low = middle
    return ends


def pack(lengths: np.ndarray, token_limit: np.ndarray, cost_limit: float = math.inf) -> list[int]:
    """Where to cut into the fewest contiguous pieces within the limits. Greedy is optimal here: any part of a piece
    that fits also fits."""
    source_lengths, target_lengths = lengths.T
    ends, start = [], 0
    while start < len(lengths):
        longest_source = source_lengths[start]
        max_examples = token_limit[0] // max(1, longest_source)
        longest_target = np.maximum.accumulate(target_lengths[start : start + max_examples])
        sizes = np.arange(1, len(longest_target) + 1)
        fits = micro_batch_cost(sizes, longest_source, longest_target) <= cost_limit
        fits &= sizes * longest_target <= token_limit[1]
        start += max(1, int(np.count_nonzero(fits)))  # an example over the limit stands alone
        ends.append(start)
    return ends


def piece_costs(lengths: np.ndarray, ends: list[int]) -> np.ndarray:
    """(pieces,): the cost of each."""
    starts = [0, *ends[:-1]]
    return micro_batch_cost(np.subtract(ends, starts), *np.maximum.reduceat(lengths, starts).T)


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
