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
    """plan_micro_batches of every rank. All have their turns at the same time: the costliest micro-batches come first,
    and the costliest of a turn goes to the rank that had the least so far."""
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
    """Ends of the contiguous pieces that cost least in all, a launch for each included. By dynamic programming: the
    least for the examples before an end is that of a last piece and of what is before it, wherever it starts.

    Args:
        lengths: (n, 2), source and target tokens, longest source first; so are those of the functions below.
    """
    source_lengths, target_lengths = lengths.T
    least, starts = np.zeros(len(lengths) + 1), [0]
    longest_target = np.zeros(len(lengths), dtype=int)  # of the last piece, by where it starts, as its size
    for end in range(1, len(lengths) + 1):
        sizes, longest_source = np.arange(end, 0, -1), source_lengths[:end]
        longest_target[:end] = longest_target[:end].clip(target_lengths[end - 1])
        fits = (sizes * longest_source <= token_limit[0]) & (sizes * longest_target[:end] <= token_limit[1])
        costs = micro_batch_cost(sizes, longest_source, longest_target[:end]) + launch_cost
        totals = np.where(fits, least[:end] + costs, np.inf)
        starts.append(int(totals.argmin()))
        least[end] = totals[starts[end]]
    ends = [len(lengths)]
    while start := starts[ends[-1]]:
        ends.append(start)
    return ends[::-1]


def cut_for_ranks(lengths: np.ndarray, world: int, token_limit: np.ndarray, launch_cost: float) -> list[int]:
    """Ends of contiguous pieces of nearly equal cost, as many as turns of all ranks take the least time. A turn takes
    as long as its costliest piece, and a launch."""
    fewest_turns = math.ceil(len(pack(lengths, token_limit)) / world)
    without_padding = micro_batch_cost(1, *lengths.T).sum() / world
    least = math.inf
    for num_turns in range(fewest_turns, max(fewest_turns, math.ceil(len(lengths) / world)) + 1):
        if without_padding + num_turns * launch_cost >= least:
            break
        ends = cut_evenly(lengths, num_turns * world, token_limit)
        costliest_first = np.sort(piece_costs(lengths, ends))[::-1]
        time = costliest_first[::world].sum() + num_turns * launch_cost
        if time < least:
            least, best = time, ends
    return best


def cut_evenly(lengths: np.ndarray, most_pieces: int, token_limit: np.ndarray) -> list[int]:
    """Ends of at most so many contiguous pieces, the costliest of which costs at most a hundredth more than it must:
    by bisection of the cost that pack keeps to."""
    costs = micro_batch_cost(1, *lengths.T)
    low = max(costs.max(), costs.sum() / most_pieces)
    ends = pack(lengths, token_limit)
    high = piece_costs(lengths, ends).max()
    while high > 1.01 * low:
        middle = (low + high) / 2
        tried = pack(lengths, token_limit, middle)
        if len(tried) <= most_pieces:
            ends, high = tried, middle
        else:
            low = middle
    return ends


def pack(lengths: np.ndarray, token_limit: np.ndarray, cost_limit: float = math.inf) -> list[int]:
    """Ends of the fewest contiguous pieces that keep to the limits: each takes as many examples as it can, which is
    the best, since any part of a piece that fits does too. Each example must fit by itself."""
    source_lengths, target_lengths = lengths.T
    ends, start = [], 0
    while start < len(lengths):
        longest_source = source_lengths[start]
        most = token_limit[0] // max(1, longest_source)
        longest_target = np.maximum.accumulate(target_lengths[start : start + most])
        sizes = np.arange(1, len(longest_target) + 1)
        fits = micro_batch_cost(sizes, longest_source, longest_target) <= cost_limit
        fits &= sizes * longest_target <= token_limit[1]
        start += int(np.count_nonzero(fits))
        ends.append(start)
    return ends


def piece_costs(lengths: np.ndarray, ends: list[int]) -> np.ndarray:
    """(pieces,)"""
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
