"""Forward passes, backward passes and the update where strategies differ, so that a step is the same under each."""

import contextlib
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from utils.execution.strategies import is_deepspeed, is_sharded

NORM_PIECE = 2**14  # elements


def allow_unused_weights(accelerator: Accelerator, model: torch.nn.Module):
    """Tell DDP, which waits for every trained weight's gradient, if some may have none: those of experts that no token
    goes to, or of what reads images. To be called before `prepare`."""
    if not accelerator.distributed_type.value.startswith("MULTI_"):
        return
    if getattr(model.config, "num_experts", 0) > 1 or find_unused(accelerator, model):
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)


def find_unused(accelerator: Accelerator, model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained weights that the logits do not depend on."""
    token = torch.full((1, 1), model.config.decoder_start_token_id, device=model.device)
    was_training = model.training
    with accelerator.autocast():
        logits = model.eval()(input_ids=token, decoder_input_ids=token, use_cache=False).logits
    model.train(was_training)
    used, seen, ahead = set(), set(), [logits.grad_fn]
    while ahead:  # through the graph, to the weights that it starts from
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            used.add(getattr(node, "variable", None))
            ahead += [before for before, _ in node.next_functions]
    return [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in used]


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DDP's or DeepSpeed's. accelerator.unwrap_model looks through the installed packages each time,
    which takes some milliseconds."""
    return getattr(model, "module", model)


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


def cast_weights_once(accelerator: Accelerator) -> contextlib.AbstractContextManager[None]:
    """Around the micro-batches of an update: autocast keeps what it has cast until its outermost block ends. Sharded
    weights are whole for a moment only, and their copies would not be. On a GPU gradient checkpointing clears the
    copies, since it recomputes layers in another thread."""
    return contextlib.nullcontext() if is_sharded(accelerator) else accelerator.autocast()


def backward(accelerator: Accelerator, model: torch.nn.Module, loss: torch.Tensor):
    with torch.autocast(accelerator.device.type, enabled=False):  # it is for forward passes
        if is_deepspeed(accelerator):
            model.backward(loss)  # accelerator.backward would also step the optimizer, before the gradient is checked
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


def update_weights(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> float:
    """Clip, and update the weights unless the gradient is not finite; returns its norm before clipping.

    Reading the norm waits for the device once per update; that is the price of never applying a gradient that is not
    finite.
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
        # On a CPU a tensor's squares are summed one by one in fp32, which loses 0.14 % over 25 million; a GPU sums in
        # a tree.
        pieces = [piece for gradient in gradients for piece in gradient.flatten().split(NORM_PIECE)]
    norm = get_total_norm(pieces)
    if accelerator.distributed_type == DistributedType.FSDP:  # each process has its shards' norm
        norm = accelerator.reduce(norm.square(), "sum").sqrt()
    grad_norm = float(norm)
    if grad_norm > max_grad_norm:
        torch._foreach_mul_(gradients, max_grad_norm / grad_norm)
    return grad_norm
