"""Weights and moments that DeepSpeed or FSDP2 shard: gathered, and set from whole values."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import pad
from transformers.integrations.deepspeed import (
    deepspeed_config,
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from utils.execution.strategies import is_deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")


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


def find_not_finite(model: torch.nn.Module) -> set[str]:
    """Names of the trained weights that hold inf or nan; every process must call it."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name for name, parameter in trained if not gather_tensor(parameter).isfinite().all()}


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
