"""The one training loop, for the full model and for LoRA alike."""

import contextlib
import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from utils.batching import (
    collate,
    measure_lengths,
    num_micro_batches,
    plan_pass,
    plan_steps,
    select_examples,
)
from utils.config import TrainingConfig, UserError
from utils.modeling import export_model
from utils.optimization import num_train_steps
from utils.tracking import log_metrics, measure_peak_memory

logger = logging.getLogger(__name__)


def load_batches(
    accelerator: Accelerator, model: torch.nn.Module, data: datasets.Dataset, plan: Iterable, num_workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The plan's micro-batches, collated and on the device."""
    model = accelerator.unwrap_model(model)
    collate_fn = functools.partial(
        collate, pad_token_id=model.config.pad_token_id, shift_right=model.prepare_decoder_input_ids_from_labels
    )
    pin_memory = accelerator.device.type == "cuda"
    loader = DataLoader(
        data, sampler=plan, batch_size=None, collate_fn=collate_fn, num_workers=num_workers, pin_memory=pin_memory
    )
    for batch in loader:
        yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}


def sum_target_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross-entropies, in nats, over the micro-batch's target tokens. A mean would weigh the tokens of a
    micro-batch with few of them more than others."""
    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


@torch.no_grad()
def evaluate_loss(
    accelerator: Accelerator, model: torch.nn.Module, data: datasets.Dataset, config: TrainingConfig
) -> dict[str, float]:
    """Loss per target token over the whole set, whatever the number of processes."""
    lengths = measure_lengths(data)
    plan = plan_pass(lengths, config.per_device_eval_batch_size, accelerator.process_index, accelerator.num_processes)
    loss_sum = torch.zeros((), device=accelerator.device)
    model.eval()
    for batch in load_batches(accelerator, model, data, plan, config.dataloader_num_workers):
        loss_sum += sum_target_losses(model, batch)
    model.train()
    num_target_tokens = int(lengths[:, 1].sum())
    loss = accelerator.reduce(loss_sum, "sum").item() / num_target_tokens
    return {"loss": loss, "num_examples": len(data), "num_target_tokens": num_target_tokens}


def compute_gradient(
    accelerator: Accelerator,
    model: torch.nn.Module,
    micro_batches: Iterable[dict],
    num_turns: int,
    num_target_tokens: int,
) -> tuple[list[torch.Tensor], int]:
    """Accumulate the gradient of the step's loss per target token over this process's `num_turns` micro-batches.

    Returns:
        The micro-batches' sums of losses, still on the device, and the number of tokens computed, padding included.
    """
    loss_sums, num_computed_tokens = [], 0
    for turn in range(num_turns):
        batch = next(micro_batches)
        last = turn == num_turns - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss_sum = sum_target_losses(model, batch)
            # DDP averages gradients over the processes; the sum is what makes them those of one large batch.
            accelerator.backward(loss_sum * (accelerator.num_processes / num_target_tokens))
        loss_sums.append(loss_sum.detach())
        num_computed_tokens += batch["input_ids"].numel() + batch["labels"].numel()
    return loss_sums, num_computed_tokens


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    train_data: datasets.Dataset,
    validation_data: datasets.Dataset | None,
    config: TrainingConfig,
):
    """Train for num_train_steps updates, writing metrics.jsonl on the way. All is counted in optimizer updates."""
    lengths = measure_lengths(train_data)
    num_steps = num_train_steps(config, len(lengths))
    sizes = config.total_train_batch_size, config.per_device_train_batch_size
    rank, world = accelerator.process_index, accelerator.num_processes
    plan = functools.partial(plan_steps, lengths, *sizes, config.seed, rank, world)
    micro_batches = load_batches(accelerator, model, train_data, plan(range(num_steps)), config.dataloader_num_workers)
    progress = tqdm(total=num_steps, unit="update", disable=not accelerator.is_main_process)
    log_validation(accelerator, model, validation_data, config, step=0)
    model.train()
    interval = Counter()
    for step in range(1, num_steps + 1):
        started = time.perf_counter()
        examples = select_examples(len(lengths), config.total_train_batch_size, config.seed, step - 1)
        num_source_tokens, num_target_tokens = (int(total) for total in lengths[examples].sum(axis=0))
        # Dropout depends on seed, step and rank alone, so there is no generator's state to save.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank]).generate_state(1)[0]))
        num_turns = num_micro_batches(len(lengths), *sizes, world)
        loss_sums, num_computed_tokens = compute_gradient(
            accelerator, model, micro_batches, num_turns, num_target_tokens
        )
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        # The only wait for the device in an update: what it costs a batch of 256, a ruined model does not.
        if not math.isfinite(grad_norm):
            stop_before_update(accelerator, model, tokenizer, train_data, plan([step - 1]), loss_sums, step, config)
        learning_rate = lr_scheduler.get_last_lr()[0]
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        interval.update(
            loss_sum=sum(loss_sums),
            num_examples=len(examples),
            num_target_tokens=num_target_tokens,
            num_tokens=num_source_tokens + num_target_tokens,
            num_computed_tokens=num_computed_tokens,
            seconds=time.perf_counter() - started,
        )
        progress.update()
        if step % config.logging_steps == 0 or step == num_steps:
            metrics = summarize_interval(accelerator, interval, learning_rate, grad_norm)
            log_metrics(accelerator, config, step, "train", metrics)
            progress.set_postfix(
                loss=f"{metrics['loss']:.3f}", samples_per_second=f"{metrics['samples_per_second']:.1f}"
            )
            interval.clear()
        if step % config.eval_steps == 0 or step == num_steps:
            log_validation(accelerator, model, validation_data, config, step)
    progress.close()


def summarize_interval(
    accelerator: Accelerator, interval: Counter, learning_rate: float, grad_norm: torch.Tensor
) -> dict[str, float]:
    """What metrics.jsonl says of the updates since the last train line; its loss is the mean over their target tokens,
    learning_rate and grad_norm (before clipping) are the last update's."""
    here = torch.stack([interval["loss_sum"], interval["loss_sum"].new_tensor(interval["num_computed_tokens"])])
    loss_sum, num_computed_tokens = accelerator.reduce(here, "sum").tolist()
    return {
        "loss": loss_sum / interval["num_target_tokens"],
        "learning_rate": learning_rate,
        "grad_norm": float(grad_norm),
        "num_examples": interval["num_examples"],
        "num_target_tokens": interval["num_target_tokens"],
        "samples_per_second": interval["num_examples"] / interval["seconds"],
        "padding_efficiency": interval["num_tokens"] / num_computed_tokens,
        "peak_memory_mib": measure_peak_memory(accelerator),
    }


def log_validation(
    accelerator: Accelerator, model: torch.nn.Module, data: datasets.Dataset | None, config: TrainingConfig, step: int
):
    if data is None:
        return
    metrics = evaluate_loss(accelerator, model, data, config)
    if not math.isfinite(metrics["loss"]):
        raise UserError(f"the validation loss after {step} updates is {metrics['loss']}: nothing was saved")
    log_metrics(accelerator, config, step, "validation", metrics)


def stop_before_update(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    micro_batches: Iterable[np.ndarray],
    loss_sums: list[torch.Tensor],
    step: int,
    config: TrainingConfig,
):
    """Save the model as it was before the update whose gradient is not finite, and say which examples spoilt it."""
    bad = [indices for indices, loss in zip(micro_batches, loss_sums, strict=True) if not torch.isfinite(loss)]
    ids = gather_object([data[int(index)]["id"] for indices in bad for index in indices])
    what = (
        f"the loss is not finite in micro-batches of the examples {', '.join(ids)}"
        if ids
        else "the gradient overflows"
    )
    folder = Path(config.output_dir) / "last_good_model"
    export_model(accelerator, model, tokenizer, folder)
    raise UserError(f"step {step}: {what}; the model before this step is in {folder}")
