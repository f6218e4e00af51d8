"""The plan of a step: the same examples for any number of processes, each once, little padding."""

import itertools
import math

import datasets
import hypothesis
import numpy as np
import pyarrow as pa
import pytest

from utils.data.batching import collate, measure_lengths, num_steps_per_epoch, plan_pass, plan_steps, select_examples
from utils.data.micro_batches import (
    LAUNCH_COSTS,
    cut_cheaply,
    cut_evenly,
    cut_for_ranks,
    micro_batch_cost,
    pack,
    plan_micro_batches,
    plan_ranks,
)

# Spread about like DialogSum's: most are short, a few are several times as long.
LENGTHS = np.random.default_rng(0).gamma((4, 4), (58, 9), size=(12460, 2)).astype(int).clip(2, (1024, 128))


def test_dialogsum_has_48_steps():
    assert num_steps_per_epoch(12460, 256) == 48
    assert num_steps_per_epoch(255, 256) == 1
    assert num_steps_per_epoch(256, 256) == 1
    assert num_steps_per_epoch(512, 256) == 2


@pytest.mark.parametrize(
    ("lengths", "per_device", "world", "turns"),
    [
        ([(10, 5)] * 40, 16, 1, 3),  # all are of full length
        ([(10, 5)] * 40, 16, 3, 1),
        ([(10, 5)] * 40, 40, 1, 1),
        ([(10, 5)] * 40, 1, 64, 1),
        ([(10, 5)] + [(1, 1)] * 59, 10, 1, 2),  # ten that end in one of full length, and 50
        ([(10, 5)] + [(1, 1)] * 60, 10, 1, 3),
    ],
)
def test_as_few_turns_as_the_lengths_allow(lengths, per_device, world, turns):
    """Where launches are what costs."""
    lengths = np.array(lengths)
    limit = per_device * lengths.max(axis=0)
    assert len(plan_micro_batches(np.arange(len(lengths)), lengths, 0, world, limit, 1e6)) == turns


def list_cuts(lengths: np.ndarray, limit: np.ndarray) -> list[np.ndarray]:
    """The pieces' costs, highest first, of every contiguous cut that keeps to the limit."""
    found = []
    for num_ends in range(len(lengths)):
        for ends in itertools.combinations(range(1, len(lengths)), num_ends):
            pieces = np.split(lengths, ends)
            if all((len(piece) * piece.max(axis=0) <= limit).all() for piece in pieces):
                found.append(np.sort([cost(piece) for piece in pieces])[::-1])
    return found


def cost(lengths: np.ndarray) -> float:
    return micro_batch_cost(len(lengths), *lengths.max(axis=0))


