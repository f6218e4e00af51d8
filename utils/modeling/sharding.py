"""What a step, a checkpoint and the export do otherwise where DeepSpeed or FSDP2 shard a model: all of it is here, so
that they are the same under each strategy.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import pad
from torch.nn.utils import get_total_norm
from transformers.integrations.deepspeed import (
    deepspeed_config,
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from utils.modeling.strategies import (
    is_deepspeed,
    is_sharded,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
NORM_PIECE = 2**14  # elements


@contextlib.contextmanager
def without_zero3(accelerator: Accelerator) -> Iterator[None]:
    """Within, a model that one process loads is whole. Under ZeRO-3 from_pretrained would wait for the others."""
    before = is_deepspeed_zero3_enabled()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if before:
            set_hf_deepspeed_config(accelerator.state.deepspeed_plugin.dschf)


@contextlib.contextmanager
def zero3_loads_in(dtype: torch.dtype) -> Iterator[None]:
    """Within, from_pretrained makes weights of this dtype under ZeRO-3 too, where it is DeepSpeed that makes them, by
    its own settings' precision."""
    if not (is_deepspeed_zero3_enabled() and dtype == torch.bfloat16):
        yield
        return
    settings = deepspeed_config()
    before = settings.get("bf16")
    settings["bf16"] = {"enabled": True}
    try:
        yield
    finally:
        del settings["bf16"]
        if before is not None:
            settings["bf16"] = before


@contextlib.contextmanager
def accumulate(accelerator: Accelerator, model: torch.nn.Module, last: bool) -> Iterator[None]:
    """Around a micro-batch's forward and backward pass. Whole gradients are exchanged once an update, in its `last`
    micro-batch; sharded ones in every micro-batch, since no process holds a whole one."""
    if is_deepspeed(accelerator):
        model.set_gradient_accumulation_boundary(last)
        yield
    elif last or is_sharded(accelerator):
        yield
    else:
        with accelerator.no_sync(model):
            yield


def backward(accelerator: Accelerator, model: torch.nn.Module, loss: torch.Tensor):
    if is_deepspeed(accelerator):
        model.backward(loss)  # accelerator.backward would take the optimizer's step too, before the loss is looked at
    else:
        accelerator.backward(loss)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Around forward passes without a backward pass: evaluation mode, no gradients."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()
    if hasattr(model, "empty_partition_cache"):
        # ZeRO-3 fetches weights ahead, which only a backward pass releases. Left in flight, they cannot be gathered
        # for a checkpoint or the export: "Cannot partition a param in flight" (DeepSpeed's issue 3068).
        model.empty_partition_cache()


def update(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> float:
    """Clip, and update the weights unless the gradient is not finite; returns its norm before clipping.

    It waits for the device, as nothing else in an update does: a batch of 256 is worth it, a ruined model is not.
    """
    if is_deepspeed(accelerator):
        model.step()  # which clips
        return math.inf if model.optimizer.overflow else float(model.get_global_grad_norm())
    grad_norm = clip_gradient(accelerator, model, max_grad_norm)
    if math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def clip_gradient(accelerator: Accelerator, model: torch.nn.Module, max_grad_norm: float) -> float:
    """Scale the gradient to an L2 norm of at most max_grad_norm; returns its norm before that."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradients = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    pieces = gradients
    if accelerator.device.type == "cpu":
        # A CPU adds up a tensor's squares in fp32 one after another: of 25 million, 0.14 % are lost. A GPU adds in a
        # tree.
        pieces = [piece for gradient in gradients for piece in gradient.flatten().split(NORM_PIECE)]
    norm = get_total_norm(pieces)
    if accelerator.distributed_type == DistributedType.FSDP:  # each process has its shards' norm
        norm = accelerator.reduce(norm.square(), "sum").sqrt()
    grad_norm = float(norm)
    if grad_norm > max_grad_norm:
        torch._foreach_mul_(gradients, max_grad_norm / grad_norm)
    return grad_norm


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # of ZeRO-3's parameters the shape is (0,)


@torch.no_grad()
def gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter or a moment; every process must call it."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def set_parameter(parameter: torch.nn.Parameter, value: torch.Tensor):
    """Set a parameter to a whole value, of which each process takes its part."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(shard_like(parameter, value))


def shard_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole value, on the parameter's device."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gather_moments(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]
) -> Iterator[tuple[str, torch.Tensor]]:
    """AdamW's state as ("PARAMETER.exp_avg", whole tensor) and so on; every process must call it."""
    if is_deepspeed(accelerator):
        from deepspeed.utils import safe_get_full_optimizer_state

        link_moments(optimizer.optimizer)
        step = next(iter(optimizer.state.values()))["step"]
        for name, parameter in parameters.items():
            yield f"{name}.step", step
            for key in MOMENTS:
                yield f"{name}.{key}", safe_get_full_optimizer_state(parameter, key)
    else:
        for name, parameter in parameters.items():
            for key, value in optimizer.state[parameter].items():
                yield f"{name}.{key}", gather_tensor(value)


def set_moments(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    moments: dict[str, torch.Tensor],
):
    """The reverse of gather_moments; to be called once the parameters are set."""
    if is_deepspeed(accelerator):
        set_deepspeed_moments(optimizer.optimizer, parameters, moments)
    else:
        for name, parameter in parameters.items():
            optimizer.state[parameter] = {
                key: shard_like(parameter, moments[f"{name}.{key}"]) for key in ("step", *MOMENTS)
            }


def link_moments(optimizer):
    """ZeRO-1 and 2 look up a parameter's moments once, when only the first group of parameters has been updated."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def set_deepspeed_moments(optimizer, parameters: dict[str, torch.nn.Parameter], moments: dict[str, torch.Tensor]):
    """DeepSpeed keeps flat partitions, for which AdamW has no state before its first step."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    optimizer.refresh_fp32_params()
    step = moments[f"{next(iter(parameters))}.step"]
    is_zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    for flat in optimizer.fp32_partitioned_groups_flat if is_zero3 else optimizer.single_partition_of_fp32_groups:
        zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
        optimizer.state[flat] = {"step": step.to(flat.device, copy=True), **zeros}
    link_moments(optimizer)
    for name, parameter in parameters.items():
        for key in MOMENTS:
            value = moments[f"{name}.{key}"].to(parameter.device)
            if is_zero3:  # of a whole value DeepSpeed takes parts of equal size, which there need not be
                size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(parameter.ds_process_group)
                value = pad(value.flatten(), (0, size * (rank + 1)))[size * rank :][:size]
                safe_set_local_optimizer_state(parameter, value, key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
