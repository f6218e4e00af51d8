"""What fits into GPUs of several sizes, by --preflight's estimate: the table in accelerate_configs/README.md.

python tests/benchmarks/gpu_memory.py        # half an hour on a CPU; takes no weights and no GPU
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoModelForSeq2SeqLM, T5Config

from utils.config import LoraTrainingConfig, TrainingConfig
from utils.execution.fused import fuse
from utils.modeling.lora import add_lora
from utils.training.resources.assumed_gpu import assumed_free_memory
from utils.training.resources.batch_size import estimate_fitting

SIZES = ("8GB", "16GB", "24GB", "40GB", "80GB")
SHAPES = {  # d_model, d_ff, layers, heads of google/flan-t5-*
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}
KINDS = {
    "full": {},
    "full, `--gradient_checkpointing`": {"gradient_checkpointing": True},
    "LoRA": {},
    "LoRA, `--gradient_checkpointing`": {"gradient_checkpointing": True},
    "LoRA, `--load_in_4bit --gradient_checkpointing`": {"load_in_4bit": True, "gradient_checkpointing": True},
}
LENGTHS = np.array([[1024, 128]] * 256)  # tokens of the longest example that the defaults leave, in an update of 256


def build(size: str, config: TrainingConfig) -> torch.nn.Module:
    d_model, d_ff, num_layers, num_heads = SHAPES[size]
    shape = T5Config(
        vocab_size=32128, d_model=d_model, d_ff=d_ff, d_kv=64, num_layers=num_layers, num_decoder_layers=num_layers,
        num_heads=num_heads, feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    is_lora = isinstance(config, LoraTrainingConfig)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(
            shape, dtype=torch.bfloat16 if is_lora else torch.float32, attn_implementation="sdpa"
        )
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.empty_like(head.weight))  # Flan-T5's is its own
    if is_lora:
        model = add_lora(model, config)
    fuse(model)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def main():
    accelerator = Accelerator(cpu=True)
    sys.stdout.write(f"| flan-t5 | {' | '.join(SIZES)} |\n|---|{'--:|' * len(SIZES)}\n")
    for model_size in SHAPES:
        for kind, settings in KINDS.items():
            config_class = LoraTrainingConfig if kind.startswith("LoRA") else TrainingConfig
            config = config_class(**settings, preflight=True, assume_memory=SIZES[-1])
            model = build(model_size, config)
            free = (assumed_free_memory(dataclasses.replace(config, assume_memory=size)) for size in SIZES)
            cells = (str(estimate_fitting(accelerator, model, LENGTHS, config, memory) or "") for memory in free)
            sys.stdout.write(f"| {model_size}, {kind} | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
