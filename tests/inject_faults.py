"""Kill a training, a merge, an evaluation and summarize.py at each of their file operations, let the operation fail,
or take the power away; then repeat the command.

    python tests/inject_faults.py [--fault kill EIO ENOSPC power] [--every 1] [--first 1]

An operation is what the process, whatever library in it, does to the files of the run and to the cache of tokens: open
to write, write, rename, remove, make, truncate, flush. faults.c, which gcc makes, is preloaded and counts them.

    kill     SIGKILL before the n-th operation, a write's first half done; then before the n-th of the repeated run
    EIO      the n-th operation fails
    ENOSPC   the n-th operation fails, and so do all after it that need room
    power    SIGKILL, and an ext4 file system is set back to what had reached its disk (for root alone)

A fault that does not kill must end with a line and no traceback, or be survived; where a checkpoint or the best model
is lost, with a warning. Then the same command must end with 0, and leave the same files with the same bytes as a run
without a fault; metrics.jsonl, which holds times, the same losses. Prints a table.
"""

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import REPOSITORY, make_rows, write_flan_t5, write_rows
from helpers import read_record

ERRORS = {"kill": 0, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "power": 0}
TIMED = ("metrics.jsonl", "loss_curve.png", "state.json", "manifest.json")  # hold times, or hashes of what does
DISK_SIZE = 32 * 2**20


@contextmanager
def open_worker(folder: Path):
    """A function that runs fault_worker.py's order and returns the exit status. Tokens are cached in folder/run."""
    library = folder / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, REPOSITORY / "tests" / "faults.c", "-ldl"], check=True)
    words = [sys.executable, str(REPOSITORY / "tests" / "fault_worker.py")]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "LD_PRELOAD": str(library), "HF_DATASETS_CACHE": str(folder / "run" / "cache"),
        "DS_ACCELERATOR": "cpu",  # DeepSpeed says on stdout that it has found no other
    }  # fmt: skip
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=REPOSITORY, env=environment, **pipes) as worker:

        def run(order: dict) -> int:
            worker.stdin.write(json.dumps(order) + "\n")
            worker.stdin.flush()
            return int(worker.stdout.readline())

        yield run
        worker.stdin.close()


def make_commands(folder: Path) -> dict[str, list[str]]:
    training = [
        f"--model_name_or_path={folder / 'model'}", f"--train_file={folder / 'train.jsonl'}",
        f"--validation_file={folder / 'validation.jsonl'}", f"--output_dir={folder / 'run' / 'out'}",
        "--mixed_precision=no", "--total_train_batch_size=8", "--per_device_train_batch_size=4", "--max_train_steps=6",
        "--logging_steps=3", "--eval_steps=3", "--checkpointing_steps=2", "--checkpoints_total_limit=2",
        "--learning_rate=0.01", "--resume_from_checkpoint=latest",
    ]  # fmt: skip
    evaluation = [
        f"--models=model={folder / 'model'}", f"--test_file={folder / 'validation.jsonl'}", "--max_new_tokens=4",
        "--per_device_eval_batch_size=1", f"--output_dir={folder / 'run' / 'out'}",
    ]  # fmt: skip
    summaries = [
        f"--model={folder / 'model'}", f"--input_file={folder / 'validation.jsonl'}", "--summary_column=generated",
        "--max_new_tokens=4", "--per_device_eval_batch_size=1", f"--output_file={folder / 'run' / 'out.csv'}",
    ]  # fmt: skip
    return {
        "full": ["train_full.py", *training, "--load_best_model_at_end=true"],
        "LoRA and merge": ["train_lora.py", *training, f"--merge_into={folder / 'run' / 'merged'}"],
        "evaluation": ["evaluate_rouge.py", *evaluation],
        "summaries": ["summarize.py", *summaries],
    }


