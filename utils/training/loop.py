"""The one training loop, for the full model and for LoRA alike."""

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from utils.config import EvaluationConfig, TrainingConfig, UserError
from utils.data.batching import gradient_accumulation_steps, measure_lengths, plan_steps, select_examples
from utils.generation.decoding import decode_batch
from utils.generation.summaries import generate_texts
from utils.launch.stopping import StopRequest
from utils.modeling.export import export_model
from utils.modeling.loading import check_head, count_flops_per_token
from utils.modeling.sharding import evaluating, update
from utils.scoring.rouge import score_texts
from utils.training.batch_size import compute_gradient_in_memory, find_batch_size
from utils.training.checkpointing import Checkpointer
from utils.training.loss import compute_gradient, evaluate_loss, find_bad_examples, load_batches
from utils.training.optimization import num_train_steps
from utils.training.tracking import finish_trackers, log_metrics, measure_peak_memory


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
    """Train for num_train_steps updates, writing metrics.jsonl on the way. All is counted in optimizer updates."""
    lengths = measure_lengths(train_data)
    num_steps = num_train_steps(config, len(lengths))
    stop = StopRequest(accelerator, config)
    model.train()
    total, batch_size = config.total_train_batch_size, config.per_device_train_batch_size
    if batch_size == "auto":
        batch_size = checkpointer.batch_size or find_batch_size(accelerator, model, train_data, lengths, config)
    rank, world = accelerator.process_index, accelerator.num_processes

    def load_steps(steps: Iterable[int], batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        plan = plan_steps(lengths, total, batch_size, config.seed, rank, world, steps)
        return load_batches(accelerator, model, train_data, plan)

    def save(step: int):
        if step != checkpointer.last_saved:
            checkpointer.save(step, model, optimizer, lr_scheduler, interval, batch_size)

    def evaluate(step: int):
        if validation_data and (step % config.eval_steps == 0 or step == num_steps):
            if not log_validation(accelerator, model, tokenizer, validation_data, config, step, stop, checkpointer):
                save(step)  # and evaluate again when resumed
                checkpointer.stop(stop)

    flops_per_source_token, flops_per_target_token = count_flops_per_token(accelerator.unwrap_model(model))
    interval = checkpointer.restore(model, optimizer, lr_scheduler)
    check_head(accelerator.unwrap_model(model))
    first_step = checkpointer.last_step + 1
    batches = load_steps(range(first_step - 1, num_steps), batch_size)
    num_turns = gradient_accumulation_steps(len(lengths), total, batch_size, world)
    progress = tqdm(total=num_steps, initial=first_step - 1, unit="update", disable=not accelerator.is_main_process)
    save(first_step - 1)  # if it lies in another folder: from now on this one must do
    evaluate(first_step - 1)
    for step in range(first_step, num_steps + 1):
        started = time.perf_counter()
        examples = select_examples(len(lengths), total, config.seed, step - 1)
        num_source_tokens, num_target_tokens = (int(total) for total in lengths[examples].sum(axis=0))
        # Dropout depends on seed, step and rank alone, so there is no generator's state to save.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank]).generate_state(1)[0]))
        micro_batches = list(itertools.islice(batches, num_turns))
        seconds_waited = time.perf_counter() - started
        if config.per_device_train_batch_size == "auto":
            plan_again = functools.partial(load_steps, [step - 1])
            loss_sums, micro_batches = compute_gradient_in_memory(
                accelerator, model, micro_batches, num_target_tokens, plan_again, batch_size
            )
        else:
            loss_sums = compute_gradient(accelerator, model, micro_batches, num_target_tokens)
        learning_rate = lr_scheduler.get_last_lr()[0]
        grad_norm = update(accelerator, model, optimizer, config.max_grad_norm)
        if not math.isfinite(grad_norm):
            ids = find_bad_examples(train_data, [batch["indices"] for batch in micro_batches], loss_sums)
            what = f"the loss is not finite in micro-batches of {', '.join(ids)}" if ids else "the gradient overflows"
            stop_and_keep(accelerator, model, tokenizer, config, step - 1, f"step {step}: {what}")
        lr_scheduler.step()
        interval.update(
            loss_sum=sum(loss_sums),
            num_examples=len(examples),
            num_target_tokens=num_target_tokens,
            num_tokens=num_source_tokens + num_target_tokens,
            num_computed_tokens=sum(b["input_ids"].numel() + b["decoder_input_ids"].numel() for b in micro_batches),
            flops=flops_per_source_token * num_source_tokens + flops_per_target_token * num_target_tokens,
            seconds_waited=seconds_waited,
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
        stopping = stop.asked()
        if stopping or step % config.checkpointing_steps == 0 or step == num_steps:
            save(step)
        if stopping:
            checkpointer.stop(stop)
        evaluate(step)
    progress.close()
    checkpointer.finish(model)
    finish_trackers(accelerator)


def summarize_interval(
    accelerator: Accelerator, interval: Counter, learning_rate: float, grad_norm: float
) -> dict[str, float]:
    """What metrics.jsonl says of the updates since the last train line; its loss is the mean over their target tokens,
    learning_rate and grad_norm (before clipping) are the last update's."""
    here = torch.stack([interval["loss_sum"], interval["loss_sum"].new_tensor(interval["num_computed_tokens"])])
    loss_sum, num_computed_tokens = accelerator.reduce(here, "sum").tolist()
    return {
        "loss": loss_sum / interval["num_target_tokens"],
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "num_examples": interval["num_examples"],
        "num_target_tokens": interval["num_target_tokens"],
        "samples_per_second": interval["num_examples"] / interval["seconds"],
        "target_tokens_per_second": interval["num_target_tokens"] / interval["seconds"],
        "model_flops_per_second": interval["flops"] / interval["seconds"],
        "padding_efficiency": interval["num_tokens"] / num_computed_tokens,
        "data_wait_share": interval["seconds_waited"] / interval["seconds"],
        "peak_memory_mib": measure_peak_memory(accelerator),
    }


def log_validation(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    config: TrainingConfig,
    step: int,
    stop: StopRequest,
    checkpointer: Checkpointer,
) -> bool:
    """Whether it was finished; False if it was left early because the run is to stop."""
    try:
        metrics = evaluate_loss(accelerator, model, data, config, stop)
    except FloatingPointError as error:
        stop_and_keep(accelerator, model, tokenizer, config, step, f"validation after {step} updates: {error}")
    if metrics is None:
        return False
    if config.metric_for_best_model != "loss":
        metrics |= score_sample(accelerator, model, tokenizer, data, config)
    log_metrics(accelerator, config, step, "validation", metrics)
    if step > 0:
        value = metrics[config.metric_for_best_model]
        checkpointer.save_if_best(step, model, value if config.metric_for_best_model == "loss" else -value)
    return True


def score_sample(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    config: TrainingConfig,
) -> dict[str, float]:
    """The ROUGE of metric_for_best_model, of greedy summaries of the first 64 validation rows, each row alike."""
    sample = data[:64]
    settings = EvaluationConfig(
        max_new_tokens=config.max_target_length, per_device_eval_batch_size=config.per_device_eval_batch_size
    )
    decode = functools.partial(decode_batch, accelerator.unwrap_model(model), config=settings)
    with evaluating(model):
        summaries = generate_texts(accelerator, decode, tokenizer, sample["input_ids"], settings)
    references = [[text] for text in tokenizer.batch_decode(sample["labels"], skip_special_tokens=True)]
    scores = score_texts([summary.text for summary in summaries], references, use_stemmer=False)[
        config.metric_for_best_model
    ]
    return {config.metric_for_best_model: float(np.mean(scores))}


def stop_and_keep(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    num_updates: int,
    what: str,
):
    """Save the model of the last good update, and raise what went wrong."""
    folder = Path(config.output_dir) / "last_good_model"
    if num_updates > 0:
        export_model(accelerator, model, tokenizer, folder)
        what += f"; the model after {num_updates} updates is in {folder}"
    accelerator.wait_for_everyone()  # the launcher kills the process that still writes when another one ends
    raise UserError(what)
