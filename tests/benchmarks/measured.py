"""Run a script and append this process' rank and most memory to a file: `measured.py FILE SCRIPT ...`."""

import json
import os
import resource
import runpy
import sys

if __name__ == "__main__":
    path, sys.argv = sys.argv[1], sys.argv[2:]
    sys.path.insert(0, os.getcwd())
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"rank": int(os.environ.get("RANK", "0")), "peak_memory_mib": peak}) + "\n")
