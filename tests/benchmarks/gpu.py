"""Benchmark training and generation on a GPU, without a network: speed against Seq2SeqTrainer, peak memory against its
estimate, kernel counts, attention kernels, torch.compile, ZeRO, and whether runs repeat bit for bit. So far run on a
CPU only.

    python tests/benchmarks/gpu.py OUTPUT_DIR                                   # flan-t5-base's shape, random weights
    python tests/benchmarks/gpu.py OUTPUT_DIR --shape tiny --updates 2          # whether it runs, on a CPU
    python tests/benchmarks/gpu.py OUTPUT_DIR --parts full_64 generate_bf16     # some parts alone, again

Each part runs in its own process, for at most 90 s (240 s if it compiles), and appends a line to OUTPUT_DIR/gpu.jsonl.
A part that fails or is left out records why; what it wrote to stderr is in OUTPUT_DIR. No part starts that might end
after --minutes: repeat the command to run the remaining parts. gpu.md and gpu.png then summarise all lines. The rows
have random words and DialogSum's lengths; generation is forced to 40 tokens.
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))

# d_model, d_ff, layers, heads of google/flan-t5-*.
SHAPES = {"tiny": (64, 128, 2, 4), "small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12)}
TOTAL = 256  # examples of an update
NUM_ROWS, NUM_DIALOGUES, NUM_REFERENCES = 2048, 500, 3  # to train on; to summarise
SECONDS, SECONDS_TO_COMPILE = 90, 240  # of a part, imports included
COLUMNS = {  # of gpu.md: a figure's key, and what divides it
    "samples/s": ("samples_per_second", 1), "rows/s": ("rows_per_second", 1), "peak GiB": ("peak_memory_mib", 1024),
    "micro-batches": ("micro_batches_per_update", 1), "first update, s": ("first_update_seconds", 1),
    "whole part, s": ("seconds", 1),
}  # fmt: skip


def write_model(folder: Path, shape: str):
    """Random weights of a shape, an untied head, the demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    d_model, d_ff, num_layers, num_heads = SHAPES[shape]
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128, d_model=d_model, d_ff=d_ff, d_kv=64, num_layers=num_layers, num_heads=num_heads,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * d_model**-0.5)
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REPOSITORY / "demo" / "model").save_pretrained(folder)


def write_rows(path: Path, num_dialogues: int, num_references: int, scale: float, seed: int):
    """Lengths as DialogSum's, times `scale`: 236 and 36 tokens on average, lognormal, the longest 1,024 and 128."""
    words = re.findall(r"[a-z]{3,}", (REPOSITORY / "demo" / "train.jsonl").read_text(encoding="utf-8"))[:5000]
    generator = np.random.default_rng(seed)

    def draw(mean: float, spread: float, most: int) -> str:
        length = scale * np.clip(generator.lognormal(np.log(mean) - spread**2 / 2, spread), 3, most)
        return " ".join(generator.choice(words, int(length) or 1))

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "dialogue", "summary"])
        for number in range(num_dialogues):
            dialogue = draw(236, 0.5, 1000)
            writer.writerows([f"{number}_{n}", dialogue, draw(36, 0.45, 120)] for n in range(num_references))


