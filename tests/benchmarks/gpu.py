"""Measure on a GPU, without a network, what the READMEs claim of one: speed and memory of training by micro-batch
size, beside Seq2SeqTrainer's, launches, generation, preflight's estimate, the same bits. Not yet run on a GPU.

    python tests/benchmarks/gpu.py OUTPUT_DIR                                   # flan-t5-base's shape, random weights
    python tests/benchmarks/gpu.py OUTPUT_DIR --shape tiny --updates 2          # whether it runs, on a CPU
    python tests/benchmarks/gpu.py OUTPUT_DIR --parts full_64 generate_bf16     # some parts alone

Each part is a process of its own, may take 90 s, or 240 if it compiles, and adds a line to OUTPUT_DIR/gpu.jsonl as it
ends. A part whose package is not installed, or that fails, says so in its line. Rows have DialogSum's lengths and
random words.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))

# d_model, d_ff, layers, heads of google/flan-t5-*.
SHAPES = {"tiny": (64, 128, 2, 4), "small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12)}
TOTAL = 256  # examples of an update
NUM_ROWS = 2048
NUM_PROMPTS = 500
SECONDS, SECONDS_TO_COMPILE = 90, 240  # of a part, imports included


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


def write_rows(path: Path, num_rows: int, scale: float):
    """Lengths as DialogSum's, times `scale`: 236 and 36 tokens on average, lognormal, the longest 1,024 and 128."""
    words = re.findall(r"[a-z]{3,}", (REPOSITORY / "demo" / "train.jsonl").read_text(encoding="utf-8"))[:5000]
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            row = {"id": f"row_{number}"}
            for column, mean, spread, most in (("dialogue", 236, 0.5, 1000), ("summary", 36, 0.45, 120)):
                length = int(scale * np.clip(generator.lognormal(np.log(mean) - spread**2 / 2, spread), 3, most)) or 1
                row[column] = " ".join(generator.choice(words, length))
            file.write(json.dumps(row) + "\n")


def build_parts(folder: Path, total: int, num_updates: int) -> dict[str, list[str]]:
    """The command of each part."""
    import torch

    model, rows = folder / "model", folder / "rows.jsonl"
    precision = "bf16" if torch.cuda.is_available() else "no"

    def train(kind: str, size: int | str, name: str, *more: object) -> list[str]:
        words = [
            f"train_{kind}.py", "--model_name_or_path", model, "--train_file", rows, "--output_dir", folder / name,
            "--total_train_batch_size", total, "--per_device_train_batch_size", size, "--logging_steps", 1,
            "--max_train_steps", num_updates, "--mixed_precision", precision, "--overwrite_output_dir", *more,
        ]  # fmt: skip
        return [str(word) for word in words]

    parts = {}
    for kind in ("full", "lora"):
        parts |= {f"{kind}_{size}": train(kind, size, f"{kind}_{size}") for size in ("auto", 16, 64)}
        parts[f"{kind}_64_compiled"] = train(kind, 64, f"{kind}_64_compiled", "--compile", "true")
    parts["preflight_64"] = train("full", 64, "preflight", "--preflight")
    for number in (1, 2):
        parts[f"deterministic_{number}"] = train("full", 64, f"deterministic_{number}", "--deterministic", "true")
    for stage in (2, 3):
        config = f"accelerate_configs/deepspeed_zero{stage}.yaml"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "1"]
        parts[f"zero{stage}_64"] = launcher + train("full", 64, f"zero{stage}_64")
    trainer = ["tests/benchmarks/run_trainer.py", str(model), str(rows), "full"]
    for sampling in ("random", "group_by_length", "batch_rebalance"):
        for size in (16, 64):
            parts[f"trainer_{sampling}_{size}"] = [
                *trainer,
                sampling,
                str(num_updates),
                precision,
                str(size),
                str(total),
            ]
    parts["trainer_compiled_64"] = [*parts["trainer_batch_rebalance_64"], "compile"]
    worker = ["tests/benchmarks/gpu.py", str(folder), "--part"]
    names = ("profile", "generate_bf16", "generate_fp32", "generate_bf16_4_beams")
    return parts | {name: [*worker, name] for name in names}


