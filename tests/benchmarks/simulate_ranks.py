"""How well the plan scales, on paper: padding and balance for 1 to 1,024 processes and steps of 256 to 8,192 examples.

    python tests/benchmarks/simulate_ranks.py TOKENIZER TRAIN_FILE [--output_dir FOLDER]

Steps are drawn from the lengths of the dialogues in TRAIN_FILE (a csv), with replacement where it has too few.
`efficiency` is real over computed tokens; `balance` is the mean over the largest cost of the ranks in a turn
(micro_batch_cost): 1 means that no rank waits. Their product is the share of the machines' time that goes into real
tokens. `plan_seconds` is one rank's. Writes simulate_ranks.json and simulate_ranks.png.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.data.micro_batches import LAUNCH_COSTS, micro_batch_cost, plan_ranks
from utils.prompting import build_prompt

NUM_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOTALS = (256, 512, 1024, 2048, 4096, 8192)
PER_DEVICE = 16
NUM_STEPS = 5


def read_lengths(tokenizer_path: str, train_file: str) -> np.ndarray:
    """(rows, 2): source and target tokens, truncated as by the scripts' defaults."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    with open(train_file, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    sources = tokenizer([build_prompt(row["dialogue"]) for row in rows]).input_ids
    targets = tokenizer([row["summary"] for row in rows]).input_ids
    return np.array([(min(len(s), 1024), min(len(t), 128)) for s, t in zip(sources, targets, strict=True)])


def simulate(lengths: np.ndarray, total: int, num_ranks: int) -> dict[str, float]:
    limit = PER_DEVICE * lengths.max(axis=0)
    rng = np.random.default_rng(0)
    real = computed = busy = slowest = seconds = num_turns = 0
    for _ in range(NUM_STEPS):
        examples = rng.choice(len(lengths), size=total, replace=False)
        started = time.perf_counter()
        plan = plan_ranks(examples, lengths, num_ranks, limit, LAUNCH_COSTS["cuda"])
        seconds += time.perf_counter() - started
        num_turns += len(plan[0])
        sizes = np.array([[(len(batch), *lengths[batch].max(axis=0, initial=0)) for batch in rank] for rank in plan])
        num_examples, longest_source, longest_target = np.moveaxis(sizes, 2, 0)
        costs = micro_batch_cost(num_examples, longest_source, longest_target)
        real += lengths[examples].sum()
        computed += (num_examples * (longest_source + longest_target)).sum()
        busy += costs.mean(axis=0).sum()
        slowest += costs.max(axis=0).sum()
    return {
        "num_ranks": num_ranks, "total_train_batch_size": total, "num_turns": num_turns / NUM_STEPS,
        "efficiency": float(real / computed), "balance": float(busy / slowest),
        "plan_seconds": seconds / NUM_STEPS,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("train_file")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    lengths = read_lengths(arguments.tokenizer, arguments.train_file)
    pool = lengths[np.random.default_rng(1).integers(len(lengths), size=12460)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    results = []
    for total in TOTALS:
        of_total = [simulate(pool, total, num_ranks) for num_ranks in NUM_RANKS if num_ranks <= total]
        for row in of_total:
            sys.stdout.write("  ".join(f"{key} {value:.3g}" for key, value in row.items()) + "\n")
        shares = [row["efficiency"] * row["balance"] for row in of_total]
        axes.plot([row["num_ranks"] for row in of_total], shares, "o-", label=f"{total:,} examples")
        results += of_total
    axes.set_xscale("log", base=2)
    axes.set(
        xlabel="processes", ylabel="efficiency x balance", ylim=(0, 1), title="Share of the time spent on real tokens"
    )
    axes.grid(alpha=0.3)
    axes.legend(title="a step of")
    figure.savefig(arguments.output_dir / "simulate_ranks.png", dpi=150)
    (arguments.output_dir / "simulate_ranks.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
