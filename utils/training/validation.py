"""The validation loss, and the ROUGE of a sample where the best model is chosen by it."""

import functools
import math

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from utils.config import EvaluationConfig, TrainingConfig
from utils.data.batching import measure_lengths, plan_pass
from utils.data.micro_batches import launch_cost_on
from utils.data.prefetch import load_batches
from utils.execution.passes import evaluating, unwrap
from utils.generation.decoding import decode_batch
from utils.generation.summaries import cut_batches, generate_texts
from utils.launch.stopping import StopRequest
from utils.training.step import compute_target_logits, find_bad_examples

NUM_SAMPLES = 3


def compute_validation_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies, in nats, over a micro-batch's target tokens.

    Args:
        logits: (target tokens, vocabulary), fp32.
        targets: (target tokens,).
    """
    return cross_entropy(logits, targets, reduction="sum")


def evaluate_loss(
    accelerator: Accelerator, model: torch.nn.Module, data: datasets.Dataset, config: TrainingConfig, stop: StopRequest
) -> dict[str, float] | None:
    """Loss per target token over the whole set, whatever the number of processes; None if the run is to stop.
    FloatingPointError, on all of them, if it is not finite."""
    lengths = measure_lengths(data)
    rank, world, launch_cost = (
        accelerator.process_index,
        accelerator.num_processes,
        launch_cost_on(accelerator.device),
    )
    plan = plan_pass(lengths, config.eval_batch_size, rank, world, launch_cost)
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
        raise FloatingPointError(f"validation: the loss is not finite in micro-batches of {', '.join(ids)}")
    return {"loss": loss, "num_examples": len(data), "num_target_tokens": num_target_tokens}


def score_sample(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    config: TrainingConfig,
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """The ROUGE that metric_for_best_model names, its mean over greedy summaries of the first 64 validation rows; and
    NUM_SAMPLES of them as (reference, summary)."""
    from utils.scoring.metrics.rouge import score_texts  # here: its libraries take half a second, and few runs need it

    sample = data[:64]
    settings = EvaluationConfig(
        max_new_tokens=config.max_target_length, per_device_eval_batch_size=config.eval_batch_size
    )
    decode = functools.partial(decode_batch, unwrap(model), config=settings)
    with evaluating(model):
        batches = cut_batches(list(map(len, sample["input_ids"])), settings, accelerator.device)
        summaries = generate_texts(accelerator, decode, tokenizer, sample["input_ids"], batches, settings)
    references = [[text] for text in tokenizer.batch_decode(sample["labels"], skip_special_tokens=True)]
    predictions = [summary.text for summary in summaries]
    scores = score_texts(predictions, references, use_stemmer=False, tokenizer=config.rouge_tokenizer)
    samples = [(texts[0], s.text) for texts, s in zip(references, summaries, strict=True)][:NUM_SAMPLES]
    return {config.metric_for_best_model: float(np.mean(scores[config.metric_for_best_model]))}, samples
