"""The one training loop, for the full model and for LoRA alike: step, log, save, validate."""

import logging
import math
import time
from pathlib import Path
from typing import NoReturn

import datasets
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from utils.config import TrainingConfig, UserError
from utils.data.batching import measure_lengths
from utils.data.prefetch import load_steps
from utils.execution.passes import unwrap
from utils.execution.sharding import find_not_finite
from utils.launch.stopping import StopRequest
from utils.launch.times import timed
from utils.modeling.export import export_model
from utils.modeling.families import check_head
from utils.training.checkpointing import Checkpointer
from utils.training.optimization import num_train_steps
from utils.training.step import train_step
from utils.training.tracking import Interval, UnwrittenLineError, finish_trackers, log_metrics, log_samples
from utils.training.validation import evaluate_loss, score_sample

logger = logging.getLogger(__name__)


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    train_data: datasets.Dataset,
    validation_data: datasets.Dataset | None,
    config: TrainingConfig,
    checkpointer: Checkpointer,
):
    """Train for num_train_steps updates and write metrics.jsonl along the way. All is counted in optimizer updates."""
    lengths = measure_lengths(train_data)
    num_steps = num_train_steps(config, len(lengths))
    stop = StopRequest(accelerator, config)
    model.train()
    # Before a checkpoint's weights are taken, which may be spoiled already.
    not_finite = find_not_finite(unwrap(model))
    interval = checkpointer.restore(model, optimizer, lr_scheduler, config.per_device_train_batch_size)
    check_head(unwrap(model))
    if not_finite and accelerator.is_main_process:
        logger.warning("weights that are not finite before training: %s", ", ".join(sorted(not_finite)))
    num_updates = checkpointer.last_step
    progress = tqdm(total=num_steps, initial=num_updates, unit="update", disable=not accelerator.is_main_process)

    def is_due(every: int) -> bool:
        return num_updates % every == 0 or num_updates == num_steps

    try:
        checkpointer.save(num_updates)  # does nothing unless resumed from another folder
        if is_due(config.logging_steps):
            log_interval(accelerator, model, config, num_updates, interval, progress)  # pending if the disk was full
        if is_due(config.eval_steps):
            validate(accelerator, model, tokenizer, validation_data, config, num_updates, stop, checkpointer)
        numbers = range(num_updates + 1, num_steps + 1)
        if num_updates > 0 and is_due(config.eval_steps) and is_hopeless(checkpointer, config, num_updates):
            numbers = range(0)  # it had ended here before it was resumed
        for step in load_steps(accelerator, model, train_data, lengths, config, numbers):
            started = time.perf_counter()
            with timed("updates" if step.number > numbers[0] else "the first update"):
                loss_sums, learning_rate, grad_norm = train_step(
                    accelerator, model, optimizer, lr_scheduler, train_data, step, config
                )
            interval.add(step, loss_sums, learning_rate, grad_norm, seconds=time.perf_counter() - started)
            num_updates = step.number
            progress.update()
            if is_due(config.logging_steps):
                log_interval(accelerator, model, config, num_updates, interval, progress)
            stopping = stop.asked()
            if stopping or is_due(config.checkpointing_steps):
                checkpointer.save(num_updates)
            if stopping:
                checkpointer.stop(stop)
            if is_due(config.eval_steps):
                validate(accelerator, model, tokenizer, validation_data, config, num_updates, stop, checkpointer)
                if is_hopeless(checkpointer, config, num_updates):
                    break
        log_interval(accelerator, model, config, num_updates, interval, progress)  # open if it ended early
    except FloatingPointError as error:
        keep_last_good_model(accelerator, model, tokenizer, config, num_updates, str(error), not_finite)
    except UnwrittenLineError as error:
        checkpointer.save(num_updates)
        checkpointer.stop(stop, str(error))
    finally:
        progress.close()
    checkpointer.finish()
    check_finite(accelerator, model, num_updates, not_finite)
    finish_trackers(accelerator)


def is_hopeless(checkpointer: Checkpointer, config: TrainingConfig, step: int) -> bool:
    """Whether early_stopping_patience validations in a row, of which the last was at this step, have brought no
    improvement."""
    if config.early_stopping_patience is None or checkpointer.best is None:
        return False
    num_validations = math.ceil((step - checkpointer.best["step"]) / config.eval_steps)
    if num_validations < config.early_stopping_patience:
        return False
    if checkpointer.accelerator.is_main_process:
        text = "step %d: no improvement since step %d: training ends early"
        logger.info(text, step, checkpointer.best["step"])
    return True


def log_interval(
    accelerator: Accelerator,
    model: torch.nn.Module,
    config: TrainingConfig,
    step: int,
    interval: Interval,
    progress: tqdm,
):
    """Write a train line about the updates since the last one, if there are any."""
    if interval.num_examples == 0:
        return
    metrics = interval.summarize(accelerator, unwrap(model), config)
    log_metrics(accelerator, config, step, "train", metrics)
    progress.set_postfix(loss=f"{metrics['loss']:.3f}", samples_per_second=f"{metrics['samples_per_second']:.1f}")
    interval.clear()


@timed("validation")
def validate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset | None,
    config: TrainingConfig,
    step: int,
    stop: StopRequest,
    checkpointer: Checkpointer,
):
    """Write a validation line, and keep the weights if they are the best so far."""
    if data is None:
        return
    metrics = evaluate_loss(accelerator, model, data, config, stop)
    if metrics is None:
        checkpointer.save(step)  # and validate again when resumed
        checkpointer.stop(stop)
    samples = []
    if config.metric_for_best_model != "loss":
        score, samples = score_sample(accelerator, model, tokenizer, data, config)
        metrics |= score
    log_metrics(accelerator, config, step, "validation", metrics)
    log_samples(accelerator, config, step, samples)
    if step > 0:
        value = metrics[config.metric_for_best_model]
        checkpointer.save_if_best(step, value if config.metric_for_best_model == "loss" else -value)


def check_finite(accelerator: Accelerator, model: torch.nn.Module, num_updates: int, not_finite: set[str]):
    """UserError, on every process, if a weight that was finite before training no longer is."""
    spoiled = sorted(find_not_finite(unwrap(model)) - not_finite)
    if spoiled:
        accelerator.wait_for_everyone()  # when one process exits, the launcher kills the others
        raise UserError(
            f"after update {num_updates} {len(spoiled)} weight tensors are not finite, the first {spoiled[0]}: "
            "nothing is exported; lower --learning_rate"
        )


def keep_last_good_model(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    num_updates: int,
    what: str,
    not_finite: set[str],
) -> NoReturn:
    """Export the model after the last good update, unless its weights are not finite either; then raise UserError.

    Args:
        not_finite: names of the weights that were not finite before training.
    """
    folder = Path(config.output_dir) / "last_good_model"
    check_finite(accelerator, model, num_updates, not_finite)
    if num_updates > 0:
        export_model(accelerator, model, tokenizer, folder)
        what += f"; the model after update {num_updates} is in {folder}"
    accelerator.wait_for_everyone()  # when one process exits, the launcher kills the others
    raise UserError(what)
