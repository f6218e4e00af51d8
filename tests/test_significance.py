"""Exact p-values worked out by hand, intervals by the formula, and a sample of the simulation in benchmarks/."""

import itertools
import time

import numpy as np
import pytest
from benchmarks.simulate_differences import simulate

from utils.scoring.metrics import significance
from utils.scoring.metrics.rouge import METRICS, compare_models
from utils.scoring.metrics.significance import (
    NUM_DRAWS,
    compare_means,
    correct_for_number,
    estimate_means,
    exchange_signs,
    normal_to_t,
    t_to_normal,
    undo_transformation,
)


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((1, 2, 3), 2 / 8),  # + + + and - - - alone
        ((3, -1, 1), 6 / 8),  # not +3 -1 -1 and its opposite
        ((1, 1, -1, 1), 10 / 16),  # at most one sign of its own: 2 (1 + 4)
        ((0, 1, 0, 2, 3, 0), 2 / 8),  # zeros have no sign
        ((-1, -2, -3, -4, -5, -6), 2 / 64),
        ((0.1, 0.2, -0.3), 1),  # their sum is 0 but for rounding
        ((5,), 1),
        ((0, 0), 1),
    ],
)
def test_exact_p_values(differences, expected):
    assert exchange_signs(column(*differences), seed=0) == [expected]
    assert exchange_signs(-column(*differences[::-1]), seed=0) == [expected]


def test_equal_sums_count_though_rounding_differs():
    """Tenths, whose sums are often equal, have the p-value of the same whole numbers."""
    whole = np.random.default_rng(0).integers(-3, 4, size=(12, 20))
    assert np.array_equal(exchange_signs(whole / 10, seed=0), exchange_signs(whole.astype(float), seed=0))


def test_drawn_signs_are_close_to_all():
    """Of 15 differences: within 4 standard errors of the share of all 32,768, which are more than are drawn."""
    differences = np.random.default_rng(0).normal(0.4, 1, size=(15, 6))
    signs = np.array(list(itertools.product((-1, 1), repeat=15)))
    expected = np.mean(np.abs(signs @ differences) >= np.abs(differences.sum(axis=0)) - 1e-12, axis=0)
    found = exchange_signs(differences, seed=0)
    assert np.all(np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / NUM_DRAWS) + 1 / NUM_DRAWS)
    assert not np.array_equal(found, exchange_signs(differences, seed=1))
    assert exchange_signs(np.ones((20, 1)), seed=0) == [1 / (NUM_DRAWS + 1)], "the floor is below .001"


def test_nothing_depends_on_the_order():
    """Nor on which model is A, or on what else is compared: to the last bit."""
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 4, size=60)
    sums = generator.normal(0.1, 1, size=(60, 3)) * (generator.random((60, 3)) < 0.5)
    (values, lows, highs, p_values), _ = compare_means(sums, counts, seed=0)
    order = generator.permutation(60)
    other, _ = compare_means(-sums[order], counts[order], seed=0)
    assert np.array_equal(exchange_signs(sums, 0), exchange_signs(-sums[order], 0))
    assert np.allclose((values, lows, highs, p_values), (-other.values, -other.highs, -other.lows, other.p_values))
    for one, another in zip(
        (values, lows, highs, p_values), compare_means(sums[order], counts[order], 0)[0], strict=True
    ):
        assert np.array_equal(one, another)
    alone, _ = compare_means(sums[:, 1:2], counts, seed=0)
    assert alone.p_values[0] == pytest.approx(p_values[1], abs=0.02)


def test_memory_is_bounded(monkeypatch):
    """Signs in many parts, and 3,000 dialogues at once where only 100 signs may be held."""
    differences = np.random.default_rng(0).normal(0.3, 1, size=(40, 1))
    at_once = exchange_signs(differences, seed=0)
    monkeypatch.setattr(significance, "NUM_SIGNS", 3000)
    assert exchange_signs(differences, seed=0) == pytest.approx(at_once, abs=0.01)
    monkeypatch.setattr(significance, "NUM_DRAWS", 20)
    monkeypatch.setattr(significance, "NUM_SIGNS", 100)
    assert exchange_signs(np.ones((3000, 1)), seed=0) == [1 / 21]


