"""Run a training script and write how many bytes of memory it took at most, counted from before it loads its model.

python tests/peak_memory_worker.py FOLDER train_full.py --max_train_steps 2 ...      # -> FOLDER/peak_RANK.txt
"""

import ctypes
import functools
import os
import runpy
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils.modeling.loading
import utils.modeling.lora


def read_memory() -> int:
    """Bytes of this process that no file backs: the pages of a mapped file of weights can be taken back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def return_freed_memory():
    """From now on at once, instead of after some more: what is counted is what is in use."""
    ctypes.CDLL(None).malloc_trim(0)  # what a fork has inherited would hide what it allocates
    for threshold in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        ctypes.CDLL(None).mallopt(threshold, 131072)


def main(folder: str, script: str):
    return_freed_memory()
    load_model, taken, ended = utils.modeling.loading.load_model, [], threading.Event()

    def sample():
        while not ended.wait(0.002):
            taken.append(read_memory())

    sampler = threading.Thread(target=sample, daemon=True)

    @functools.wraps(load_model)
    def watched_load_model(*arguments, **keywords):
        if not taken:
            taken.append(read_memory())
            sampler.start()
        return load_model(*arguments, **keywords)

    utils.modeling.loading.load_model = utils.modeling.lora.load_model = watched_load_model
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        ended.set()
        sampler.join()
        peak = max(taken) - taken[0]
        (Path(folder) / f"peak_{os.environ.get('RANK', '0')}.txt").write_text(str(peak))


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    main(sys.argv.pop(0), sys.argv[0])