def run_part(name: str, words: list[str], folder: Path) -> dict:
    """Its figures, or why there are none."""
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return {"part": name, "left_out": "deepspeed is not installed"}
    started, limit = time.perf_counter(), SECONDS_TO_COMPILE if "compiled" in name else SECONDS
    process = subprocess.Popen(
        [sys.executable, *words], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started, which would keep the GPU
        process.communicate()
        return {"part": name, "left_out": f"not done within {limit} s"}
    result = {"part": name, "seconds": time.perf_counter() - started}
    if process.returncode:
        return result | {"left_out": (errors.strip().splitlines() or ["no output"])[-1][-300:]}
    if name.startswith("preflight"):
        number, unit = re.search(r"gradient being computed, the sum +([\d.,]+) (GB|MB)", output).groups()
        return result | {"estimated_bytes": float(number.replace(",", "")) * {"GB": 1e9, "MB": 1e6}[unit]}
    if "--output_dir" in words:
        return result | read_training(folder / name)
    return result | json.loads(output.splitlines()[-1])


def read_training(folder: Path) -> dict:
    """Speed without the first update, which plans and allocates."""
    from utils.files import describe_file

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steady = [line for line in lines if line["split"] == "train"][1:]
    seconds = sum(line["num_examples"] / line["samples_per_second"] for line in steady)
    manifest = json.loads((folder / "run_manifest.json").read_text())
    return {
        "samples_per_second": sum(line["num_examples"] for line in steady) / seconds,
        "peak_memory_mib": max(line["peak_memory_mib"] for line in steady),
        "micro_batches_per_update": float(np.mean([line["micro_batches_per_update"] for line in steady])),
        "per_device_train_batch_size": manifest["settings"]["per_device_train_batch_size"],
        "weights": {path.name: describe_file(path)["sha256"] for path in sorted(folder.glob("*.safetensors"))},
    }


def profile(folder: Path) -> dict:
    """Kernels of an update in micro-batches of 64, and the share of its time in which the GPU computes."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    import utils.training.loop

    train_step, calls, figures = utils.training.loop.train_step, [], {}

    def watch(*arguments):
        calls.append(1)
        if len(calls) < 3 or not torch.cuda.is_available():
            return train_step(*arguments)
        torch.cuda.synchronize()
        started = time.perf_counter()
        with record(activities=[ProfilerActivity.CUDA]) as recorded:
            result = train_step(*arguments)
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        kernels = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
        figures.update(num_kernels=len(kernels), update_seconds=seconds, gpu_busy_seconds=busy)
        return result

    utils.training.loop.train_step = watch
    import train_full
    from utils.config import TrainingConfig

    train_full.main(TrainingConfig(
        model_name_or_path=str(folder / "model"), train_file=str(folder / "rows.jsonl"), max_train_steps=3,
        output_dir=str(folder / "profile"), per_device_train_batch_size=64, overwrite_output_dir=True,
    ))  # fmt: skip
    return figures or {"left_out": "no GPU"}


def generate(folder: Path, name: str) -> dict:
    """Distinct prompts to texts of 40 tokens: random weights do not end one earlier."""
    import torch
    from accelerate import Accelerator

    from utils.config import EvaluationConfig
    from utils.generation.summaries import generate_summaries
    from utils.modeling.loading import load_model, load_tokenizer

    model, tokenizer = load_model(str(folder / "model"), "sdpa", torch.float32), load_tokenizer(str(folder / "model"))
    config = EvaluationConfig(
        max_new_tokens=40, min_new_tokens=40, num_beams=4 if "beams" in name else 1,
        dtype="fp32" if "fp32" in name else "bf16", output_dir=str(folder / name),
    )  # fmt: skip
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    dialogues = [json.loads(line)["dialogue"] for line in lines[: NUM_PROMPTS + 1]]
    accelerator = Accelerator()
    generate_summaries(accelerator, model, tokenizer, dialogues[:1], config, "first", {}, "")
    started = time.perf_counter()
    summaries = generate_summaries(accelerator, model, tokenizer, dialogues[1:], config, "all", {}, "")
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {"rows_per_second": len(summaries) / seconds, "peak_memory_mib": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--parts", nargs="+", help="these alone")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.output_dir.resolve()
    if arguments.part:
        figures = profile(folder) if arguments.part == "profile" else generate(folder, arguments.part)
        sys.stdout.write("\n" + json.dumps(figures) + "\n")
        return
    is_trial = arguments.shape == "tiny"
    parts = build_parts(folder, 16 if is_trial else TOTAL, arguments.updates)
    if unknown := set(arguments.parts or ()) - parts.keys():
        parser.error(f"no part {min(unknown)}: {', '.join(parts)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", arguments.shape)
    write_rows(folder / "rows.jsonl", 64 if is_trial else NUM_ROWS, 0.1 if is_trial else 1)
    for name in arguments.parts or parts:
        result = run_part(name, parts[name], folder)
        with (folder / "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        figures = {key: round(value, 1) if isinstance(value, float) else value for key, value in result.items()}
        figures.pop("weights", None)
        sys.stdout.write(f"{figures.pop('part'):28} {json.dumps(figures)}\n")
        sys.stdout.flush()
    lines = map(json.loads, (folder / "gpu.jsonl").read_text(encoding="utf-8").splitlines())
    hashes = {line["part"]: line["weights"] for line in lines if "weights" in line}
    if "deterministic_1" in hashes and "deterministic_2" in hashes:
        same = hashes["deterministic_1"] == hashes["deterministic_2"]
        sys.stdout.write(f"--deterministic twice: {'the same' if same else 'other'} bits\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