def draw_sorted(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of 10 examples, longest source first, and a limit of 3 of full length."""
    lengths = np.random.default_rng(seed).integers(1, (50, 9), size=(10, 2))
    return lengths[np.argsort(-lengths[:, 0])], 3 * lengths.max(axis=0)


@pytest.mark.parametrize("launch_cost", [0, 20, 100, 1e6])
@pytest.mark.parametrize("seed", range(5))
def test_no_cut_costs_less(seed, launch_cost):
    lengths, limit = draw_sorted(seed)
    pieces = np.split(lengths, cut_cheaply(lengths, limit, launch_cost)[:-1])
    assert all((len(piece) * piece.max(axis=0) <= limit).all() for piece in pieces)
    cuts = list_cuts(lengths, limit)
    assert sum(map(cost, pieces)) + len(pieces) * launch_cost == min(
        costs.sum() + len(costs) * launch_cost for costs in cuts
    )
    if launch_cost == 1e6:
        assert len(pieces) == min(map(len, cuts)) == len(pack(lengths, limit))


@pytest.mark.parametrize("max_pieces", [4, 5, 8, 12])
@pytest.mark.parametrize("seed", range(5))
def test_no_costliest_piece_is_cheaper(seed, max_pieces):
    """By more than a hundredth."""
    lengths, limit = draw_sorted(seed)
    cuts = [costs for costs in list_cuts(lengths, limit) if len(costs) <= max_pieces]
    assert cuts, "no cut keeps to the limit"
    pieces = np.split(lengths, cut_evenly(lengths, max_pieces, limit, pack(lengths, limit))[:-1])
    assert len(pieces) <= max_pieces
    assert all((len(piece) * piece.max(axis=0) <= limit).all() for piece in pieces)
    least = min(costs[0] for costs in cuts)
    assert least <= max(map(cost, pieces)) <= 1.01 * least


@pytest.mark.parametrize("launch_cost", [0, 20, 100, 1e6])
@pytest.mark.parametrize("seed", range(5))
def test_no_number_of_turns_takes_less_time(seed, launch_cost):
    lengths, limit = draw_sorted(seed)

    def time(ends: list[int]) -> float:
        costs = np.sort([cost(piece) for piece in np.split(lengths, ends[:-1])])[::-1]
        return costs[::2].sum() + math.ceil(len(costs) / 2) * launch_cost

    packed = pack(lengths, limit)
    numbers = range(math.ceil(len(packed) / 2), 6)
    times = [time(cut_evenly(lengths, 2 * num_turns, limit, packed)) for num_turns in numbers]
    assert time(cut_for_ranks(lengths, 2, limit, launch_cost)) == min(times)


def test_an_epoch_holds_each_example_at_most_once_and_the_next_is_shuffled_anew():
    epochs = [
        np.concatenate([select_examples(12460, 256, 42, 48 * epoch + step) for step in range(48)]) for epoch in (0, 1)
    ]
    assert [len(set(epoch)) for epoch in epochs] == [48 * 256] * 2
    assert not np.array_equal(*epochs)
    assert not np.array_equal(epochs[0], np.concatenate([select_examples(12460, 256, 43, step) for step in range(48)]))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("per_device", [4, 16, 300])
def test_every_process_does_its_part_of_the_same_step(world, per_device):
    limit = per_device * LENGTHS.max(axis=0)
    for step in range(3 if world < 64 else 1):
        plans = [plan_step(LENGTHS, 256, per_device, 42, rank, world, step) for rank in range(world)]
        examples = select_examples(12460, 256, 42, step)
        assert len({len(plan) for plan in plans}) == 1
        assert len(plans[0]) <= math.ceil(256 / (per_device * world))
        padded = [len(batch) * LENGTHS[batch].max(axis=0) for plan in plans for batch in plan if len(batch)]
        assert (np.max(padded, axis=0) <= limit).all()
        assert sorted(np.concatenate([batch for plan in plans for batch in plan])) == sorted(examples)


def plan_step(lengths, total, per_device, seed, rank, world, step, launch_cost=1e6):
    (plan,) = plan_steps(lengths, total, per_device, seed, rank, world, launch_cost, [step])
    return plan


@pytest.mark.parametrize(
    ("total", "world", "share"), [(256, 2, 0.85), (256, 4, 0.85), (256, 8, 0.9), (256, 16, 0.9), (2048, 64, 0.9)]
)
def test_ranks_share_each_turn_fairly(total, world, share):
    """With few turns the last micro-batch, of what is left over, weighs more."""
    examples = select_examples(12460, total, 42, 0)
    plan = plan_ranks(examples, LENGTHS, world, 16 * LENGTHS.max(axis=0), LAUNCH_COSTS["cuda"])
    costs = np.array([[cost(LENGTHS[batch]) for batch in rank] for rank in plan])
    assert costs.mean(axis=0).sum() > share * costs.max(axis=0).sum()
    assert costs.sum(axis=1).mean() > share * costs.sum(axis=1).max()


@pytest.mark.parametrize("world", [2, 5])
def test_the_costliest_come_first_and_go_to_who_had_least(world):
    examples = select_examples(12460, 256, 42, 0)
    plan = plan_ranks(examples, LENGTHS, world, 16 * LENGTHS.max(axis=0), LAUNCH_COSTS["cpu"])
    costs = np.array([[cost(LENGTHS[batch]) for batch in rank] for rank in plan])
    assert costs.shape[1] > 3
    assert (costs[:, :-1].min(axis=0) >= costs[:, 1:].max(axis=0)).all()
    for turn in range(1, costs.shape[1]):
        least_first = np.argsort(costs[:, :turn].sum(axis=1))
        assert (np.diff(costs[least_first, turn]) <= 0).all()


def test_fewer_examples_than_processes_leave_some_an_empty_turn():
    plan = [plan_micro_batches(np.arange(2), LENGTHS, rank, 3, LENGTHS.max(axis=0), 64) for rank in range(3)]
    assert sorted(len(batch) for rank in plan for batch in rank) == [0, 1, 1]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_pass_holds_every_example_once(world):
    plans = [list(plan_pass(LENGTHS[:100], 7, rank, world, 64)) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(np.concatenate([batch for plan in plans for batch in plan])) == list(range(100))


def test_a_pass_takes_no_more_turns_than_it_needs():
    assert [len(batch) for batch in plan_pass(LENGTHS[:7], 7, 0, 1, 1e6)] == [7]
    assert [len(list(plan_pass(LENGTHS[:100] * 0 + 5, 7, rank, 2, 1e6))) for rank in range(2)] == [8, 8]  # 100 / 14


def test_collate():
    batch = collate(pa.table({"input_ids": [[5, 6, 1], [7, 1]], "labels": [[8, 1], [9, 4, 1]]}), 0)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["target_positions"].tolist() == [0, 1, 3, 4, 5]
    assert batch["targets"].tolist() == [8, 1, 9, 4, 1]
    assert batch["labels"].tolist() == [[8, 1, -100], [9, 4, 1]]


def test_collate_rows_from_anywhere_in_a_data_set():
    data = datasets.Dataset.from_dict({"input_ids": [[1], [2, 3], [4]], "labels": [[5], [6], [7, 8]]})
    batch = collate(data.with_format("arrow")[[2, 1]], 0)
    assert batch["input_ids"].tolist() == [[4, 0], [2, 3]] and batch["labels"].tolist() == [[7, 8], [6, -100]]
    assert measure_lengths(data.select([1, 0])).tolist() == [[2, 1], [1, 1]]


def test_collate_of_nothing_is_a_row_without_a_target():
    batch = collate(pa.table({"input_ids": [], "labels": []}), 0)
    assert (
        batch["input_ids"].tolist() == [[0]] and batch["targets"].tolist() == batch["target_positions"].tolist() == []
    )


@hypothesis.given(
    lengths=hypothesis.strategies.lists(
        hypothesis.strategies.tuples(hypothesis.strategies.integers(1, 300), hypothesis.strategies.integers(1, 40)),
        min_size=1,
        max_size=80,
    ),
    total=hypothesis.strategies.integers(1, 100),
    per_device=hypothesis.strategies.integers(1, 120),
    world=hypothesis.strategies.integers(1, 9),
    seed=hypothesis.strategies.integers(0, 2**32),
    step=hypothesis.strategies.integers(0, 20),
    launch_cost=hypothesis.strategies.sampled_from([0, 256, 1e6]),
)
def test_any_plan(lengths, total, per_device, world, seed, step, launch_cost):
    """Each example once, equally many turns on all ranks, within the bound, the same however often it is made."""
    lengths = np.array(lengths)
    plans = [plan_step(lengths, total, per_device, seed, rank, world, step, launch_cost) for rank in range(world)]
    examples, limit = select_examples(len(lengths), total, seed, step), per_device * lengths.max(axis=0)
    assert len({len(plan) for plan in plans}) == 1
    if launch_cost == 1e6:
        assert len(plans[0]) <= math.ceil(len(examples) / (per_device * world))
    assert sorted(np.concatenate([batch for plan in plans for batch in plan])) == sorted(examples)
    assert len(set(examples)) == min(total, len(lengths))
    for batch in (batch for plan in plans for batch in plan if len(batch)):
        assert (len(batch) * lengths[batch].max(axis=0) <= limit).all()
    again = [plan_step(lengths, total, per_device, seed, rank, world, step, launch_cost) for rank in range(world)]
    assert all(map(np.array_equal, itertools.chain(*plans), itertools.chain(*again)))


def test_sixty_four_ranks_take_the_step_of_one():
    one = plan_step(LENGTHS, 256, 16, 42, 0, 1, 7)
    many = [plan_step(LENGTHS, 256, 16, 42, rank, 64, 7) for rank in range(64)]
    assert {len(plan) for plan in many} == {1}
    assert sorted(np.concatenate(one)) == sorted(np.concatenate([plan[0] for plan in many]))
