"""Each strategy on two CPU processes of one thread: seconds per update, memory of each process, and how far what it
exports is from a one-process run's.

    python tests/benchmarks/compare_strategies.py MODEL TRAIN_FILE [--updates 3] [--output_dir FOLDER]

In fp32 without dropout, updates of 32 examples. The first update is not timed. Memory is a process' peak, in a run of
two updates whose allocator keeps nothing that is freed, less what Python and the libraries take: the peak of process 1
with a model of 0.1 M parameters (process 0's is that of reading the data). Process 0's is taken as training ends,
before it gathers the model for the export. Writes compare_strategies.json, and prints a line for each run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from conftest import relative_difference, write_flan_t5

STRATEGIES = {
    "one process": "one process",
    "ddp": "DDP",
    "deepspeed_zero1": "ZeRO-1",
    "deepspeed_zero2": "ZeRO-2",
    "deepspeed_zero3": "ZeRO-3",
    "deepspeed_zero3_offload": "ZeRO-3, offloaded",
    "fsdp2": "FSDP2",
}
KEEP_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "65536"}
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


def run(
    strategy: str, kind: str, model: Path, train_file: str, num_updates: int, output_dir: Path, **variables: str
) -> dict[str, float]:
    words = [
        f"train_{kind}.py", "--model_name_or_path", model, "--train_file", train_file, "--mixed_precision", "no",
        "--total_train_batch_size", 32, "--max_train_steps", num_updates, "--logging_steps", 1,
        "--learning_rate", 1e-4,
        "--per_device_train_batch_size", 4, "--output_dir", output_dir,
        "--checkpointing_steps", 1000,
        *(["--lora_dropout", 0] if kind == "lora" else []),
    ]  # fmt: skip
    peaks = output_dir.with_suffix(".peaks")
    measured = [REPOSITORY / "tests" / "benchmarks" / "measured.py", peaks]
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    if strategy == "one process":
        command = [sys.executable, *measured]
    elif strategy == "ddp":
        command = [*launcher, *measured]
    elif strategy == "fsdp2":
        settings = yaml.safe_load((REPOSITORY / "accelerate_configs" / "fsdp2.yaml").read_text())["fsdp_config"]
        environment |= {"ACCELERATE_USE_FSDP": "true"} | {name.upper(): str(v) for name, v in settings.items()}
        command = [*launcher, *measured, "tests/fsdp_on_cpu.py"]
    else:
        environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        config = f"accelerate_configs/{strategy}.yaml"
        command = ["accelerate", "launch", "--config_file", config, "--num_processes", 2, "--main_process_port", 0]
        command += measured
    finished = subprocess.run(
        list(map(str, [*command, *words])),
        cwd=REPOSITORY,
        env=os.environ | environment | variables,
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        sys.exit(f"{strategy}, {kind}\n{finished.stderr[-4000:]}")
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()][1:]
    seconds = sum(line["num_examples"] / line["samples_per_second"] for line in lines) / len(lines)
    of_rank = {line["rank"]: line["peak_memory_mib"] for line in map(json.loads, peaks.read_text().splitlines())}
    of_rank[0] = lines[-1]["peak_memory_mib"]
    return {"seconds_per_update": seconds, "peak_memory_mib": [of_rank[rank] for rank in sorted(of_rank)]}


def read_weights(kind: str, output_dir: Path) -> dict:
    return load_file(output_dir / WEIGHTS[kind])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train_file")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent)
    arguments = parser.parse_args()
    train_file, results = str(Path(arguments.train_file).resolve()), {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, tiny = folder / "model", write_flan_t5(folder / "tiny", dropout_rate=0.0)
        shutil.copytree(arguments.model, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))
        for kind in WEIGHTS:
            alone = folder / f"one process {kind}"
            for strategy, name in STRATEGIES.items():
                of_tiny = folder / f"tiny {strategy} {kind}"
                multiple = "ddp" if strategy == "one process" else strategy
                libraries = run(multiple, kind, tiny, train_file, 2, of_tiny, **KEEP_NOTHING)["peak_memory_mib"][1]
                whole = run(strategy, kind, model, train_file, 2, folder / f"memory {strategy} {kind}", **KEEP_NOTHING)
                result = run(strategy, kind, model, train_file, arguments.updates, folder / f"{strategy} {kind}")
                result["peak_memory_mib"] = [peak - libraries for peak in whole["peak_memory_mib"]]
                ours, theirs = (read_weights(kind, path) for path in (folder / f"{strategy} {kind}", alone))
                result["largest_difference"] = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
                result["relative_difference"] = relative_difference(ours, theirs)
                results[f"{name}, {kind}"] = result
                memory = " and ".join(f"{mib:.0f}" for mib in result["peak_memory_mib"])
                sys.stdout.write(
                    f"| {name} | {kind} | {result['seconds_per_update']:.1f} | {memory} "
                    f"| {result['largest_difference']:.0e} |\n"
                )
                sys.stdout.flush()
    (arguments.output_dir / "compare_strategies.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
