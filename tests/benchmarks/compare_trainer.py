"""Compare the scripts' training speed with Seq2SeqTrainer's, on the same rows, models and updates.

    python tests/benchmarks/compare_trainer.py TRAIN_FILE MODEL [MODEL ...] [--mixed_precision no] [--repeats 3]
        [--updates 3] [--total 128] [--pairs full LoRA] [--samplings batch_rebalance]

Each run is a process of its own on two threads, in turn, as often as asked: what else the machine does hits all alike.
The first update of a run warms up and is not counted. Ratios are taken within a turn. MODEL is a folder with a
Flan-T5-shaped model, TRAIN_FILE a csv of dialogues. Writes compare_trainer.json and compare_trainer.png.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# Our script, and the Trainer's mode. Our LoRA base is bf16; the Trainer's is fp32 unless loaded otherwise.
PAIRS = {
    "full": ("train_full.py", "full"),
    "LoRA": ("train_lora.py", "lora"),
    "LoRA, both bf16 base": ("train_lora.py", "lora_bf16_base"),
}
SAMPLINGS = ("random", "group_by_length", "batch_rebalance")  # the Trainer's train_sampling_strategy


def run(words: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    finished = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if finished.returncode:
        sys.exit(f"{' '.join(words)}\n{finished.stderr[-3000:]}")
    return finished.stdout


def measure_ours(
    script: str, model: str, train_file: str, num_updates: int, precision: str, total: int
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        run([
            script, "--model_name_or_path", model, "--train_file", train_file, "--output_dir", folder,
            "--total_train_batch_size", str(total), "--max_train_steps", str(num_updates), "--logging_steps", "1",
            "--mixed_precision", precision,
        ])  # fmt: skip
        metrics = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steady = metrics[1:]
    seconds = sum(line["num_examples"] / line["samples_per_second"] for line in steady)
    return {
        "samples_per_second": sum(line["num_examples"] for line in steady) / seconds,
        "padding_efficiency": statistics.mean(line["padding_efficiency"] for line in metrics),
        "peak_memory_mib": metrics[-1]["peak_memory_mib"],
        "data_wait_share": statistics.mean(line["data_wait_share"] for line in steady),
    }


def measure_trainer(
    mode: str, sampling: str, model: str, train_file: str, num_updates: int, precision: str, total: int
) -> dict[str, float]:
    words = ["tests/benchmarks/run_trainer.py", model, train_file, mode, sampling, str(num_updates), precision]
    return json.loads(run([*words, "16", str(total)]).splitlines()[-1])


def summarize(turns: list[dict[str, dict]]) -> dict[str, dict]:
    """Median and range over the turns; `speed_ratio` and `memory_ratio` are ours over the Trainer's of the turn, and
    `best_ratio` is our speed over that of the Trainer's fastest sampling in it."""

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "low": min(values), "high": max(values)}

    summary = {name: {key: spread([turn[name][key] for turn in turns]) for key in turns[0][name]} for name in turns[0]}
    samplings = [name for name in turns[0] if name != "ours"]
    best = [
        turn["ours"]["samples_per_second"] / max(turn[s]["samples_per_second"] for s in samplings) for turn in turns
    ]
    summary["ours"]["best_ratio"] = spread(best)
    for sampling in samplings:
        for ratio, key in (("speed_ratio", "samples_per_second"), ("memory_ratio", "peak_memory_mib")):
            summary[sampling][ratio] = spread([turn["ours"][key] / turn[sampling][key] for turn in turns])
    return summary


def draw(results: dict[str, dict], path: Path):
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    names = {"ours": "these scripts"} | {sampling: f"Seq2SeqTrainer, {sampling}" for sampling in SAMPLINGS}
    for offset, (name, label) in enumerate(names.items()):
        pairs = enumerate(results.values())
        speeds = {index: pair[name]["samples_per_second"] for index, pair in pairs if name in pair}
        medians = [speed["median"] for speed in speeds.values()]
        errors = [
            [speed["median"] - speed["low"] for speed in speeds.values()],
            [speed["high"] - speed["median"] for speed in speeds.values()],
        ]
        axes.bar([index + 0.21 * (offset - 1.5) for index in speeds], medians, 0.2, yerr=errors, label=label)
    axes.set_xticks(range(len(results)), list(results))
    axes.set(ylabel="samples per second", title="Training speed on two CPU cores (median and range)")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_file")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--mixed_precision", choices=["bf16", "no"], default="bf16", help="no where a CPU has no bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--total", type=int, default=128, help="examples of an update, in micro-batches of 16")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--samplings", nargs="+", choices=SAMPLINGS, default=list(SAMPLINGS))
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    train_file, results = str(Path(arguments.train_file).resolve()), {}
    for model, kind in itertools.product(arguments.models, arguments.pairs):
        (script, mode), pair, turns = PAIRS[kind], f"{Path(model).name}, {kind}", []
        inputs = (
            str(Path(model).resolve()),
            train_file,
            arguments.updates,
            arguments.mixed_precision,
            arguments.total,
        )
        for _ in range(arguments.repeats):
            turn = {"ours": measure_ours(script, *inputs)}
            turn |= {sampling: measure_trainer(mode, sampling, *inputs) for sampling in arguments.samplings}
            turns.append(turn)
            sys.stdout.write(f"{pair}: {json.dumps(turn)}\n")
            sys.stdout.flush()
        results[pair] = summarize(turns)
        for name, figures in results[pair].items():
            cells = [
                f"{key} {value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
                for key, value in figures.items()
            ]
            sys.stdout.write(f"  {name:16} {', '.join(cells)}\n")
    (arguments.output_dir / "compare_trainer.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, arguments.output_dir / "compare_trainer.png")


if __name__ == "__main__":
    main()
