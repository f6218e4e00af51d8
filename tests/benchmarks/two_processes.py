"""The speed of two processes of one thread each over that of one, as a share of twice as fast.

python tests/benchmarks/two_processes.py MODEL TRAIN_FILE [--repeats 3] [--updates 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def measure(model: str, train_file: str, num_updates: int, num_processes: int) -> float:
    """Samples per second of the updates after the first."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "train_full.py", "--model_name_or_path", model, "--train_file", train_file, "--output_dir", folder,
            "--total_train_batch_size", "128", "--max_train_steps", str(num_updates), "--logging_steps", "1",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run([*launcher, *words], cwd=REPOSITORY, env=environment, capture_output=True, check=True)
        assert json.loads((Path(folder) / "run_manifest.json").read_text())["num_processes"] == num_processes
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()][1:]
    return sum(line["num_examples"] for line in lines) / sum(
        line["num_examples"] / line["samples_per_second"] for line in lines
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train_file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3)
    arguments = parser.parse_args()
    inputs = (str(Path(arguments.model).resolve()), str(Path(arguments.train_file).resolve()), arguments.updates)
    shares = []
    for _ in range(arguments.repeats):
        one, two = (measure(*inputs, num_processes) for num_processes in (1, 2))
        shares.append(two / (2 * one))
        sys.stdout.write(f"one {one:.2f}, two {two:.2f} samples/s: {shares[-1]:.2f} of twice as fast\n")
    sys.stdout.write(f"median {statistics.median(shares):.2f}, {min(shares):.2f} to {max(shares):.2f}\n")


if __name__ == "__main__":
    main()
