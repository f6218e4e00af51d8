"""Intervals and tests of means over dialogues; how often they err: tests/benchmarks/README.md.

`sums` has the shape (dialogues, columns): a dialogue's sum over its references, a column for each mean to estimate.
`counts`, of shape (dialogues,), says over how many references; a mean is sum(sums) / sum(counts). A dialogue counts as
one observation, since its references share one text.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

NUM_DRAWS = 10_000  # of signs; the least p-value is 1 / 10,001
NUM_SIGNS = 2**22  # in memory at once: 32 MiB, for any number of dialogues
ROUNDING = 1e-9  # relative to the sum of the sizes: sums closer than that are equal but for rounding
QUANTILE = 1.959964  # of the normal distribution: 95 % are within plus and minus this


class Estimates(NamedTuple):
    """Arrays of shape (columns,), in the unit of `sums`."""

    values: np.ndarray
    lows: np.ndarray
    highs: np.ndarray
    p_values: np.ndarray  # of the hypothesis that the mean is 0


def compare_means(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[Estimates, np.ndarray]:
    """Estimates of mean differences (`sums`: A's less B's), and their p-values corrected for the number of columns.

    A p-value is the larger of two. That of `exchange_signs` is exact if the two texts of a dialogue might as well be
    exchanged, which makes their difference symmetric around 0. That of `estimate_means` is of a mean difference of 0,
    skewed or not; it is approximate, and too small where most differences are 0.
    """
    estimates = estimate_means(sums, counts)
    p_values = np.maximum(exchange_signs(sums, seed), estimates.p_values)
    return estimates._replace(p_values=p_values), correct_for_number(p_values)


def estimate_means(sums: np.ndarray, counts: np.ndarray) -> Estimates:
    """Means with 95 % intervals, and p-values by a t-test that allows for skewness.

    Let t = (mean - true mean) / standard error, and a = skewness / sqrt(dialogues). For skewed values,
    t + a (2 t^2 + 1) / 6 + a^2 t^3 / 27 is closer to Student's distribution than t (Hall, 1992, On the removal of
    skewness by transformation, J. R. Statist. Soc. B 54). Of these two intervals each end is the farther one: t alone
    is better where most values are 0. The standard error is that of a ratio, linearised (Cochran, 1977, Sampling
    Techniques, section 6.4).
    """
    num_dialogues, freedom = len(sums), max(1, len(sums) - 1)
    counts = np.broadcast_to(counts[:, None], sums.shape)
    order = np.lexsort((counts, sums), axis=0)  # so that rounding does not depend on the order of the dialogues
    sums, counts = np.take_along_axis(sums, order, axis=0), np.take_along_axis(counts, order, axis=0)
    total = counts.sum(axis=0)
    values = sums.sum(axis=0) / total
    residuals = sums - values * counts
    squares = (residuals**2).sum(axis=0)
    varied = np.sqrt(squares) > ROUNDING * np.abs(sums).sum(axis=0)
    squares = np.where(varied, squares, 1)
    errors = np.where(varied, np.sqrt(squares * num_dialogues / freedom) / total, 0)
    skewness = np.where(varied, (residuals**3).sum(axis=0) / squares**1.5, 0)  # divided by sqrt(dialogues)
    ratios = np.divide(values, errors, out=np.zeros_like(values), where=varied)
    transformed = ratios + skewness * (2 * ratios**2 + 1) / 6 + skewness**2 * ratios**3 / 27
    p_values = np.array([math.erfc(abs(z) / math.sqrt(2)) for z in t_to_normal(transformed, freedom)])
    p_values = np.where(varied | (values == 0), p_values, 0)  # all alike and not 0: only signs tell how sure that is
    margin = normal_to_t(QUANTILE, freedom)
    lower, upper = (undo_transformation(end, skewness) for end in (-margin, margin))
    lows, highs = values - np.maximum(upper, margin) * errors, values - np.minimum(lower, -margin) * errors
    return Estimates(values, lows, highs, p_values)


def undo_transformation(values: float, skewness: np.ndarray) -> np.ndarray:
    """The t whose t + a (2 t^2 + 1) / 6 + a^2 t^3 / 27 the value is, for a = `skewness`."""
    skewness = np.where(np.abs(skewness) < 1e-6, 1e-6, skewness)  # at 0 it is the identity, but not this formula
    return 3 / skewness * (np.cbrt(1 + skewness * (values - skewness / 6)) - 1)


def t_to_normal(t: np.ndarray, freedom: int) -> np.ndarray:
    """Values that are as probable for a normal distribution as t for Student's (Wallace, 1959, Bounds on normal
    approximations to Student's and the chi-square distributions, Ann. Math. Statist. 30)."""
    return np.sign(t) * np.sqrt(freedom * np.log1p(t**2 / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)


def normal_to_t(z: float, freedom: int) -> float:
    return math.sqrt(freedom * math.expm1((z * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom))


def exchange_signs(differences: np.ndarray, seed: int) -> np.ndarray:
    """Two-sided p-values, of shape (columns,), by approximate randomisation of `differences` (dialogues, columns).

    The share of all ways to set the signs in which the sum is at least as far from 0. If there are more than NUM_DRAWS
    ways, so many are drawn, and the observed one is added (Noreen, 1989, Computer-Intensive Methods for Testing
    Hypotheses, chapter 2). Differences of 0 have no sign: with 5 others, p is at least 2 / 2^5.
    """
    sizes = -np.sort(-np.abs(differences), axis=0)  # whatever the order of the dialogues, and of A and B
    observed = np.abs(np.sort(differences, axis=0).sum(axis=0))
    thresholds = observed - ROUNDING * sizes.sum(axis=0)  # an equal sum, added in another order, may be a little less
    numbers = np.count_nonzero(sizes, axis=0)
    p_values = np.empty(len(numbers))
    few = numbers <= math.log2(NUM_DRAWS)
    for column in np.flatnonzero(few):
        sums = all_signs(numbers[column]) @ sizes[: numbers[column], column]
        p_values[column] = np.mean(np.abs(sums) >= thresholds[column])
    if not few.all():
        num_found, generator = np.zeros(np.count_nonzero(~few)), np.random.default_rng(seed)
        sizes = sizes[: numbers.max(), ~few]
        size = max(1, NUM_SIGNS // len(sizes))
        for start in range(0, NUM_DRAWS, size):
            shape = (min(size, NUM_DRAWS - start), len(sizes))
            signs = 2.0 * generator.integers(2, size=shape, dtype=np.int8) - 1
            num_found += np.count_nonzero(np.abs(signs @ sizes) >= thresholds[~few], axis=0)
        p_values[~few] = (num_found + 1) / (NUM_DRAWS + 1)
    return p_values


@functools.cache
def all_signs(number: int) -> np.ndarray:
    """Of shape (2^number, number)."""
    return np.array(list(itertools.product((-1.0, 1.0), repeat=number)))


def correct_for_number(p_values: np.ndarray) -> np.ndarray:
    """Corrected p-values: in .05 of all reports, at most, one that is wrongly below .05 (Holm, 1979, A simple
    sequentially rejective multiple test procedure, Scand. J. Statist. 6)."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty_like(p_values)
    factors = np.arange(len(p_values), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * p_values[order]))
    return corrected
