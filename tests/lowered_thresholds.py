"""Run a script with the libraries' thresholds set so low that a tiny model meets them: the one place that names them.

    torchrun --nproc-per-node 2 tests/lowered_thresholds.py train_full.py ...

With its defaults ZeRO-3 partitions no weight under 100,000 elements and fetches none ahead, ZeRO-1 and 2 send all
gradients in one bucket, and so does DDP: of a model as small as the tests' nothing would be sharded.
"""

import functools
import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.execution import strategies

DEEPSPEED = {  # in numbers of parameters
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 20_000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 2_000,
    "reduce_bucket_size": 2_000,
    "allgather_bucket_size": 2_000,
}
DDP = {"bucket_cap_mb": 0.01}

if __name__ == "__main__":
    strategies.BUCKETS |= DEEPSPEED
    torch.nn.parallel.DistributedDataParallel.__init__ = functools.partialmethod(
        torch.nn.parallel.DistributedDataParallel.__init__, **DDP
    )
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
