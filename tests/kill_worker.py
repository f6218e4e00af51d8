"""Train in a forked process that can be killed: one JSON object a line in, one exit status a line out.

    {"argv": ["train_full.py", ...], "log": FILE, "seconds": 1.5}           # SIGKILL after so long, from outside
    {"argv": [...], "log": FILE, "point": "Path.rename", "call": 3, "moment": "half"}  # by itself, at that call
    {"argv": [...], "log": FILE, "under": FOLDER, "operation": 7}           # by itself, before the 7th file operation
    {"argv": [...], "log": FILE, "under": FOLDER, "count_to": FILE}         # not at all, and they are counted
    {"argv": [...], "log": FILE}                                            # not at all

A process of its own for each training, but the imports, most of a tiny run's time, are done once, here. The answer is
the exit code, or minus the signal's number. kill_many_times.py and
kill_at_every_operation.py start this.
"""

import json
import os
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate_rouge  # noqa: F401
import train_full  # noqa: F401  what the children run, imported ahead
import train_lora  # noqa: F401
from utils.training import checkpoint_files

# Where each function of the writer lives. The replace and write_text of others, the export's too, are hit with these.
POINTS = {
    "os.fsync": (os, "fsync"),
    "Path.rename": (Path, "rename"),
    "Path.replace": (Path, "replace"),
    "Path.write_bytes": (Path, "write_bytes"),
    "Path.write_text": (Path, "write_text"),
    "rmtree": (shutil, "rmtree"),
    "save_file": (checkpoint_files, "save_file"),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str, call: int, moment: str):
    """From now on, the n-th call of `point` kills the process: before it did anything, after it, or with half done."""
    owner, name = POINTS[point]
    function, num_calls = getattr(owner, name), 0

    def deadly(*arguments, **keywords):
        nonlocal num_calls
        is_real = name != "rmtree" or Path(arguments[0]).exists()
        num_calls += is_real
        if num_calls != call or not is_real:
            return function(*arguments, **keywords)
        if name == "rmtree" and moment == "half":
            next(path for path in sorted(Path(arguments[0]).rglob("*")) if path.is_file()).unlink()
        elif moment != "before":
            function(*arguments, **keywords)
            path = arguments[1] if name == "save_file" else arguments[0]
            if moment == "half" and (name == "save_file" or name.startswith("write")):
                os.truncate(path, os.stat(path).st_size // 2)
        die()

    setattr(owner, name, deadly)


def count_operations(folder: str, deadly: int | None) -> Callable[[], int]:
    """From now on, count what Python does to files under the folder, and die before the one of this number. Returns a
    function that returns how many there were."""
    count, fsync = 0, os.fsync

    def meet():
        nonlocal count
        count += 1
        if count == deadly:
            die()

    def watch(event: str, arguments: tuple):
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(folder):
                meet()
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"):
            # rmtree gives names relative to an open folder.
            is_relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1
            if is_relative or os.path.abspath(os.fspath(arguments[0])).startswith(folder):
                meet()

    def watched_fsync(descriptor: int):
        meet()
        fsync(descriptor)

    os.fsync = watched_fsync
    sys.addaudithook(watch)
    return lambda: count


def train(order: dict) -> int:
    """In the child: run the script as `python SCRIPT ...` would; returns its exit code."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = order["argv"]
    if "point" in order:
        die_at(order["point"], order["call"], order["moment"])
    if "under" in order:
        count = count_operations(order["under"], order.get("operation"))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        if "count_to" in order:
            Path(order["count_to"]).write_text(str(count()))
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait_or_kill(child: int, seconds: float | None) -> int:
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # of one that has ended it is not heard
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = train(order)
            finally:
                sys.stderr.flush()
                os._exit(code)
        sys.stdout.write(f"{wait_or_kill(child, order.get('seconds'))}\n")
        sys.stdout.flush()
