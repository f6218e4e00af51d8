"""Every strategy with a model of real width, fully and with LoRA: what tiny models cannot show.

    python tests/real_sizes.py [--part strategies|base|memory] > real_sizes.md

In bf16 on two CPU processes, with flan-t5-small's shape: two updates with a validation and a checkpoint after each,
the export and, of LoRA, the merge; the same resumed from update 1, which must end bit-identical; and resumed from
there under the next strategy. Then flan-t5-base's shape under DDP and ZeRO-3, and an evaluation of two models. Last,
what --preflight estimates of memory against what is measured. Prints a table row by row, and exits with 1 if a run
failed or ended elsewhere. More than half an hour on two cores.

`distance` is how far the exported weights are from one process' (when resumed: from the uninterrupted run's), relative
to how far training moved them; of LoRA, relative to the adapter. The row "cut otherwise" says what rounding does
to it: one process, its micro-batches cut in another way. Rows are cut to 32 and 16 tokens: bf16 is slow on a CPU.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import keep_checkpoint, launch, make_rows, read_jsonl, relative_difference, write_flan_t5, write_rows
from helpers import estimate_and_measure_peak
from safetensors.torch import load_file

SHAPES = {
    "small": {"d_model": 512, "d_kv": 64, "num_heads": 6, "d_ff": 1024, "num_layers": 8},
    "base": {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 2048, "num_layers": 12},
}
STRATEGIES = ("ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2")
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
NUM_UPDATES, RESUMED_FROM = 2, 1
TIMES_ROUNDING = 2  # how far a run may be from one process', in distances of the first row


class Table:
    def __init__(self):
        self.failed = False
        self.print("model, strategy", "run", "seconds", "peak MiB", "distance", "")

    def print(self, *cells: str):
        sys.stdout.write("| " + " | ".join(cells) + " |\n")
        if cells[0] == "model, strategy":
            sys.stdout.write("|---|---|--:|--:|--:|---|\n")
        sys.stdout.flush()

    def run(self, name: str, what: str, strategy: str, words: list, output_dir: Path) -> dict | None:
        """The exported weights of a run, which is the start of a row; None, and a row, if it failed."""
        started = time.perf_counter()
        finished = launch(strategy, *words, lowered=False, timeout=1200)
        seconds = f"{time.perf_counter() - started:.0f}"
        if finished.returncode:
            self.failed = True
            lines = [line for line in finished.stderr.splitlines() if "rror" in line and "ChildFailed" not in line]
            self.print(name, what, seconds, "", "", f"**exit code {finished.returncode}**: {lines[-1:]}")
            return None
        kind = "lora" if words[0] == "train_lora.py" else "full"
        lines = [line for line in read_jsonl(output_dir / "metrics.jsonl") if line["split"] == "train"]
        return {
            "cells": (name, what, seconds, f"{max(line['peak_memory_mib'] for line in lines):.0f}"),
            "losses": [line["loss"] for line in lines],
            "weights": load_file(output_dir / WEIGHTS[kind]),
        }

    def end_row(self, run: dict, distance: float | None, expected: bool, text: str):
        self.failed |= not expected
        text = text if expected else f"**not {text}**"
        self.print(*run["cells"], "" if distance is None else f"{distance:.1e}", text)


def words(kind: str, model: Path, files: dict[str, Path], output_dir: Path, *more: object) -> list:
    lora = ["--lora_dropout", 0, "--merge_into", output_dir.with_name(f"{output_dir.name}_merged")]
    return [
        f"train_{kind}.py", "--model_name_or_path", model, "--train_file", files["train"], "--validation_file",
        files["validation"], "--output_dir", output_dir, "--total_train_batch_size", 4, "--max_train_steps",
        NUM_UPDATES, "--per_device_train_batch_size", 1, "--learning_rate", 1e-3, "--logging_steps", 1, "--eval_steps",
        1, "--checkpointing_steps", 1, "--max_source_length", 32, "--max_target_length", 16,
        *(lora if kind == "lora" else []), *more,
    ]  # fmt: skip


def measure_distance(run: dict, other: dict, before: dict) -> float:
    """Of the weights, relative to how far `other` has moved from `before`, or from 0 where there is none."""
    moved, expected = (
        {name: one["weights"][name] - before.get(name, 0) for name in one["weights"]} for one in (run, other)
    )
    return relative_difference(moved, expected)


def compare_strategies(table: Table, model: Path, files: dict[str, Path], folder: Path):
    for kind in WEIGHTS:
        before = load_file(model / "model.safetensors") if kind == "full" else {}
        name, alone_dir = f"small, {kind}", folder / f"{kind} alone"
        alone = table.run(f"{name}, one process", "updates", "one process", words(kind, model, files, alone_dir),
                          alone_dir)  # fmt: skip
        recut_dir = folder / f"{kind} recut"
        recut_words = words(kind, model, files, recut_dir, "--per_device_train_batch_size", 4)
        recut = table.run(f"{name}, one process", "cut otherwise", "one process", recut_words, recut_dir)
        if alone is None or recut is None:
            continue
        rounding = measure_distance(recut, alone, before)
        table.end_row(recut, rounding, True, "")
        table.end_row(alone, None, True, "")
        compiled_dir = folder / f"{kind} compiled"
        compiled_words = words(kind, model, files, compiled_dir, "--compile", "true")
        compiled = table.run(f"{name}, one process", "compiled", "one process", compiled_words, compiled_dir)
        if compiled:
            distance = measure_distance(compiled, alone, before)
            table.end_row(compiled, distance, distance < TIMES_ROUNDING * rounding, "as otherwise to rounding")
        remove(compiled_dir)
        for strategy, next_one in zip(STRATEGIES, (*STRATEGIES[1:], STRATEGIES[0]), strict=True):
            output_dir, label = folder / f"{kind} {strategy}", f"{name}, {strategy}"
            run = table.run(label, "updates", strategy, words(kind, model, files, output_dir), output_dir)
            if run is None:
                continue
            distance = measure_distance(run, alone, before)
            table.end_row(run, distance, distance < TIMES_ROUNDING * rounding, "as on one process to rounding")
            for resumed_by in (strategy, next_one):
                resumed_dir = keep_checkpoint(output_dir, folder / f"{kind} {strategy} by {resumed_by}", RESUMED_FROM)
                resumed_words = words(kind, model, files, resumed_dir, "--resume_from_checkpoint", "latest")
                what = f"resumed by {resumed_by}"
                resumed = table.run(label, what, resumed_by, resumed_words, resumed_dir)
                if resumed is None:
                    continue
                distance = measure_distance(resumed, run, before)
                if resumed_by == strategy:
                    table.end_row(resumed, distance, distance == 0, "bit-identical")
                else:
                    expected = distance < TIMES_ROUNDING * rounding
                    table.end_row(resumed, distance, expected, "as uninterrupted to rounding")
                remove(resumed_dir)
            remove(output_dir)
        remove(alone_dir)
        remove(recut_dir)


def remove(output_dir: Path):
    """With what was merged beside it."""
    for folder in (output_dir, output_dir.with_name(f"{output_dir.name}_merged")):
        shutil.rmtree(folder, ignore_errors=True)


def try_base(table: Table, model: Path, files: dict[str, Path], folder: Path):
    before, runs = load_file(model / "model.safetensors"), {}
    for strategy in ("ddp", "deepspeed_zero3"):
        output_dir = folder / strategy
        given = words("full", model, files, output_dir, "--checkpoints_total_limit", 1, "--max_train_steps", 2)
        runs[strategy] = table.run(f"base, full, {strategy}", "updates", strategy, given, output_dir)
    if all(runs.values()):
        table.end_row(runs["ddp"], None, True, "")
        distance = measure_distance(runs["deepspeed_zero3"], runs["ddp"], before)
        losses = [run["losses"] for run in runs.values()]
        expected = all(abs(a / b - 1) < 1e-3 for a, b in zip(*losses, strict=True))
        table.end_row(runs["deepspeed_zero3"], distance, expected, "with DDP's losses to 1e-3")
    started, report = time.perf_counter(), folder / "report"
    finished = launch(
        "ddp", "evaluate_rouge.py", "--models", f"before={model}", f"after={folder / 'ddp'}", "--test_file",
        files["validation"], "--max_new_tokens", 20, "--output_dir", report, lowered=False, timeout=1200,
    )  # fmt: skip
    num_texts = len(read_jsonl(report / "predictions.jsonl")) if finished.returncode == 0 else 0
    table.failed |= num_texts != 8
    cells = ("base, evaluation", "2 models, 4 dialogues", f"{time.perf_counter() - started:.0f}", "", "")
    table.print(*cells, f"exit code {finished.returncode}, {num_texts} texts")


def compare_estimates(table: Table, model: Path, files: dict[str, Path], folder: Path):
    """The training's peak that --preflight says, against the main process' own."""
    for kind, precision, strategy in (
        ("full", "bf16", "one process"), ("full", "no", "deepspeed_zero2"), ("full", "no", "deepspeed_zero3"),
        ("full", "no", "fsdp2"), ("lora", "no", "one process"), ("lora", "bf16", "one process"),
        ("lora", "bf16", "ddp"), ("lora", "bf16", "deepspeed_zero3"), ("lora", "bf16", "fsdp2"),
    ):  # fmt: skip
        started, here = time.perf_counter(), folder / "memory"
        here.mkdir()
        command = words(kind, model, files, here / "out", "--mixed_precision", precision)
        estimate, measured = estimate_and_measure_peak(strategy, command, here, timeout=1200)
        seconds = f"{time.perf_counter() - started:.0f}"
        run = {"cells": (f"small, {kind} {precision}, {strategy}", "memory", seconds, f"{measured / 2**20:.0f}")}
        # Estimates count what may be needed at once: a checkpoint that is still being written, and weights that stay
        # mapped from their file.
        table.end_row(run, None, estimate > 0.8 * measured, f"estimated as much: {estimate / 2**20:.0f}")
        shutil.rmtree(here)


PARTS = {
    "strategies": ("small", compare_strategies),
    "base": ("base", try_base),
    "memory": ("small", compare_estimates),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="only this one")
    part = parser.parse_args().part
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = {
            "train": write_rows(folder / "train.jsonl", make_rows(12)),
            "validation": write_rows(folder / "validation.jsonl", make_rows(4, seed=1)),
        }
        for name, (size, compare) in PARTS.items():
            if part in (None, name):
                model = write_flan_t5(folder / size, vocab_size=32128, dropout_rate=0.0, **SHAPES[size])
                compare(table, model, files, folder)
                shutil.rmtree(model)
    sys.exit(table.failed)


if __name__ == "__main__":
    main()
