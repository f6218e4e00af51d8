"""`--preflight --assume_memory 16GB`: what a GPU that is not here would take.

PyTorch without CUDA cannot compute on FakeTensors of a GPU. Those of the CPU have the same shapes, but the CPU takes
other kernels for some functions, which save other tensors for the backward pass. So these are called as CUDA does.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from accelerate import Accelerator
from torch.nn import functional

from utils.config import TrainingConfig, parse_memory
from utils.execution import fused

CUDA_CONTEXT = 600_000_000  # bytes that CUDA and its libraries take of a GPU before PyTorch does: 0.3 to 0.6 GB
MASK_ALIGNMENT = 8  # elements, of the strides of an attention mask


def estimated_device(accelerator: Accelerator, config: TrainingConfig) -> torch.device:
    return torch.device("cuda") if config.assume_memory else accelerator.device


def assumed_free_memory(config: TrainingConfig) -> int:
    return max(0, parse_memory(config.assume_memory) - CUDA_CONTEXT)


@contextlib.contextmanager
def cuda_kernels() -> Iterator[None]:
    """Attention, dropout and RMSNorm as on a GPU: memory-efficient attention, which alone takes a mask there; dropout
    that keeps a byte an element; RMSNorm that keeps its input and a number a row."""
    # Not a TorchFunctionMode, which is off during loss.backward(), also where that recomputes activations.
    kernels = mock.patch.multiple(functional, scaled_dot_product_attention=attend, dropout=drop, rms_norm=normalize)
    with kernels, mock.patch.object(fused, "draws_slowly", lambda device: False):
        yield


def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = query.new_zeros(attn_mask.shape).masked_fill(attn_mask.logical_not(), -torch.inf)
        attn_mask = attn_mask.to(query.dtype)
        if any(stride % MASK_ALIGNMENT for stride in attn_mask.stride()[:-1]):  # copied in each layer
            num_keys = attn_mask.shape[-1]
            attn_mask = functional.pad(attn_mask, (0, MASK_ALIGNMENT - num_keys % MASK_ALIGNMENT))[..., :num_keys]
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def drop(input, p=0.5, training=True, inplace=False):
    return torch.native_dropout(input, p, training)[0] if training and p else input


class RmsNorm(torch.autograd.Function):
    """Saves for the backward pass what the CUDA kernel saves; on a CPU rms_norm is split into several operators."""

    @staticmethod
    def forward(ctx, input, weight):
        ctx.save_for_backward(input, weight, input.new_empty(input.shape[:-1], dtype=torch.float32))
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx, gradient):
        input, weight, _ = ctx.saved_tensors
        return torch.empty_like(input), torch.empty_like(weight)


def normalize(input, normalized_shape, weight, eps=None):
    return RmsNorm.apply(input, weight)
