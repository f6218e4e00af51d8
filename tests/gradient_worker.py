"""Save the gradient of the first optimizer step, as the training loop computes it on the processes it was started on.

torchrun --nproc-per-node 2 tests/gradient_worker.py MODEL TRAIN_FILE TOTAL PER_DEVICE OUTPUT
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.config import TrainingConfig
from utils.data.batching import measure_lengths, plan_steps, select_examples
from utils.data.prefetch import load_batches
from utils.data.rows import load_rows
from utils.data.tokens import tokenize_rows
from utils.execution.passes import unwrap
from utils.execution.strategies import start_accelerator
from utils.launch.processes import leave_process_group
from utils.modeling.loading import load_model, load_tokenizer
from utils.training.step import compute_gradient


def main(model_path: str, train_file: str, total: str, per_device: str, output: str):
    config = TrainingConfig(
        model_name_or_path=model_path, train_file=train_file, mixed_precision="no", output_dir=f"{output}.dir",
        total_train_batch_size=int(total), per_device_train_batch_size=int(per_device),
    )  # fmt: skip
    accelerator = start_accelerator(config)
    data = tokenize_rows(accelerator, load_rows(config, "train"), load_tokenizer(model_path), config, "train")
    model = accelerator.prepare(load_model(model_path, "sdpa", torch.float32))
    model.eval()  # no dropout
    lengths = measure_lengths(data)
    sizes = config.total_train_batch_size, config.per_device_train_batch_size
    world = accelerator.num_processes
    (plan,) = plan_steps(lengths, *sizes, config.seed, accelerator.process_index, world, 1e6, range(1))
    batches = list(load_batches(accelerator, model, data, iter(plan)))
    num_target_tokens = int(lengths[select_examples(len(lengths), sizes[0], config.seed, 0), 1].sum())
    compute_gradient(accelerator, model, batches, num_target_tokens, config)
    if accelerator.is_main_process:
        gradients = {name: p.grad for name, p in unwrap(model).named_parameters()}
        torch.save({"num_processes": world, "gradients": gradients}, output)
    accelerator.wait_for_everyone()  # the launcher ends all when one process fails on its way out


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_process_group()
