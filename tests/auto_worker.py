"""Run a training script with --per_device_train_batch_size auto as on GPUs of which the main process's holds three
examples and the others five. The passes are real; what a GPU would say of its memory is made up.

    torchrun --nproc-per-node 2 tests/auto_worker.py train_full.py ...
"""

import dataclasses
import runpy
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.config import TrainingConfig
from utils.training.resources import batch_size

EXAMPLE, REST = 100, 1000  # bytes
peaks = iter((REST, REST + EXAMPLE, REST + 2 * EXAMPLE, REST + 3 * EXAMPLE))  # of passes with 1, 1, 2 and 3 examples


def choose_batch_size(accelerator: Accelerator, model, data, config: TrainingConfig, remembered: None):
    fits = 3 if accelerator.is_main_process else 5
    needed = REST + (fits + 0.5) * EXAMPLE + batch_size.count_moments(accelerator, model)
    batch_size.measure_memory = lambda accelerator: needed / batch_size.USED_SHARE
    return dataclasses.replace(
        config, per_device_train_batch_size=batch_size.find_batch_size(accelerator, model, data, config)
    )


if __name__ == "__main__":
    torch.cuda.reset_peak_memory_stats = lambda device: None
    torch.cuda.max_memory_allocated = lambda device: next(peaks)
    batch_size.choose_batch_size = choose_batch_size
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
