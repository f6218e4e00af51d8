"""One optimizer update, from top to bottom: forward and backward passes, clipping, AdamW, the schedule.

The gradient is that of one large batch, whatever the number of processes and micro-batches: each micro-batch adds the
sum over its target tokens, divided by the target tokens of the whole step.
"""

import math

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy

from utils.config import TrainingConfig
from utils.data.prefetch import Step
from utils.execution.passes import accumulate, backward, cast_weights_once, unwrap, update_weights
from utils.modeling.families import takes_whole_mask


def train_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    data: datasets.Dataset,
    step: Step,
    config: TrainingConfig,
) -> tuple[torch.Tensor, float, float]:
    """Update the weights once.

    Returns:
        The sums of this process's losses, see compute_training_losses, still on the device; the learning rate; the
        gradient's norm before clipping.

    Raises:
        FloatingPointError: before the update, on every process, if the gradient is not finite.
    """
    # Dropout depends only on seed, step and rank, so a checkpoint need not hold a generator's state.
    seed = np.random.SeedSequence([config.seed, step.number, accelerator.process_index])
    torch.manual_seed(int(seed.generate_state(1)[0]))
    loss_sums = compute_gradient(accelerator, model, step.micro_batches, step.num_target_tokens, config)
    learning_rate = lr_scheduler.get_last_lr()[0]
    grad_norm = update_weights(accelerator, model, optimizer, config.max_grad_norm)
    if not math.isfinite(grad_norm):
        ids = find_bad_examples(data, [batch["indices"] for batch in step.micro_batches], loss_sums)
        what = f"the loss is not finite in micro-batches of {', '.join(ids)}" if ids else "the gradient overflows"
        raise FloatingPointError(f"step {step.number}: {what}")
    lr_scheduler.step()
    return sum(loss_sums), learning_rate, grad_norm


def compute_gradient(
    accelerator: Accelerator,
    model: torch.nn.Module,
    micro_batches: list[dict],
    num_target_tokens: int,
    config: TrainingConfig,
) -> list[torch.Tensor]:
    """Accumulate the gradient of the step's loss per target token over this process's micro-batches, of which every
    process has equally many; whole gradients are synchronised once, with the last.

    Returns:
        The micro-batches' sums of losses, still on the device.
    """
    loss_sums = []
    with cast_weights_once(accelerator):
        for turn, batch in enumerate(micro_batches, start=1):
            with accumulate(accelerator, model, last=turn == len(micro_batches)):
                # The logits get no name: they would live on while the backward pass needs the memory.
                losses = compute_training_losses(
                    compute_target_logits(accelerator, model, batch), batch["targets"], config
                )
                # Gradients are averaged over the processes; the sum is what makes them those of one large batch.
                backward(accelerator, model, losses[0] * (accelerator.num_processes / num_target_tokens))
            loss_sums.append(losses.detach())
    return loss_sums


def compute_training_losses(logits: torch.Tensor, targets: torch.Tensor, config: TrainingConfig) -> torch.Tensor:
    """(2,): sums over a micro-batch's target tokens, in nats, of the loss that is trained on and of the plain
    cross-entropy, which validation has. A mean would weigh the tokens of a micro-batch with few of them more than
    others.

    Args:
        logits: (target tokens, vocabulary), fp32.
        targets: (target tokens,).
    """
    loss = cross_entropy(logits, targets, reduction="sum", label_smoothing=config.label_smoothing_factor)
    if config.label_smoothing_factor == 0:
        return torch.stack([loss, loss.detach()])
    return torch.stack([loss, cross_entropy(logits.detach(), targets, reduction="sum")])


def compute_target_logits(
    accelerator: Accelerator, model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """(target tokens, vocabulary), fp32: the logits of the micro-batch's target tokens, without those of padding."""
    positions = batch["target_positions"]

    def select_targets(head: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        if arguments[0].shape[:-1] == batch["decoder_input_ids"].shape:
            return (arguments[0].flatten(0, 1).index_select(0, positions),)
        return None  # it is an embedding too, or computes other things as well

    # The vocabulary is 40 times as wide as the model: padding must not reach it. A hook, so that the head stays inside
    # the model's forward, where DDP and autocast expect it.
    unwrapped = unwrap(model)
    hook = unwrapped.get_output_embeddings().register_forward_pre_hook(select_targets)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    if takes_whole_mask(unwrapped):
        # With a 2-D mask transformers asks the device, twice per forward pass, whether anything is padded.
        inputs["attention_mask"] = inputs["attention_mask"][:, None, None, :].bool()
    try:
        with accelerator.autocast():  # which Accelerate puts around the forward of all models but FSDP2's
            logits = model(**inputs, use_cache=False).logits
            if logits.dim() == 3:  # the hook has not chosen
                logits = logits.flatten(0, 1).index_select(0, positions)
            return logits.float()
    finally:
        hook.remove()


def find_bad_examples(
    data: datasets.Dataset, micro_batches: list[np.ndarray], loss_sums: list[torch.Tensor]
) -> list[str]:
    """Ids of all examples, on all processes, in micro-batches whose loss is not finite."""
    bad = [indices for indices, loss in zip(micro_batches, loss_sums, strict=True) if not torch.isfinite(loss).all()]
    return gather_object([data[int(index)]["id"] for indices in bad for index in indices])
