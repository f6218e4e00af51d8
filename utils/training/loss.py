"""From planned micro-batches to losses and gradients that do not depend on how the examples were cut."""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy

from utils.config import TrainingConfig
from utils.data.batching import collate, measure_lengths, plan_pass
from utils.launch.stopping import StopRequest
from utils.modeling.sharding import accumulate, backward, evaluating

NUM_BATCHES_AHEAD = 32


def load_batches(
    accelerator: Accelerator, model: torch.nn.Module, data: datasets.Dataset, plan: Iterator[np.ndarray]
) -> Iterator[dict[str, torch.Tensor]]:
    """The plan's micro-batches on the device. A thread plans and collates some ahead, so that the device need not
    wait for them."""
    model = accelerator.unwrap_model(model)

    def make_batch() -> tuple[np.ndarray, dict[str, torch.Tensor]] | None:
        indices = next(plan, None)
        if indices is None:
            return None
        batch = collate(data[indices], model.config.pad_token_id)
        if accelerator.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return indices, batch

    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = deque(thread.submit(make_batch) for _ in range(NUM_BATCHES_AHEAD))
        while (made := ahead.popleft().result()) is not None:
            ahead.append(thread.submit(make_batch))
            indices, batch = made
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch.pop("labels"))
            yield batch | {"indices": indices}


def compute_training_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies, in nats, over a micro-batch's target tokens. A mean would weigh the tokens of a
    micro-batch with few of them more than others.

    This is what is trained on. Validation has a loss of its own, so that a change here, such as label smoothing, does
    not change what the best model is chosen by.

    Args:
        logits: (target tokens, vocabulary), fp32. targets: (target tokens,).
    """
    return cross_entropy(logits, targets, reduction="sum")


def compute_validation_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies, in nats, over a micro-batch's target tokens; arguments as above."""
    return cross_entropy(logits, targets, reduction="sum")


def compute_target_logits(
    accelerator: Accelerator, model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """(target tokens, vocabulary), fp32: the logits of the micro-batch's target tokens, without those of padding."""
    positions = batch["target_positions"]

    def select_targets(head: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (arguments[0].flatten(0, 1).index_select(0, positions),)

    # The vocabulary is 40 times as wide as the model: padding must not reach it. A hook, so that the head stays inside
    # the model's forward, where DDP and autocast expect it.
    unwrapped = accelerator.unwrap_model(model)
    hook = unwrapped.get_output_embeddings().register_forward_pre_hook(select_targets)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    if unwrapped.config._attn_implementation == "sdpa":
        # Of shape (examples, 1, 1, source) transformers takes it as it is. Of a 2-D mask it asks the device, twice a
        # forward pass, whether anything is padded.
        inputs["attention_mask"] = inputs["attention_mask"][:, None, None, :].bool()
    try:
        with accelerator.autocast():  # which Accelerate puts around the forward of all models but FSDP2's
            return model(**inputs, use_cache=False).logits.float()
    finally:
        hook.remove()


def evaluate_loss(
    accelerator: Accelerator, model: torch.nn.Module, data: datasets.Dataset, config: TrainingConfig, stop: StopRequest
) -> dict[str, float] | None:
    """Loss per target token over the whole set, whatever the number of processes; None if the run is to stop.
    FloatingPointError, on all of them, if it is not finite."""
    lengths = measure_lengths(data)
    plan = plan_pass(lengths, config.per_device_eval_batch_size, accelerator.process_index, accelerator.num_processes)
    examples, loss_sums = [], []
    with evaluating(model):
        for number, batch in enumerate(load_batches(accelerator, model, data, plan)):
            if number % 8 == 0 and stop.asked():  # asking waits for the device
                break
            examples.append(batch["indices"])
            loss = compute_validation_loss(compute_target_logits(accelerator, model, batch), batch["targets"])
            loss_sums.append(loss)
    if stop.agreed:
        return None
    num_target_tokens = int(lengths[:, 1].sum())
    loss = accelerator.reduce(sum(loss_sums), "sum").item() / num_target_tokens
    if not math.isfinite(loss):
        ids = find_bad_examples(data, examples, loss_sums)
        raise FloatingPointError(f"the loss is not finite in micro-batches of {', '.join(ids)}")
    return {"loss": loss, "num_examples": len(data), "num_target_tokens": num_target_tokens}


def find_bad_examples(
    data: datasets.Dataset, micro_batches: list[np.ndarray], loss_sums: list[torch.Tensor]
) -> list[str]:
    """Ids of all examples, on all processes, in micro-batches whose loss is not finite."""
    bad = [indices for indices, loss in zip(micro_batches, loss_sums, strict=True) if not torch.isfinite(loss)]
    return gather_object([data[int(index)]["id"] for indices in bad for index in indices])


def compute_gradient(
    accelerator: Accelerator,
    model: torch.nn.Module,
    micro_batches: list[dict],
    num_target_tokens: int,
    recover: bool = False,
) -> list[torch.Tensor]:
    """Accumulate the gradient of the step's loss per target token over this process's micro-batches, of which every
    process has equally many; whole gradients are synchronised once, with the last.

    With `recover`, a micro-batch that does not fit raises torch.OutOfMemoryError on every process: they agree on it
    before they synchronise, which then does not overlap with the last backward pass.

    Returns:
        The micro-batches' sums of losses, still on the device.
    """
    synchronise_after = recover and accelerator.num_processes > 1
    loss_sums, error = [], None
    try:
        for turn, batch in enumerate(micro_batches, start=1):
            last = turn == len(micro_batches)
            with accumulate(accelerator, model, last and not synchronise_after):
                # The logits get no name: they would live on while the backward pass needs the memory.
                loss_sum = compute_training_loss(compute_target_logits(accelerator, model, batch), batch["targets"])
                # Gradients are averaged over the processes; the sum is what makes them those of one large batch.
                backward(accelerator, model, loss_sum * (accelerator.num_processes / num_target_tokens))
            loss_sums.append(loss_sum.detach())
    except torch.OutOfMemoryError as out_of_memory:
        if not synchronise_after:
            raise
        error = out_of_memory.with_traceback(None)  # which would hold on to the memory
    if synchronise_after:
        if accelerator.gather(torch.tensor([error is not None], device=accelerator.device)).any():
            raise error or torch.OutOfMemoryError("on another process")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return loss_sums