class PlainFolder:
    """Where a run writes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self):
        self.folder.mkdir()
        return self

    def __exit__(self, *exception):
        shutil.rmtree(self.folder)


class LostPower(PlainFolder):
    """An ext4 file system, as a power loss leaves it."""

    def __enter__(self):
        super().__enter__()
        self.image, self.copy = self.folder.with_suffix(".image"), self.folder.with_suffix(".copy")
        with self.image.open("wb") as file:
            file.truncate(DISK_SIZE)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True)
        subprocess.run(["mount", "-o", "loop", self.image, self.folder], check=True)
        return self

    def lose(self):
        shutil.copyfile(self.image, self.copy)
        subprocess.run(["umount", self.folder], check=True)
        subprocess.run(["mount", "-o", "loop", self.copy, self.folder], check=True)

    def __exit__(self, *exception):
        subprocess.run(["umount", self.folder], check=True)
        self.folder.rmdir()


def list_files(folder: Path, left_out: set[str]) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(path) for path in paths if not left_out & set(path.parts))


def compare(run: Path, expected: Path, fault: str, warnings: str) -> str | None:
    """What differs, if anything, but for what the warnings say."""
    left_out = {"cache", "lost+found"}
    if "checkpoint could not be written" in warnings or "could not be removed" in warnings:
        left_out.add("checkpoints")
    if "the best model, of step" in warnings:
        left_out |= {"model.safetensors", "run_manifest.json"}  # which holds its hash
    names = list_files(expected, left_out)
    if list_files(run, left_out) != names:
        return f"files: {sorted(set(list_files(run, left_out)) ^ set(names))}"
    for name in names:
        path = expected / name
        if path.is_file() and path.name not in TIMED and path.read_bytes() != (run / name).read_bytes():
            return f"{name} has other bytes"
        # A checkpoint that was written because a line could not be holds the line's updates in its state.
        is_behind = fault in ("EIO", "ENOSPC") and "checkpoints" in path.parts
        if (
            path.name == "metrics.jsonl"
            and not is_behind
            and read_record(path.parent) != read_record((run / name).parent)
        ):
            return f"{name} has other losses"
    return None


def inject(
    run: Callable[[dict], int], order: dict, fault: str, number: int, folder: Path, expected: Path, counts: Counter
) -> str | None:
    """One fault, or two kills, and the command repeated; the harm that was done, if any."""
    log = Path(order["log"])
    log.unlink(missing_ok=True)
    faulty = order | {"operation": number, "error": ERRORS[fault]}
    with LostPower(folder) if fault == "power" else PlainFolder(folder) as place:
        for _ in range(1 + (fault == "kill")):
            status = run(faulty)
            counts[{0: "survived", 2: "ended with a line", -signal.SIGKILL: "killed"}.get(status, "failed")] += 1
            if fault == "power":
                place.lose()
        text = log.read_text()
        if "Traceback" in text or status not in (0, 2, -signal.SIGKILL):
            return f"exit code {status}: {text.strip().splitlines()[-1]}"
        if again := run(order):
            return f"the repeated command ended with {again}: {log.read_text().strip().splitlines()[-1]}"
        return compare(folder, expected, fault, text if fault in ("EIO", "ENOSPC") and status == 0 else "")


def inject_faults(folder: Path, faults: dict[str, tuple[int, int]], commands: list[str]) -> tuple[dict, list]:
    """(how often what happened, by command and fault; each harm that was done).

    Args:
        faults: the first operation that each happens at, and the distance to the next.
    """
    write_flan_t5(folder / "model")
    write_rows(folder / "train.jsonl", make_rows(40))
    write_rows(folder / "validation.jsonl", make_rows(9, seed=1))
    table, harms = {}, []
    with open_worker(folder) as run:
        for name in commands:
            order = {"argv": make_commands(folder)[name], "log": str(folder / "log"), "under": str(folder / "run")}
            (folder / "run").mkdir()
            assert run(order | {"count_to": str(folder / "count")}) == 0, (folder / "log").read_text()
            (folder / "run").rename(folder / name)
            num_operations = int((folder / "count").read_text())
            for fault, (first, every) in faults.items():
                table[name, fault] = counts = Counter({"operations": num_operations})
                for number in range(first, num_operations + 1, every):
                    counts["runs"] += 1
                    harm = inject(run, order, fault, number, folder / "run", folder / name, counts)
                    if harm:
                        harms.append(f"{name}, {fault} at operation {number}: {harm}")
                        sys.stderr.write(f"{harms[-1]}\n")
    return table, harms


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", nargs="+", choices=ERRORS, default=list(ERRORS))
    parser.add_argument("--command", nargs="+", default=list(make_commands(Path())))
    parser.add_argument("--every", type=int, default=1, help="only each n-th operation")
    parser.add_argument("--first", type=int, default=1, help="operation to begin with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        faults = dict.fromkeys(options.fault, (options.first, options.every))
        table, harms = inject_faults(Path(folder), faults, options.command)
    columns = ("operations", "runs", "killed", "ended with a line", "survived", "failed")
    sys.stdout.write(f"| command | fault | {' | '.join(columns)} |\n|---|---|{'--:|' * len(columns)}\n")
    for (name, fault), counts in table.items():
        sys.stdout.write(f"| {name} | {fault} | {' | '.join(str(counts[column]) for column in columns)} |\n")
    sys.stdout.writelines(f"HARM   {harm}\n" for harm in harms)
    sys.stdout.write(f"{len(harms)} did harm, {time.monotonic() - started:.0f} s\n")
    sys.exit(bool(harms))
