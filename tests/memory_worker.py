"""Train with a model that refuses large inputs on one process; save what each process met, in rank_0.json and so on.

torchrun --nproc-per-node 2 tests/memory_worker.py MODEL TRAIN_FILE OUTPUT_DIR RANK TOKENS_AT_FIRST TOKENS_LATER

The process RANK is short of memory: it holds TOKENS_AT_FIRST source tokens, padding included, until a batch size is
found, and TOKENS_LATER from then on.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
from transformers import T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_full
import utils.modeling.strategies
import utils.training.batch_size
import utils.training.loop
import utils.training.step
from utils.config import TrainingConfig
from utils.data.micro_batches import LAUNCH_COSTS
from utils.launch.processes import leave_process_group

SECONDS = 90  # of about 10: a process that waits in vain says where, and ends


def main(model_path: str, train_file: str, output_dir: str, short_rank: str, tokens_at_first: str, tokens_later: str):
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    rank = os.environ["RANK"]
    met = {"batch_size": None, "num_turns": [], "refused_turns": []}
    turn = 0
    forward = T5ForConditionalGeneration.forward
    find_batch_size, compute_gradient = (
        utils.training.batch_size.find_batch_size,
        utils.training.step.compute_gradient,
    )

    def limited_forward(model, input_ids=None, **inputs):
        nonlocal turn
        turn += 1
        limit = int(tokens_at_first if met["batch_size"] is None else tokens_later)
        if rank == short_rank and input_ids.numel() > limit:
            if met["batch_size"]:
                met["refused_turns"].append(turn)
            raise torch.OutOfMemoryError(f"{input_ids.numel()} tokens")
        return forward(model, input_ids=input_ids, **inputs)

    def watched_find_batch_size(*arguments):
        met["batch_size"] = find_batch_size(*arguments)
        return met["batch_size"]

    def watched_compute_gradient(accelerator, model, micro_batches, *arguments, **options):
        nonlocal turn
        turn = 0
        met["num_turns"].append(len(micro_batches))
        return compute_gradient(accelerator, model, micro_batches, *arguments, **options)

    utils.modeling.strategies.check_auto = lambda accelerator, config: None  # the CPU stands for a GPU
    LAUNCH_COSTS["cpu"] = LAUNCH_COSTS["cuda"]
    T5ForConditionalGeneration.forward = limited_forward
    utils.training.loop.find_batch_size = watched_find_batch_size
    utils.training.step.compute_gradient = watched_compute_gradient
    config = TrainingConfig(
        model_name_or_path=model_path, train_file=train_file, output_dir=output_dir, total_train_batch_size=20,
        per_device_train_batch_size="auto", mixed_precision="no", logging_steps=1, learning_rate=1e-4,
    )  # fmt: skip
    train_full.main(config)
    (Path(output_dir) / f"rank_{rank}.json").write_text(json.dumps(met))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_process_group()