def build_parts(folder: Path, total: int, num_updates: int) -> dict[str, list[str]]:
    """The command of each part, most important first."""
    import torch

    model, rows, test_rows = folder / "model", folder / "rows.csv", folder / "test_rows.csv"
    precision = "bf16" if torch.cuda.is_available() else "no"
    profile = "tests/benchmarks/profile_gpu.py"
    parts = {"machine": [profile, "machine"]}

    def train(name: str, kind: str, size: int | str, *more: object, launcher: tuple[object, ...] = ()):
        parts[name] = [
            *launcher, f"train_{kind}.py", "--model_name_or_path", model, "--train_file", rows, "--output_dir",
            folder / name, "--total_train_batch_size", total, "--per_device_train_batch_size", size,
            "--logging_steps", 1, "--max_train_steps", num_updates, "--mixed_precision", precision, *more,
        ]  # fmt: skip

    def train_with_trainer(kind: str, sampling: str, size: int, *compiled: str):
        name = "_".join(("trainer", kind, sampling, str(size), *compiled))
        words = ["tests/benchmarks/run_trainer.py", model, rows, kind, sampling, num_updates, precision, size, total]
        parts[name] = [*words, *compiled]

    def generate(name: str, way: str, num_beams: int, chosen: str | int, dtype: str):
        words = ["tests/benchmarks/run_generation.py", model, test_rows, way, num_beams, chosen, dtype, 40]
        parts[f"generate_{name}"] = words

    for kind in ("full", "lora"):
        train(f"{kind}_auto", kind, "auto")
        train(f"{kind}_64", kind, 64)
    train_with_trainer("full", "batch_rebalance", 64)
    generate("bf16", "ours", 1, "distinct", "bf16")
    parts["profile"] = [profile, "update", model, rows, folder / "profile"]
    parts["attention"] = [profile, "attention"]
    train("full_64_compiled", "full", 64, "--compile", "true")
    train("preflight_64", "full", 64, "--preflight")
    train(
        "whole", "full", "auto", "--max_train_steps", 8 * num_updates, "--validation_file", test_rows,
        "--eval_steps", 2 * num_updates, "--checkpointing_steps", 2 * num_updates,
    )  # fmt: skip
    trained = [f"{kind}={folder / f'{kind}_auto'}" for kind in ("full", "lora")]
    parts["evaluate"] = [
        "evaluate_rouge.py", "--models", f"original={model}", *trained, "--test_file", test_rows, "--max_new_tokens",
        128, "--output_dir", folder / "evaluate",
    ]  # fmt: skip
    half = ("--deterministic", "true", "--checkpointing_steps", num_updates // 2)
    for number in (1, 2):
        train(f"deterministic_{number}", "full", 64, *half)
    train("deterministic_resumed", "full", 64, *half, "--resume_from_checkpoint", "latest")
    train_with_trainer("lora", "batch_rebalance", 64)
    train_with_trainer("full", "batch_rebalance", 64, "compile")
    for sampling, size in (("random", 64), ("random", 16), ("group_by_length", 64), ("batch_rebalance", 16)):
        train_with_trainer("full", sampling, size)
    generate("fp32", "ours", 1, "distinct", "fp32")
    generate("bf16_4_beams", "ours", 4, "distinct", "bf16")
    generate("trainer_fp32", "trainer", 1, "distinct", "fp32")
    generate("one_at_a_time_fp32", "notebook", 1, 30, "fp32")
    for size in (16, 32, 128):
        train(f"full_{size}", "full", size)
    for stage in (2, 3):
        config = f"accelerate_configs/deepspeed_zero{stage}.yaml"
        launcher = ("-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 1)
        train(f"zero{stage}_64", "full", 64, launcher=launcher)
    train("lora_64_compiled", "lora", 64, "--compile", "true")
    train_with_trainer("full", "group_by_length", 16)
    train_with_trainer("lora", "random", 64)
    generate("trainer_4_beams_fp32", "trainer", 4, "distinct", "fp32")
    for sampling, size in (("random", 64), ("group_by_length", 64), ("batch_rebalance", 16), ("random", 16)):
        train_with_trainer("full", sampling, size, "compile")
    return {name: [str(word) for word in words] for name, words in parts.items()}


def choose_limit(name: str) -> int:
    return SECONDS_TO_COMPILE if "compile" in name else SECONDS


def run_part(name: str, words: list[str], folder: Path) -> dict:
    """Its figures, or why there are none."""
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return {"left_out": "deepspeed is not installed"}
    shutil.rmtree(folder / name, ignore_errors=True)
    if name == "deterministic_resumed":
        checkpoints = sorted((folder / "deterministic_1" / "checkpoints").glob("step_*"))
        if len(checkpoints) < 2:
            return {"left_out": "deterministic_1 left no checkpoint before its last"}
        shutil.copytree(checkpoints[0], folder / name / "checkpoints" / checkpoints[0].name)
    started = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, **pipes)
    try:
        output, errors = process.communicate(timeout=choose_limit(name))
    except BaseException as error:
        # And what it has started, which would keep the GPU.
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return {"left_out": f"not done within {choose_limit(name)} s"}
        raise
    result = {"seconds": time.perf_counter() - started}
    (folder / f"{name}.stderr").write_text(errors, encoding="utf-8")
    if process.returncode:
        return result | {"left_out": (errors.strip().splitlines() or ["no output"])[-1][-300:]}
    try:
        return read_figures(name, words, folder, output, errors) | result
    except Exception as error:  # what one part prints must not end the others
        return result | {"left_out": f"{type(error).__name__}: {error}"}


def read_figures(name: str, words: list[str], folder: Path, output: str, errors: str) -> dict:
    if name == "evaluate":
        return {}
    if name.startswith("preflight"):
        number, unit = re.search(r"gradient being computed, the sum +([\d.,]+) (GB|MB)", output).groups()
        return {"estimated_bytes": float(number.replace(",", "")) * {"GB": 1e9, "MB": 1e6}[unit]}
    if "--logging_steps" in words:
        return read_training(folder / name) | {"times": errors.splitlines()[-1]}
    figures = json.loads(output.splitlines()[-1])
    if name.startswith("generate"):  # the others are of texts that end by themselves
        return {key: figures["figures"][key] for key in ("rows_per_second", "peak_memory_mib")}
    return figures


def read_training(folder: Path) -> dict:
    """Speed without the first update, which plans and allocates."""
    from utils.files import describe_file

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, *steady = [line for line in lines if line["split"] == "train"]
    seconds = sum(line["num_examples"] / line["samples_per_second"] for line in steady)
    manifest = json.loads((folder / "run_manifest.json").read_text())
    return {
        "samples_per_second": sum(line["num_examples"] for line in steady) / seconds,
        "first_update_seconds": first["num_examples"] / first["samples_per_second"],
        "peak_memory_mib": max(line["peak_memory_mib"] for line in steady),
        "micro_batches_per_update": float(np.mean([line["micro_batches_per_update"] for line in steady])),
        "per_device_train_batch_size": manifest["settings"]["per_device_train_batch_size"],
        "weights": {path.name: describe_file(path)["sha256"] for path in sorted(folder.glob("*.safetensors"))},
    }


def format_table(results: dict[str, dict]) -> str:
    """Markdown: what all parts measure in columns, the rest in the last one."""
    known = {key for key, _ in COLUMNS.values()}
    lines = ["| part | " + " | ".join(COLUMNS) + " | more |", "|---|" + "--:|" * len(COLUMNS) + "---|"]
    for name, result in results.items():
        cells = [f"{result[key] / divisor:.1f}" if key in result else "" for key, divisor in COLUMNS.values()]
        more = {
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in result.items() if key not in known | {"part", "weights"}
        }  # fmt: skip
        cells.append(", ".join(f"{key}: {value}" for key, value in more.items()).replace("|", "/"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compare(results: dict[str, dict]) -> list[str]:
    """What two or more parts tell together, where they are all there."""
    said = []
    for kind in ("full", "lora"):
        speeds = {
            name: result["samples_per_second"]
            for name, result in results.items() if kind in name.split("_") and "samples_per_second" in result
        }  # fmt: skip
        theirs = max((name for name in speeds if name.startswith("trainer")), key=speeds.get, default=None)
        if theirs and f"{kind}_auto" in speeds:
            ratio = speeds[f"{kind}_auto"] / speeds[theirs]
            said.append(f"{kind}_auto is {ratio:.2f} times as fast as the Trainer's fastest here, {theirs}")
    weights = {name: result["weights"] for name, result in results.items() if "weights" in result}
    for name in ("deterministic_2", "deterministic_resumed"):
        if {name, "deterministic_1"} <= weights.keys():
            same = weights[name] == weights["deterministic_1"]
            said.append(f"{name} ends with {'the same' if same else 'other'} bits as deterministic_1")
    estimated = results.get("preflight_64", {}).get("estimated_bytes")
    peak = results.get("full_64", {}).get("peak_memory_mib")
    has_gpu = results.get("machine", {}).get("device") != "no GPU"  # without one the peak is the whole process's
    if has_gpu and estimated and peak:
        said.append(f"preflight estimates {estimated / (peak * 2**20):.2f} of full_64's peak")
    return said


def draw(results: dict[str, dict], path: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), layout="constrained")
    figure.suptitle(results.get("machine", {}).get("device", ""))
    keys = {"samples_per_second": "training, samples per second", "rows_per_second": "generation, rows per second"}
    shown = {key: [name for name in results if key in results[name]] for key in keys}
    panels = figure.subplots(2, height_ratios=[len(names) + 1 for names in shown.values()])
    for axes, (key, names) in zip(panels, shown.items(), strict=True):
        colors = ["tab:gray" if "trainer" in name or "one_at" in name else "tab:blue" for name in names]
        axes.bar_label(axes.barh(names, [results[name][key] for name in names], color=colors), fmt=" %.0f")
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set(xlabel=keys[key])
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--parts", nargs="+", help="these alone, also if they have a line already")
    arguments = parser.parse_args()
    folder, started = arguments.output_dir.resolve(), time.monotonic()
    if arguments.updates < 2:
        parser.error("--updates must be at least 2: the first plans and allocates")
    is_trial = arguments.shape == "tiny"
    parts = build_parts(folder, 64 if is_trial else TOTAL, arguments.updates)
    if unknown := set(arguments.parts or ()) - parts.keys():
        parser.error(f"no part {min(unknown)}: {', '.join(parts)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", arguments.shape)
    scale = 0.1 if is_trial else 1
    write_rows(folder / "rows.csv", 128 if is_trial else NUM_ROWS, 1, scale, seed=0)
    write_rows(folder / "test_rows.csv", 20 if is_trial else NUM_DIALOGUES, NUM_REFERENCES, scale, seed=1)
    path = folder / "gpu.jsonl"
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = {line.pop("part"): line for line in map(json.loads, before)}
    for name in arguments.parts or [name for name in parts if name not in results]:
        if time.monotonic() - started + choose_limit(name) > 60 * arguments.minutes:
            sys.stdout.write(f"{name} might end after --minutes: repeat the command for the rest\n")
            break
        results[name] = run_part(name, parts[name], folder)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": name} | results[name]) + "\n")
        sys.stdout.write(format_table({name: results[name]}).splitlines()[-1] + "\n")
        sys.stdout.flush()
    said = "".join(f"\n- {line}" for line in compare(results))
    (folder / "gpu.md").write_text(f"{format_table(results)}{said}\n", encoding="utf-8")
    draw(results, folder / "gpu.png")
    sys.stdout.write(f"{said}\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part that runs ends, too
    main()
