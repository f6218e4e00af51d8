"""Look into a GPU at work and print the figures as JSON: parts of gpu.py, which makes MODEL and TRAIN_FILE.

python tests/benchmarks/profile_gpu.py machine
python tests/benchmarks/profile_gpu.py update MODEL TRAIN_FILE OUTPUT_DIR
python tests/benchmarks/profile_gpu.py attention
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train_full
import utils.training.loop
from utils.config import TrainingConfig
from utils.launch.script import configure_gpus


def describe_machine() -> dict:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def profile_update(model: str, train_file: str, output_dir: str) -> dict:
    """Kernels of an update in micro-batches of 64, and the share of its time in which the GPU computes."""
    if not torch.cuda.is_available():
        return {"left_out": "no GPU"}
    train_step, calls, figures = utils.training.loop.train_step, [], {}

    def watch(*arguments):
        calls.append(1)
        if len(calls) == 2:  # the profiler itself starts slowly the first time
            with record(activities=[ProfilerActivity.CUDA]):
                torch.cuda.synchronize()
        if len(calls) < 3:
            return train_step(*arguments)
        with record(activities=[ProfilerActivity.CUDA]) as recorded:
            torch.cuda.synchronize()
            started = time.perf_counter()
            result = train_step(*arguments)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        events = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [event for event in events if not event.name.startswith(("Memcpy", "Memset"))]
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
        figures.update(num_kernels=len(kernels), update_seconds=seconds, gpu_busy_seconds=busy)
        return result

    utils.training.loop.train_step = watch
    config = TrainingConfig(
        model_name_or_path=model, train_file=train_file, max_train_steps=3, output_dir=output_dir,
        per_device_train_batch_size=64, overwrite_output_dir=True,
    )  # fmt: skip
    configure_gpus(config)
    train_full.main(config)
    return figures


def compare_attention() -> dict:
    """Milliseconds of the encoder's attention forward and backward by PyTorch's kernels: bf16, 64 examples of 256
    tokens, 12 heads of 64, dropout as in training, a position bias that is trained; with one bias shared by all
    examples, or one per example, as with padding. FlashAttention takes no bias, cuDNN's attention none that is
    trained, and flex_attention no dropout."""
    if not torch.cuda.is_available():
        return {"left_out": "no GPU"}
    settings = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.randn(64, 12, 256, 64, **settings) for _ in range(3))
    figures = {}
    for name, num_biases in (("one bias", 1), ("a bias per example", 64)):
        bias = torch.randn(num_biases, 12, 256, 256, **settings)
        for kernel in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
            try:
                figures[f"{kernel.name}, {name}"] = time_attention(query, key, value, bias, kernel)
            except RuntimeError as error:
                figures[f"{kernel.name}, {name}"] = str(error).splitlines()[0]
    return figures


def time_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, kernel: SDPBackend
) -> float:
    """Milliseconds forward and backward, the mean of 20 times."""
    gradient = torch.randn_like(query)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(23):
        if number == 3:  # warm-up is over
            start.record()
        with sdpa_kernel(kernel):
            mask = bias.expand(len(query), -1, -1, -1)
            attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.1, scale=1.0)
        torch.autograd.grad(attended, (query, key, value, bias), gradient)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 20


if __name__ == "__main__":
    measure = {"machine": describe_machine, "update": profile_update, "attention": compare_attention}[sys.argv[1]]
    sys.stdout.write("\n" + json.dumps(measure(*sys.argv[2:])) + "\n")
