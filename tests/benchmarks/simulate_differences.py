"""How often the p-values and intervals of a report err, on simulated differences of two models.

    python tests/benchmarks/simulate_differences.py [--num_pairs 10000] [--output_file simulate_differences.json]

Prints two tables in Markdown, in ten minutes on one core, and writes their numbers. Of pairs without any difference:
the share that has p below .05 by the percentile bootstrap of 1,000 draws, by exchanged signs alone and by
`compare_means` (ours); the share of families of 12 in which a corrected p is below .05; the share of 95 % intervals
that hold the true mean (coverage). Of pairs whose difference is 2 standard errors, one way or the other: the share
that has p below .05 (power).
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.scoring.metrics.significance import compare_means, correct_for_number, exchange_signs

SIZES = (10, 20, 30, 40, 50, 100, 500)
FAMILY = 12  # comparisons: those of three models by four metrics
BLOCK = 40 * FAMILY  # pairs that share their draws
LEVEL = 0.05
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def draw_sparse(generator: np.random.Generator, shape: tuple[int, int], mean: float = 0) -> np.ndarray:
    return np.where(generator.random(shape) < 0.1, generator.normal(mean, 1, shape), 0)


def draw_rare(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.where(generator.random(shape) < 0.1, 9, -1) + generator.normal(0, 0.3, shape)


def draw_lognormal(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return generator.lognormal(0, 1, shape) - np.exp(0.5)


def draw_heavy(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return generator.lognormal(0, 1, shape) * generator.choice((-1, 1), shape)


# Of mean 0. Normal, sparse and heavy ones are those of texts that might be exchanged; the others are skewed.
KINDS: dict[str, Draw] = {
    "normal": lambda generator, shape: generator.normal(0, 1, shape),
    "sparse": draw_sparse,  # nine of ten dialogues have the same text from both
    "heavy": draw_heavy,  # lognormal, of either sign
    "exponential": lambda generator, shape: generator.exponential(1, shape) - 1,
    "lognormal": draw_lognormal,
    "rare": draw_rare,  # one of ten is 9 better, the others 1 worse
    "sparse, better": lambda generator, shape: draw_sparse(generator, shape, mean=1) - 0.1,
}
DEVIATIONS = {
    "normal": 1, "sparse": 0.1**0.5, "heavy": np.exp(1), "exponential": 1,
    "lognormal": np.sqrt((np.e - 1) * np.e), "rare": np.sqrt(9 + 0.09), "sparse, better": np.sqrt(0.2 - 0.01),
}  # fmt: skip


def bootstrap_p_values(differences: np.ndarray, seed: int) -> np.ndarray:
    """Twice the share of 1,000 means of dialogues, drawn with replacement, on the rarer side of 0."""
    num_dialogues = len(differences)
    share = np.full(num_dialogues, 1 / num_dialogues)
    means = np.random.default_rng(seed).multinomial(num_dialogues, share, size=1000) @ np.sort(differences, axis=0)
    rarer = np.minimum((means <= 0).sum(axis=0), (means >= 0).sum(axis=0))
    return np.minimum(1, 2 * (rarer + 1) / 1001)


def simulate(kind: str, size: int, num_pairs: int, shift: float = 0, seed: int = 0) -> dict[str, float]:
    """The shares of the docstring above, for a true difference of `shift` standard errors."""
    found = []
    true_mean = shift * DEVIATIONS[kind] / np.sqrt(size) + (0.1 if kind == "sparse, better" else 0)
    for block in range(-(-num_pairs // BLOCK)):
        generator = np.random.default_rng([seed, block, size])
        differences = KINDS[kind](generator, (size, BLOCK)) + true_mean
        estimates, _ = compare_means(differences, np.ones(size), block)
        families = np.apply_along_axis(correct_for_number, 1, estimates.p_values.reshape(-1, FAMILY))
        rounding = 1e-12  # of the mean of values all 0
        covered = (estimates.lows <= true_mean + rounding) & (true_mean - rounding <= estimates.highs)
        p_values = {"bootstrap": bootstrap_p_values(differences, block), "signs": exchange_signs(differences, block)}
        p_values["ours"] = estimates.p_values
        shares = {name: np.mean(values < LEVEL) for name, values in p_values.items()}
        found.append(shares | {"family": np.mean(families.min(axis=1) < LEVEL), "coverage": covered.mean()})
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def format_share(share: float) -> str:
    return f"{share:.3f}".removeprefix("0")


def format_rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_pairs", type=int, default=10_000)
    parser.add_argument("--output_file", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    nulls = {kind: {size: simulate(kind, size, arguments.num_pairs) for size in SIZES} for kind in KINDS}
    shifted = {
        kind: {shift: simulate(kind, SIZES[-1], arguments.num_pairs, shift) for shift in (2, -2)}
        for kind in KINDS
        if kind != "sparse, better"
    }
    rows = []
    for kind, by_size in nulls.items():
        for name in ("bootstrap", "signs", "ours", "family", "coverage"):
            if kind != "sparse, better" or name == "coverage":  # there is no such pair without a difference
                rows.append([kind, name, *(format_share(by_size[size][name]) for size in SIZES)])
    sys.stdout.write(format_rows(["differences", "share", *map(str, SIZES)], rows) + "\n")
    names = ("bootstrap", "signs", "ours")
    rows = [
        [kind, *(f"{format_share(ways[2][name])} / {format_share(ways[-2][name])}" for name in names)]
        for kind, ways in shifted.items()
    ]
    sys.stdout.write(format_rows([f"power at {SIZES[-1]}", *names], rows))
    results = {"num_pairs": arguments.num_pairs, "no_difference": nulls, "shifted": shifted}
    arguments.output_file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
