"""Run a script whose torch.compile traces functions but makes no kernels of them, which takes a CPU minutes.

torchrun --nproc-per-node 2 tests/without_kernels.py train_full.py --compile true ...
"""

import functools
import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    torch.compile = functools.partial(torch.compile, backend="eager")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