def test_correction():
    """Holm's: the least times 4, the next times 3, and so on; never less than one before, nor more than 1."""
    assert correct_for_number(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_for_number(np.array([0.7, 0.8, 0.04])) == pytest.approx([1, 1, 0.12])
    assert correct_for_number(np.array([0.2])) == [0.2]


def test_student():
    """The 97.5th percentiles of a printed table, to a hundredth."""
    for freedom, expected in ((4, 2.776), (9, 2.262), (19, 2.093), (99, 1.984), (499, 1.965)):
        assert normal_to_t(1.96, freedom) == pytest.approx(expected, abs=0.015)
        assert t_to_normal(np.array([-normal_to_t(1.96, freedom)]), freedom) == pytest.approx([-1.96])


def test_transformation_is_undone():
    t = np.array([-3.0, -0.5, 0, 1.96, 1.96])
    skewness = np.array([0.3, -0.3, 0.1, 0, 1e-7])
    values = t + skewness * (2 * t**2 + 1) / 6 + skewness**2 * t**3 / 27
    found = [undo_transformation(value, one) for value, one in zip(values, skewness, strict=True)]
    assert found == pytest.approx(t, abs=1e-5)


def test_interval_by_hand():
    """4, 5, 6: the standard error is 1 / sqrt(3), and Student's 97.5th percentile, for 2 degrees of freedom, 4.303."""
    value, low, high, _ = estimate_means(column(4, 5, 6), np.ones(3))
    assert (value, low, high) == (5, pytest.approx(5 - 2.484, abs=0.2), pytest.approx(5 + 2.484, abs=0.2))
    # Sums of 1, 2 and 6 over 1, 2 and 3 references: the mean is 9 / 6, what is left of the sums -0.5, -1 and 1.5.
    value, low, high, _ = estimate_means(column(1, 2, 6), np.array([1, 2, 3]))
    error, skewness = np.sqrt(3.5 * 3 / 2) / 6, (-0.125 - 1 + 3.375) / 3.5**1.5
    margin = normal_to_t(1.959964, 2)
    assert value == 1.5 and low == pytest.approx(1.5 - margin * error)  # skewed to the right: it is the upper end
    assert high == pytest.approx(1.5 - error * undo_transformation(-margin, np.array(skewness)))
    assert high - 1.5 > 1.5 - low


def test_interval_of_many():
    """Of 400 scores of standard deviation 0.1, the mean's standard error is 0.005."""
    sums = np.random.default_rng(1).normal(0.5, 0.1, (400, 1))
    estimates = estimate_means(sums, np.ones(400))
    assert estimates.values == pytest.approx(sums.mean())
    assert (estimates.highs - estimates.lows) / 2 == pytest.approx(1.965 * sums.std() / 20, rel=0.03)
    # A dialogue's three rows share one text: repeating rows must not narrow the interval.
    assert np.allclose(estimates, estimate_means(sums * 3, np.full(400, 3)))


@pytest.mark.parametrize(("z", "expected"), [(0, 1), (1, 0.317), (1.96, 0.05), (-1.96, 0.05), (-3, 0.0027)])
def test_p_value_of_a_mean(z, expected):
    """That is z standard errors from 0: a normal distribution's, both sides."""
    sums = np.random.default_rng(2).normal(0, 1, (500, 1))
    sums = (sums - sums.mean()) / sums.std() + z / np.sqrt(500)
    (_, low, high, p_value), _ = compare_means(sums, np.ones(500), seed=0)
    assert p_value == pytest.approx(expected, rel=0.15)
    assert low < 0 < high or abs(z) > 1.9


def test_the_larger_p_value_counts():
    skewed = np.concatenate([np.full(57, -1.0), np.full(3, 12.0)])[:, None] + 0.01 * np.arange(60)[:, None] / 60
    sparse = np.concatenate([np.full(55, 0.0), np.full(5, 1.0)])[:, None]
    for differences, is_signs in ((skewed, False), (sparse, True)):
        p_values = exchange_signs(differences, 0), estimate_means(differences, np.ones(60)).p_values
        assert (p_values[0] > p_values[1]) == is_signs
        assert compare_means(differences, np.ones(60), 0)[0].p_values == max(p_values)


def test_differences_all_alike():
    """No spread to judge by: no interval but the value, and the p-value of signs alone; that of no difference is 1."""
    (values, lows, highs, p_values), corrected = compare_means(np.array([[0.1, 0]] * 8), np.ones(8), seed=0)
    assert values == pytest.approx([0.1, 0]) and np.array_equal(lows, values) and np.array_equal(highs, values)
    assert (p_values.tolist(), corrected.tolist()) == ([2 / 2**8, 1], [4 / 2**8, 1])
    assert [one.tolist() for one in compare_means(column(0.3), np.ones(1), 0)[0]] == [[0.3], [0.3], [0.3], [1]]


# The goal is an error of .06 at most: .05 and two standard errors, of 1,920 pairs sqrt(.05 * .95 / 1,920) = .005.
@pytest.mark.parametrize(("kind", "size"), [("normal", 10), ("exponential", 10), ("sparse", 50), ("rare", 40)])
def test_errors_and_coverage(kind, size):
    """A sample of the table of tests/benchmarks/README.md; the bootstrap fails it."""
    shares = simulate(kind, size, num_pairs=1920)
    assert shares["ours"] <= 0.06 < shares["bootstrap"]
    assert shares["coverage"] >= 0.95 - 0.02


def test_power():
    """As often as the bootstrap finds a difference of 2 standard errors, within 2 standard errors of 960 pairs."""
    shares = simulate("normal", 500, num_pairs=960, shift=2)
    assert shares["ours"] > shares["bootstrap"] - 2 * np.sqrt(0.5 * 0.5 / 960)
    assert shares["ours"] == pytest.approx(0.514, abs=0.05)  # the normal distribution's share above 1.96 - 2


def test_four_models_take_a_second():
    generator = np.random.default_rng(0)
    scores = {
        name: {metric: generator.random((500, 3)).tolist() for metric in METRICS} for name in ("a", "b", "c", "d")
    }
    started = time.perf_counter()
    compare_models(scores, seed=0)
    assert time.perf_counter() - started < 10  # 1 s on one core of an idle machine
