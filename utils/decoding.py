"""One batch of prompts to new tokens, with transformers' generate(), without computing texts that have ended."""

import hashlib

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.modeling_outputs import BaseModelOutput

from utils.config import EvaluationConfig

# Padded tokens that the encoder takes at once: enough to keep a device busy, and few enough that little is padding.
ENCODER_TOKENS = 2048
# A round of generate() ends when this share of its texts has ended; they are then taken out of the batch.
ENDED_SHARE = 0.25


@torch.no_grad()
def decode_batch(
    model: PreTrainedModel, prompts: list[list[int]], config: EvaluationConfig
) -> list[tuple[list[int], bool]]:
    """The new tokens of each prompt, and whether they were cut at max_new_tokens; the longest prompt first."""
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], batch_first=True)
    mask = mask.to(model.device)
    encoded = encode(model, prompts)
    if config.num_beams > 1:
        # generate() keeps a beam search's state to itself: the batch goes on until its last text has ended.
        output_ids = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=mask,
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
        )
        decoded = [cut_after_end(model, ids) for ids in output_ids[:, 1:].tolist()]
    else:
        numbers = draw_numbers(prompts, config) if config.do_sample else None
        decoded = decode_in_rounds(model, encoded, mask, numbers, config)
    return [(ids, is_truncated(model, ids, config.max_new_tokens)) for ids in decoded]


def encode(model: PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    """(prompts, longest prompt, d_model), zero where a prompt has ended; encoded in pieces of ENCODER_TOKENS."""
    pieces, start = [], 0
    while start < len(prompts):
        piece = prompts[start : start + max(1, ENCODER_TOKENS // len(prompts[start]))]
        input_ids = [torch.tensor(prompt) for prompt in piece]
        mask = pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True)
        padded = pad_sequence(input_ids, batch_first=True, padding_value=model.config.pad_token_id)
        hidden = model.get_encoder()(input_ids=padded.to(model.device), attention_mask=mask.to(model.device))
        pieces.append(hidden.last_hidden_state)
        start += len(piece)
    longest = max(map(len, prompts))
    return torch.cat([pad(piece, (0, 0, 0, longest - piece.shape[1])) for piece in pieces])


def decode_in_rounds(
    model: PreTrainedModel,
    encoded: torch.Tensor,
    mask: torch.Tensor,
    numbers: torch.Tensor | None,
    config: EvaluationConfig,
) -> list[list[int]]:
    """Greedy, or sampled with `numbers`: generate() until some texts have ended, and again for the others alone, from
    their cache.

    Args:
        encoded: (n, longest, d_model). mask: (n, longest), 1 where a prompt has a token.
        numbers: (n, max_new_tokens), uniform in [0, 1).
    """

    def enough_ended(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return (has_ended(model, ids).float().mean() >= ENDED_SHARE).expand(len(ids))

    ids = torch.full((len(encoded), 1), model.generation_config.decoder_start_token_id, device=model.device)
    cache, running, decoded = None, list(range(len(encoded))), [None] * len(encoded)
    while running:
        output = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=mask,
            decoder_input_ids=ids,
            decoder_attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=config.max_new_tokens + 1 - ids.shape[1],
            do_sample=False,  # sampling is a logits processor here
            num_beams=1,
            return_dict_in_generate=True,
            logits_processor=build_sampler(numbers, config),
            stopping_criteria=[enough_ended],
        )
        ids, cache = output.sequences, output.past_key_values
        ended = has_ended(model, ids) | (ids.shape[1] > config.max_new_tokens)
        for row in ended.nonzero().flatten().tolist():
            decoded[running[row]] = cut_after_end(model, ids[row, 1:].tolist())
        rows = (~ended).nonzero().flatten()
        running = [running[row] for row in rows.tolist()]
        if running:
            longest = int(mask[rows].sum(dim=1).max())
            ids, mask, encoded = ids[rows], mask[rows, :longest], encoded[rows, :longest]
            numbers = None if numbers is None else numbers[rows]
            cache.batch_select_indices(rows.cpu())  # a spread model's layers lie on several devices
            for layer in cache.cross_attention_cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :longest], layer.values[:, :, :longest]
    return decoded


def end_tokens(model: PreTrainedModel) -> list[int]:
    end = model.generation_config.eos_token_id
    return end if isinstance(end, list) else [end]


def has_ended(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """(n,): whether a text's tokens hold an end token; the first, which starts all texts, is one in some models."""
    return torch.isin(ids[:, 1:], torch.tensor(end_tokens(model), device=ids.device)).any(dim=1)


def cut_after_end(model: PreTrainedModel, ids: list[int]) -> list[int]:
    ends = [ids.index(token) for token in end_tokens(model) if token in ids]
    return ids[: min(ends) + 1] if ends else ids


def is_truncated(model: PreTrainedModel, ids: list[int], max_new_tokens: int) -> bool:
    """Whether a text has no end of its own: some models are made to put an end token at the limit."""
    at_limit = len(ids) >= max_new_tokens and model.generation_config.forced_eos_token_id is not None
    return at_limit or not ids or ids[-1] not in end_tokens(model)


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
