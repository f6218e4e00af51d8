"""Measure on a GPU, without a network, what the READMEs claim of one: training and generation beside Seq2SeqTrainer's,
memory and its estimate, launches, attention's kernels, compiling, the same bits. Not yet run on a GPU.

    python tests/benchmarks/gpu.py OUTPUT_DIR                                   # flan-t5-base's shape, random weights
    python tests/benchmarks/gpu.py OUTPUT_DIR --shape tiny --updates 2          # whether it runs, on a CPU
    python tests/benchmarks/gpu.py OUTPUT_DIR --parts full_64 generate_bf16     # some parts alone, again

Each part is a process of its own, may take 90 s, or 240 if it compiles, and adds a line to OUTPUT_DIR/gpu.jsonl as it
ends. A part whose package is not installed, or that fails, says so in its line. After --minutes no part is begun; the
same command then goes on with the parts that have no line yet. At the end all lines are in gpu.md and gpu.png. Rows
have DialogSum's lengths and random words; random weights end no text before its last token.
"""

import argparse
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
    """The command of each part, what matters most first."""
    import torch

    model, rows, test_rows = folder / "model", folder / "rows.csv", folder / "test_rows.csv"
    precision = "bf16" if torch.cuda.is_available() else "no"
    parts = {"machine": ["tests/benchmarks/gpu.py", folder, "--part", "machine"]}

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

    def generate(name: str, way: str, num_beams: int, rows: str | int, dtype: str):
        words = ["tests/benchmarks/run_generation.py", model, test_rows, way, num_beams, rows, dtype, 40]
        parts[f"generate_{name}"] = words

    for kind in ("full", "lora"):
        train(f"{kind}_auto", kind, "auto")
        train(f"{kind}_64", kind, 64)
    train_with_trainer("full", "batch_rebalance", 64)
    generate("bf16", "ours", 1, "distinct", "bf16")
    parts["profile"] = ["tests/benchmarks/gpu.py", folder, "--part", "profile"]
    parts["attention"] = ["tests/benchmarks/gpu.py", folder, "--part", "attention"]
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


def run_part(name: str, words: list[str], folder: Path) -> dict:
    """Its figures, or why there are none."""
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return {"left_out": "deepspeed is not installed"}
    shutil.rmtree(folder / name, ignore_errors=True)
    if name == "deterministic_resumed":
        (folder / name).mkdir()
        for checkpoint in sorted((folder / "deterministic_1" / "checkpoints").glob("step_*"))[:1]:
            shutil.copytree(checkpoint, folder / name / "checkpoints" / checkpoint.name)
    started, limit = time.perf_counter(), SECONDS_TO_COMPILE if "compile" in name else SECONDS
    process = subprocess.Popen(
        [sys.executable, *words], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started, which would keep the GPU
        process.communicate()
        return {"left_out": f"not done within {limit} s"}
    result = {"seconds": time.perf_counter() - started}
    if process.returncode:
        return result | {"left_out": (errors.strip().splitlines() or ["no output"])[-1][-300:]}
    if name == "evaluate":
        return result
    if name.startswith("preflight"):
        number, unit = re.search(r"gradient being computed, the sum +([\d.,]+) (GB|MB)", output).groups()
        return result | {"estimated_bytes": float(number.replace(",", "")) * {"GB": 1e9, "MB": 1e6}[unit]}
    if "--logging_steps" in words:
        return result | read_training(folder / name) | {"times": errors.splitlines()[-1]}
    figures = json.loads(output.splitlines()[-1])
    if name.startswith("generate"):  # the others are of texts that end by themselves
        figures = {key: figures["figures"][key] for key in ("rows_per_second", "peak_memory_mib")}
    return figures | result


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


def describe_machine(folder: Path) -> dict:
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


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
        model_name_or_path=str(folder / "model"), train_file=str(folder / "rows.csv"), max_train_steps=3,
        output_dir=str(folder / "profile"), per_device_train_batch_size=64, overwrite_output_dir=True,
    ))  # fmt: skip
    return figures or {"left_out": "no GPU"}


def time_attention(query, key, value, bias, kernel) -> float:
    """Milliseconds forward and backward, the mean of 20 times."""
    import torch
    from torch.nn.attention import sdpa_kernel

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(23):
        if number == 3:  # what is planned and allocated has been
            start.record()
        with sdpa_kernel(kernel):
            attended = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=bias.expand(len(query), -1, -1, -1), dropout_p=0.1, scale=1.0
            )
        attended.sum().backward()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 20


def compare_attention(folder: Path) -> dict:
    """Milliseconds of the encoder's attention forward and backward by PyTorch's kernels: bf16, 64 examples of 256
    tokens, 12 heads of 64, dropout as in training, a position bias that is trained; one bias for all examples, and one
    an example as where some are padded. FlashAttention takes no bias, and flex_attention no dropout."""
    import torch
    from torch.nn.attention import SDPBackend

    if not torch.cuda.is_available():
        return {"left_out": "no GPU"}
    settings = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.randn(64, 12, 256, 64, **settings) for _ in range(3))
    figures = {}
    for name, num_biases in (("one bias", 1), ("a bias an example", 64)):
        bias = torch.randn(num_biases, 12, 256, 256, **settings)
        for kernel in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
            try:
                figures[f"{kernel.name}, {name}"] = time_attention(query, key, value, bias, kernel)
            except RuntimeError as error:
                figures[f"{kernel.name}, {name}"] = str(error).splitlines()[0]
    return figures


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
    if estimated and peak and results.get("machine", {}).get("device") != "no GPU":  # whose peak is the process's
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
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--parts", nargs="+", help="these alone, also if they have a line already")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder, started = arguments.output_dir.resolve(), time.monotonic()
    if arguments.part:
        measure = {"machine": describe_machine, "profile": profile, "attention": compare_attention}[arguments.part]
        sys.stdout.write("\n" + json.dumps(measure(folder)) + "\n")
        return
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
        if time.monotonic() - started > 60 * arguments.minutes:
            sys.stdout.write(f"{arguments.minutes:g} minutes are over: {name} and what follows has no line yet\n")
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
    main()
