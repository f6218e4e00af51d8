"""Run a script in a forked process, with a fault or without: one JSON object a line in, one exit status a line out.

    {"argv": ["train_full.py", ...], "log": FILE, "under": FOLDER}               # no fault
    {"argv": [...], "log": FILE, "under": FOLDER, "operation": 7, "error": 0}    # SIGKILL at the 7th operation
    {"argv": [...], "log": FILE, "under": FOLDER, "operation": 7, "error": 28}   # it fails: no space left
    {"argv": [...], "log": FILE, "under": FOLDER, "count_to": FILE}              # operations are counted

A process of its own for each, but the imports, most of a tiny run's time, are done once, here. The answer is the exit
code, or minus the signal's number. inject_faults.py starts this, with faults.c preloaded.
"""

import ctypes
import gc
import json
import os
import runpy
import sys
import traceback
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from warm import import_libraries


def run(order: dict) -> int:
    """In the child: run the script as `python SCRIPT ...` would; returns its exit code."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = order["argv"]
    faults = ctypes.CDLL(None)
    faults.arm_faults(order["under"].encode(), ctypes.c_long(order.get("operation", 0)), order.get("error", 0))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    gc.collect()
    weakref.finalize._exitfunc()  # as at the end of Python, which os._exit leaves out: locks are let go
    if "count_to" in order:
        Path(order["count_to"]).write_text(str(faults.count_operations()))
    return 0


if __name__ == "__main__":
    import_libraries()
    gc.freeze()  # or each fork would go through all of that at its end
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = run(order)
            finally:
                sys.stderr.flush()
                os._exit(code)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()
