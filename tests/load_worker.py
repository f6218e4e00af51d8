"""Print how many MiB loading a model takes on this process: `load_worker.py MODEL`, under any launcher."""

import json
import re
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peak_memory_worker import return_freed_memory

from utils.config import TrainingConfig
from utils.execution.sharding import gather_tensor
from utils.execution.strategies import start_accelerator
from utils.launch.processes import leave_process_group
from utils.modeling.loading import load_model
from utils.modeling.shapes import count_parameters


def peak() -> float:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


if __name__ == "__main__":
    return_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        accelerator = start_accelerator(TrainingConfig(mixed_precision="no", output_dir=folder))
        tiny = load_model(sys.argv[1] + "-tiny", "sdpa", torch.float32)  # the libraries' own share
        accelerator.wait_for_everyone()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        before = peak()
        model = load_model(sys.argv[1], "sdpa", torch.float32)
        for parameter in model.parameters():  # what is read from a mapped file counts once it has been looked at
            parameter.detach().sum()
        took = peak() - before
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        report = {
            "rank": accelerator.process_index,
            "took_mib": took,
            "num_parameters": count_parameters(model)[0],
            "head": float(gather_tensor(head).double().sum()),
            "embedding": float(gather_tensor(embedding).double().sum()),
        }
        sys.stdout.write(f"REPORT {json.dumps(report)}\n")
        sys.stdout.flush()
        accelerator.wait_for_everyone()
        leave_process_group()
