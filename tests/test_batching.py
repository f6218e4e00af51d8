"""The plan of a step: the same examples for any number of processes, each once, little padding."""

import contextlib
import itertools
import math

import hypothesis
import numpy as np
import pytest

from utils.data.batching import collate, num_steps_per_epoch, plan_pass, plan_steps, select_examples
from utils.data.micro_batches import (
    LAUNCH_COSTS,
    choose_num_pieces,
    cut_micro_batches,
    micro_batch_cost,
    pack,
    plan_group,
    plan_micro_batches,
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


@pytest.mark.parametrize("launch_cost", [0, 20, 100, 1e6])
@pytest.mark.parametrize("seed", range(5))
def test_no_number_of_pieces_costs_less(seed, launch_cost):
    lengths = np.random.default_rng(seed).integers(1, (50, 9), size=(10, 2))
    lengths = lengths[np.argsort(-lengths[:, 0])]
    limit = 3 * lengths.max(axis=0)
    costs = {}
    for number in range(1, 11):
        with contextlib.suppress(ValueError):  # no cut into so many keeps to the limit
            costs[number] = cheapest_cut(lengths, number, limit, math.inf) + number * launch_cost
    number = choose_num_pieces(lengths, limit, launch_cost)
    assert costs[number] == min(costs.values())
    if launch_cost == 1e6:
        assert number == min(costs) == len(pack(lengths, limit))


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


def cost(lengths):
    return micro_batch_cost(len(lengths), *lengths.max(axis=0))


def cheapest_cut(lengths, num_pieces, limit, cost_limit):
    """The least cost over all ways to cut, by trying every one."""
    costs = []
    for ends in itertools.combinations(range(1, len(lengths)), num_pieces - 1):
        pieces = np.split(lengths, ends)
        if all((len(piece) * piece.max(axis=0) <= limit).all() and cost(piece) <= cost_limit for piece in pieces):
            costs.append(sum(map(cost, pieces)))
    return min(costs)


@pytest.mark.parametrize(("num_pieces", "seed"), [(3, 0), (4, 1), (5, 2), (4, 3), (3, 4)])
@pytest.mark.parametrize("even", [False, True])
def test_no_cut_costs_less(num_pieces, seed, even):
    lengths = np.random.default_rng(seed).integers(1, (50, 9), size=(12, 2))
    lengths = lengths[np.argsort(-lengths[:, 0])]
    limit = math.ceil(12 / num_pieces) * lengths.max(axis=0)
    cost_limit = max(1.5 * cost(lengths) / num_pieces, cost(lengths[:1])) if even else math.inf
    pieces = np.split(lengths, cut_micro_batches(lengths, num_pieces, limit, cost_limit)[:-1])
    assert len(pieces) == num_pieces and all((len(piece) * piece.max(axis=0) <= limit).all() for piece in pieces)
    assert all(cost(piece) <= cost_limit for piece in pieces)
    assert sum(map(cost, pieces)) == pytest.approx(cheapest_cut(lengths, num_pieces, limit, cost_limit), rel=1e-12)


def test_a_cut_that_cannot_keep_to_the_limits():
    assert cut_micro_batches(LENGTHS[:8], 2, LENGTHS.max(axis=0)) is None
    assert cut_micro_batches(LENGTHS[:8], 2, 8 * LENGTHS.max(axis=0), cost_limit=1) is None


@pytest.mark.parametrize(("total", "world"), [(256, 2), (256, 4), (256, 8), (256, 16), (2500, 80)])
def test_ranks_share_each_turn_fairly(total, world):
    examples = select_examples(12460, total, 42, 0)
    limit = 16 * LENGTHS.max(axis=0)
    plan = []
    while len(plan) < world:
        plan += plan_group(examples, LENGTHS, len(plan), world, limit, LAUNCH_COSTS["cuda"])[0]
    assert sorted(np.concatenate([batch for rank in plan for batch in rank])) == sorted(examples)
    costs = np.array([[cost(LENGTHS[batch]) for batch in rank] for rank in plan])
    assert costs.mean(axis=0).sum() > 0.85 * costs.max(axis=0).sum()
    assert costs.sum(axis=1).mean() > 0.88 * costs.sum(axis=1).max()


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
    batch = collate({"input_ids": [[5, 6, 1], [7, 1]], "labels": [[8, 1], [9, 4, 1]]}, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["target_positions"].tolist() == [0, 1, 3, 4, 5]
    assert batch["targets"].tolist() == [8, 1, 9, 4, 1]
    assert batch["labels"].tolist() == [[8, 1, -100], [9, 4, 1]]


def test_collate_of_nothing_is_a_row_without_a_target():
    batch = collate({"input_ids": [], "labels": []}, 0)
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
