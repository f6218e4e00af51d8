"""Kill a training with SIGKILL at random moments, in the middle of writing too, and resume until it is done.

    python tests/kill_many_times.py [--runs 25] [--seed 0]

A tiny full training and a tiny LoRA training in turn. Each is killed one to four times: after a random time, or at a
random call of a random function of the writer. At its end the weights are bit-identical to an uninterrupted
for bit, metrics.jsonl says the same, and the folder holds the same files. Prints how many kills hit where.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import REPOSITORY, make_rows, read_jsonl, write_flan_t5, write_rows
from safetensors.torch import load_file

from utils.launch.output_dir import find_checkpoints
from utils.training.checkpoint_files import verify_checkpoint

# The most calls of each function that a run of ten updates with a checkpoint every two makes, or nearly.
NUM_CALLS = {
    "os.fsync": 45, "Path.rename": 12, "Path.replace": 10, "Path.write_bytes": 8, "Path.write_text": 18, "rmtree": 5,
    "save_file": 15,
}  # fmt: skip
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


@contextmanager
def open_worker():
    """A function that runs kill_worker.py's order and returns the exit status."""
    words = [sys.executable, str(REPOSITORY / "tests" / "kill_worker.py")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=REPOSITORY, env=environment, **pipes) as worker:

        def run(order: dict) -> int:
            worker.stdin.write(json.dumps(order) + "\n")
            worker.stdin.flush()
            return int(worker.stdout.readline())

        yield run
        worker.stdin.close()


def make_command(kind: str, folder: Path, output_dir: Path) -> list[str]:
    return [
        f"train_{kind}.py", f"--model_name_or_path={folder / 'model'}", f"--train_file={folder / 'train.jsonl'}",
        f"--validation_file={folder / 'validation.jsonl'}", f"--output_dir={output_dir}", "--mixed_precision=no",
        "--total_train_batch_size=8", "--per_device_train_batch_size=4", "--max_train_steps=10", "--logging_steps=3",
        "--eval_steps=4", "--checkpointing_steps=2", "--checkpoints_total_limit=2", "--learning_rate=0.01",
        "--resume_from_checkpoint=latest",
    ]  # fmt: skip


def draw_kill(rng: random.Random, seconds: float, number: int) -> dict:
    if number % 2:
        return {"seconds": rng.uniform(0, seconds)}
    point = rng.choice(list(NUM_CALLS))
    moments = ["before", "after"] if point.startswith(("os", "Path.re")) else ["before", "half", "after"]
    moment = rng.choice(moments)
    return {"point": point, "call": rng.randint(1, NUM_CALLS[point]), "moment": moment}


def name_place(kill: dict, output_dir: Path) -> str:
    """Where the kill hit: the function it was drawn for, or what a kill after a time found half done."""
    if "point" in kill:
        return f"{kill['moment']} {kill['point']}"
    if list(output_dir.glob("checkpoints/*.unfinished")) or list(output_dir.glob("*.part")):
        return "after a time, writing"
    if (output_dir / "export.unchecked").exists():
        return "after a time, exporting"
    return "after a time, between" if find_checkpoints(output_dir) else "after a time, before the first checkpoint"


def list_files(output_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(output_dir)) for path in output_dir.rglob("*"))


def read_record(output_dir: Path) -> list[tuple]:
    lines = read_jsonl(output_dir / "metrics.jsonl")
    return [(line["step"], line["split"], line["loss"], line.get("grad_norm")) for line in lines]


def check_same(kind: str, output_dir: Path, never_stopped: Path):
    ours, theirs = (load_file(path / WEIGHTS[kind]) for path in (output_dir, never_stopped))
    assert ours.keys() == theirs.keys(), output_dir
    for name, tensor in theirs.items():
        assert ours[name].equal(tensor), f"{output_dir}: {name} differs"
    assert read_record(output_dir) == read_record(never_stopped), output_dir
    assert list_files(output_dir) == list_files(never_stopped), output_dir


def kill_many_times(folder: Path, num_runs: int, seed: int) -> Counter:
    """How many kills hit where; AssertionError if one did harm, with its run's folder, which is in `folder`."""
    rng = random.Random(seed)
    write_flan_t5(folder / "model")
    write_rows(folder / "train.jsonl", make_rows(40))
    write_rows(folder / "validation.jsonl", make_rows(9, seed=1))
    places, number = Counter(), 0
    with open_worker() as run:
        seconds = {}
        for kind in WEIGHTS:
            order = {"argv": make_command(kind, folder, folder / kind), "log": str(folder / f"{kind}.log")}
            assert run(order) == 0, (folder / f"{kind}.log").read_text()
            started = time.monotonic()
            run(order | {"argv": make_command(kind, folder, folder / "timed" / kind)})
            seconds[kind] = time.monotonic() - started
        for index in range(num_runs):
            kind = list(WEIGHTS)[index % 2]
            output_dir, log = folder / f"run_{index}", folder / f"run_{index}.log"
            order = {"argv": make_command(kind, folder, output_dir), "log": str(log)}
            for _ in range(rng.randint(1, 4)):
                kill = draw_kill(rng, seconds[kind], number)
                number += 1
                status = run(order | kill)
                assert status in (0, -signal.SIGKILL), log.read_text()
                if status == 0:
                    places["none: it was done before"] += 1
                    break
                places[name_place(kill, output_dir)] += 1
                for kind_of_checkpoint in ("step", "best_step"):
                    for checkpoint in find_checkpoints(output_dir, kind_of_checkpoint):
                        verify_checkpoint(checkpoint)
            assert run(order) == 0, log.read_text()
            check_same(kind, output_dir, folder / kind)
    return places


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="trainings, each killed one to four times")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        places = kill_many_times(Path(folder), options.runs, options.seed)
    num_kills = sum(places.values()) - places["none: it was done before"]
    sys.stdout.write(
        f"{options.runs} runs, {num_kills} kills, {time.monotonic() - started:.0f} s: all ended the same\n"
    )
    sys.stdout.writelines(f"{count:5d}  {place}\n" for place, count in sorted(places.items()))
