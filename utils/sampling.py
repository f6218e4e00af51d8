"""Tokens drawn at random, but of each text with numbers of its own."""

import hashlib

import torch
from transformers import LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from utils.config import EvaluationConfig


def draw_numbers(prompts: list[list[int]], config: EvaluationConfig) -> torch.Tensor:
    """(n, max_new_tokens) of uniform numbers, one for each token to draw. They follow from the seed and the prompt
    alone, so that a text depends neither on its batch nor on the number of processes."""
    rows = []
    for prompt in prompts:
        digest = hashlib.sha256(f"{config.seed} {prompt}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.rand(config.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def build_sampler(numbers: torch.Tensor | None, config: EvaluationConfig) -> LogitsProcessorList:
    """What leaves each text one token, drawn with its number from the distribution that temperature, top_k and top_p
    make of the logits; nothing if there are no numbers."""

    def draw(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # The inverse of the distribution function, over tokens of falling probability: one number a token, where
        # torch.multinomial would draw from one generator for the whole batch.
        probabilities, tokens = scores.double().softmax(dim=1).sort(dim=1, descending=True, stable=True)
        cumulative = probabilities.cumsum(dim=1)
        number = numbers[:, ids.shape[1] - 1, None].to(scores.device)
        chosen = (cumulative <= number * cumulative[:, -1:]).sum(dim=1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.gather(1, chosen), 0)

    if numbers is None:
        return LogitsProcessorList()
    processors = []
    if config.temperature != 1:
        processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    return LogitsProcessorList([*processors, draw])
