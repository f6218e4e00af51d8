"""Compare the speed of our generation with the usual notebook's loop and with Seq2SeqTrainer.predict.

    python tests/benchmarks/compare_generation.py MODEL TEST_FILE [--repeats 3] [--threads 2] [--output_dir FOLDER]

Each run is a process of its own, in turn, as often as asked: what else the machine does hits all alike. Ratios are
taken within a turn. MODEL is a folder with a trained model, so that its texts end where summaries do; TEST_FILE a csv
of dialogues, whose repeated ones are rows as well: users have such files. The notebook's loop, a row at a time, takes
every sixth row. Writes compare_generation.json and compare_generation.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# Name: way, beams, rows.
RUNS = {
    "trainer": ("trainer", 1, "all"),
    "notebook": ("notebook", 1, "6"),
    "trainer, distinct rows": ("trainer", 1, "distinct"),
    "ours": ("ours", 1, "all"),
    "trainer, 4 beams": ("trainer", 4, "all"),
    "ours, 4 beams": ("ours", 4, "all"),
}


def run(model: str, test_file: str, way: str, num_beams: int, rows: str, threads: int) -> dict:
    words = ["tests/benchmarks/run_generation.py", model, test_file, way, str(num_beams), rows]
    finished = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if finished.returncode:
        sys.exit(f"{' '.join(words)}\n{finished.stderr[-3000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def take_turn(model: str, test_file: str, threads: int) -> dict[str, dict[str, float]]:
    """The figures of each run, with how many times as fast as the Trainer of as many beams it is, by rows, and the
    share of dialogues with the Trainer's very text."""
    figures, texts = {}, {}
    for name, words in RUNS.items():
        result = run(model, test_file, *words, threads)
        figures[name], texts[name] = result["figures"], result["texts"]
        trainer = "trainer, 4 beams" if words[1] == 4 else "trainer"
        if trainer in figures:
            same = [text == texts[trainer][dialogue] for dialogue, text in texts[name].items()]
            figures[name]["same_text_share"] = statistics.mean(same)
        sys.stdout.write(f"{name}: {json.dumps(figures[name])}\n")
        sys.stdout.flush()
    for name, words in RUNS.items():
        trainer = figures["trainer, 4 beams" if words[1] == 4 else "trainer"]
        figures[name]["speed_ratio"] = figures[name]["rows_per_second"] / trainer["rows_per_second"]
    # Both at rows that are all distinct: what is left of the ratio without counting repeated rows.
    seconds = figures["trainer, distinct rows"]["seconds"]
    figures["ours"]["speed_ratio_on_distinct_rows"] = seconds / figures["ours"]["seconds"]
    return figures


def summarize(turns: list[dict[str, dict]]) -> dict[str, dict]:
    """Median and range over the turns."""

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "low": min(values), "high": max(values)}

    return {name: {key: spread([turn[name][key] for turn in turns]) for key in turns[0][name]} for name in turns[0]}


def draw(results: dict[str, dict], threads: int, path: Path):
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    speeds = [figures["rows_per_second"] for figures in results.values()]
    errors = [
        [speed["median"] - speed["low"] for speed in speeds],
        [speed["high"] - speed["median"] for speed in speeds],
    ]
    colors = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in results]
    names = [name.replace("trainer", "Seq2SeqTrainer").replace("ours", "these scripts") for name in results]
    bars = axes.barh(names, [speed["median"] for speed in speeds], xerr=errors, color=colors)
    axes.bar_label(bars, [f" {figures['speed_ratio']['median']:.1f}x" for figures in results.values()])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="rows per second")
    figure.suptitle(f"Generation, threads of a CPU: {threads} (median, range, times the Trainer's)")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("test_file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    inputs = (str(Path(arguments.model).resolve()), str(Path(arguments.test_file).resolve()))
    results = summarize([take_turn(*inputs, arguments.threads) for _ in range(arguments.repeats)])
    for name, figures in results.items():
        cells = [
            f"{key} {value['median']:.3g} [{value['low']:.3g}, {value['high']:.3g}]" for key, value in figures.items()
        ]
        sys.stdout.write(f"  {name:32} {', '.join(cells)}\n")
    (arguments.output_dir / "compare_generation.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, arguments.threads, arguments.output_dir / "compare_generation.png")


if __name__ == "__main__":
    main()
