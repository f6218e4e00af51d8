"""Kill a LoRA training that merges, and an evaluation, at each file operation in turn, and repeat the command.

    python tests/kill_at_every_operation.py [--every 1] [--first 1]

An operation is what Python does to the files under the run's folders: open to write, rename, remove, make, flush. The
process is killed before the n-th, the same command must then end with 0, and leave the same files with the same bytes
as a run that was never killed; metrics.jsonl, which holds times, the same losses. Prints what was found.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import make_rows, write_flan_t5, write_rows
from kill_many_times import list_files, make_command, open_worker, read_record

from utils.launch.locks import LOCK

TIMED = ("metrics.jsonl", "loss_curve.png", "state.json", "manifest.json")  # hold times, or hashes of what does


def make_commands(folder: Path) -> dict[str, list[str]]:
    merge = f"--merge_into={folder / 'run' / 'merged'}"
    evaluation = [
        "evaluate_rouge.py", f"--models=model={folder / 'model'}", f"--test_file={folder / 'validation.jsonl'}",
        "--max_new_tokens=4", "--per_device_eval_batch_size=1", f"--output_dir={folder / 'run' / 'out'}",
    ]  # fmt: skip
    training = make_command("lora", folder, folder / "run" / "out")
    return {"training and merge": [*training, merge], "evaluation": evaluation}


def compare(run: Path, expected: Path) -> str | None:
    """What differs, if anything."""
    (run / "out" / LOCK).unlink(missing_ok=True)  # an evaluation that was killed at its end
    if list_files(run) != list_files(expected):
        return f"files: {set(list_files(run)) ^ set(list_files(expected))}"
    for name in list_files(expected):
        path = expected / name
        if path.is_file() and path.name not in TIMED and path.read_bytes() != (run / name).read_bytes():
            return f"{name} has other bytes"
    for path in expected.rglob("metrics.jsonl"):
        if read_record(path.parent) != read_record(run / path.parent.relative_to(expected)):
            return "metrics.jsonl has other losses"
    return None


def kill_at_every_operation(folder: Path, every: int, first: int) -> tuple[Counter, list[str]]:
    """How often what happened, and each harm that was done."""
    write_flan_t5(folder / "model")
    write_rows(folder / "train.jsonl", make_rows(40))
    write_rows(folder / "validation.jsonl", make_rows(9, seed=1))
    counts, harms = Counter(), []
    with open_worker() as run:
        for kind, command in make_commands(folder).items():
            order = {"argv": command, "log": str(folder / "log"), "under": str(folder / "run")}
            assert run(order | {"count_to": str(folder / "count")}) == 0, (folder / "log").read_text()
            (folder / "run").rename(folder / kind)
            num_operations = int((folder / "count").read_text())
            for number in range(first, num_operations + 1, every):
                (folder / "log").unlink()
                status = run(order | {"operation": number})
                counts[f"{kind}: killed"] += status == -signal.SIGKILL
                # A thread writes checkpoints: how many operations there are differs a little from run to run.
                counts[f"{kind}: ended before the operation"] += status == 0
                status = run(order)
                harm = compare(folder / "run", folder / kind)
                if status and not harm and "holds a run already" in last_line(folder / "log"):
                    counts[f"{kind}: refused, since it had ended"] += 1
                elif status or harm:
                    harms.append(f"{kind}, operation {number}: {harm or last_line(folder / 'log')}")
                shutil.rmtree(folder / "run")
    return counts, harms


def last_line(log: Path) -> str:
    return log.read_text().strip().splitlines()[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="kill at each n-th operation only")
    parser.add_argument("--first", type=int, default=1, help="operation to begin with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        counts, harms = kill_at_every_operation(Path(folder), options.every, options.first)
    sys.stdout.writelines(f"{count:5d}  {what}\n" for what, count in counts.items())
    sys.stdout.writelines(f"HARM   {harm}\n" for harm in harms)
    sys.stdout.write(f"{len(harms)} did harm, {time.monotonic() - started:.0f} s\n")
    sys.exit(bool(harms))
