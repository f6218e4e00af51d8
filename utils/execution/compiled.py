"""`--compile`: a model's repeated blocks by torch.compile, as fewer and larger kernels.

Only the blocks are compiled, and only for gradients: all blocks of a stack share one graph, whatever their number, and
nothing is wrapped, so that weights keep their names. A graph is for any number of examples and any lengths; the plan
pads these to config.length_multiple, so that PyTorch finds nothing to specialize on. Validation and generation run as
they are.
"""

import functools

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.t5.modeling_t5 import T5Block

from utils.config import TrainingConfig, UserError
from utils.execution.fused import FusedT5Attention
from utils.execution.strategies import is_sharded

NUM_GRAPHS = 32  # of one function, more than a training needs: after PyTorch's 8 it would run uncompiled, silently


def compile_blocks(accelerator: Accelerator, model: PreTrainedModel, config: TrainingConfig):
    if not config.compile:
        return
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    check_compile(accelerator, config, blocks)
    torch._dynamo.config.recompile_limit = NUM_GRAPHS
    for block in blocks:
        block.forward = compile_forward(block)


def check_compile(accelerator: Accelerator, config: TrainingConfig, blocks: list[torch.nn.Module]):
    if is_sharded(accelerator):
        strategy = accelerator.distributed_type.value
        raise UserError(f"--compile: {strategy} exchanges weights inside the blocks; leave one of the two out")
    if config.gradient_checkpointing:
        raise UserError("--compile: --gradient_checkpointing recomputes blocks op by op; leave one of the two out")
    if getattr(config, "load_in_4bit", False):
        raise UserError("--compile: --load_in_4bit has kernels that cannot be compiled; leave one of the two out")
    if not blocks:
        raise UserError(f"--compile: {config.model_name_or_path} has no repeated blocks that transformers marks")
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=accelerator.device))
    except Exception as error:
        reason = str(error).partition("\n\n")[0]  # advice for PyTorch's developers follows
        raise UserError(f"--compile: torch.compile does not work here: {reason}") from error


def compile_forward(block: GradientCheckpointingLayer):
    eager, compiled = block.forward, torch.compile(block.forward, dynamic=True)
    makes_bias = isinstance(block, T5Block) and isinstance(block.layer[0].SelfAttention, FusedT5Attention)

    @functools.wraps(eager)
    def forward(*arguments, **kwargs):
        if not torch.is_grad_enabled():
            return eager(*arguments, **kwargs)
        if makes_bias and arguments[2] is None:  # in the first block, which would have a graph of its own otherwise
            states, mask, _, *others = arguments
            arguments = (states, mask, block.layer[0].SelfAttention.merge_bias(states, mask), *others)
        return compiled(*arguments, **kwargs)

    return forward
