"""One batch of prompts to new tokens, with transformers' generate(), without computing texts that have ended."""

from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from utils.config import DecodingConfig, EvaluationConfig
from utils.generation.beams import search_beams
from utils.generation.ended import ENDED_SHARE, cut_after_end, has_ended, is_truncated, keep_rows

# Padded tokens that the encoder takes at once: enough to keep a device busy, and few enough that little is padding.
# The CPU's was measured.
ENCODER_TOKENS = {"cpu": 2048, "cuda": 32_768}
# Share of a GPU's memory for a batch's keys and values.
CACHE_SHARE = 0.25


@torch.no_grad()
def decode_batch(
    model: PreTrainedModel, prompts: list[list[int]], config: EvaluationConfig
) -> list[tuple[list[int], bool]]:
    """The new tokens of each prompt, and whether they were cut at max_new_tokens; the longest prompt first."""
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], batch_first=True)
    mask = mask.to(model.device)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        decoded = decode_with_prefix(model, prompts, mask, config)
        return [(ids, is_truncated(model, ids, config.max_new_tokens)) for ids in decoded]
    encoded = encode(model, prompts)
    if config.num_beams > 1:
        decoded = model.generate(
            encoder_outputs=encoded, attention_mask=mask, max_new_tokens=config.max_new_tokens, do_sample=False,
            num_beams=config.num_beams, length_penalty=config.length_penalty, use_cache=True,
            custom_generate=search_beams, **choose_limits(model, config),
        )  # fmt: skip
    else:
        decoded = decode_in_rounds(model, encoded, mask, config)
    return [(ids, is_truncated(model, ids, config.max_new_tokens)) for ids in decoded]


def decode_with_prefix(
    model: PeftModel, prompts: list[list[int]], mask: torch.Tensor, config: DecodingConfig
) -> list[list[int]]:
    """For prompt or prefix tuning: only PEFT's generate() inserts the learned prefix. Texts that have ended stay
    in the batch."""
    input_ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], True, model.config.pad_token_id)
    output = model.generate(
        input_ids=input_ids.to(model.device), attention_mask=mask, max_new_tokens=config.max_new_tokens,
        do_sample=False, num_beams=config.num_beams, length_penalty=config.length_penalty,
        **choose_limits(model, config),
    )  # fmt: skip
    return [cut_after_end(model, ids[1:].tolist()) for ids in output]


def choose_limits(model: PreTrainedModel, config: DecodingConfig) -> dict[str, int]:
    """The shortest text and the shortest repetition that is not allowed: the config's, or the model's own."""
    names = ("min_new_tokens", "no_repeat_ngram_size")
    values = {name: getattr(config, name) or getattr(model.generation_config, name, None) for name in names}
    return {name: value for name, value in values.items() if value}


def shift_limits(model: PreTrainedModel, config: DecodingConfig, num_done: int) -> dict[str, Any]:
    """Settings that generate() counts from where it starts, for a round that goes on with texts of num_done tokens."""
    own, rules = model.generation_config, {}
    if min_new_tokens := choose_limits(model, config).get("min_new_tokens"):
        rules["min_new_tokens"] = max(0, min_new_tokens - num_done)
    if own.begin_suppress_tokens and num_done > (own.forced_bos_token_id is not None):
        rules["begin_suppress_tokens"] = None
    if own.exponential_decay_length_penalty:
        start, factor = own.exponential_decay_length_penalty
        rules["exponential_decay_length_penalty"] = (start - num_done, factor)
    return rules


def count_cached_tokens(model: PreTrainedModel, config: EvaluationConfig) -> int | None:
    """How many tokens, of prompts and new ones, CACHE_SHARE of the GPU's memory holds; None on a CPU, or where the
    user has said how many prompts are to be taken."""
    if model.device.type != "cuda" or config.per_device_eval_batch_size != "auto":
        return None
    return int(
        CACHE_SHARE * torch.cuda.get_device_properties(model.device).total_memory / cached_bytes_per_token(model)
    )


@torch.no_grad()
def cached_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of one source token's keys and values in all layers; a new token takes as many."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    token = torch.full((1, 1), model.config.pad_token_id, device=model.device)
    cache = model(input_ids=token, decoder_input_ids=token, use_cache=True).past_key_values.cross_attention_cache
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def encode(model: PreTrainedModel, prompts: list[list[int]]) -> BaseModelOutput:
    """Its last_hidden_state is (prompts, longest prompt, d_model), zero where a prompt has ended; encoded in pieces of
    ENCODER_TOKENS."""
    num_tokens = ENCODER_TOKENS.get(model.device.type, ENCODER_TOKENS["cuda"])
    pieces, start = [], 0
    while start < len(prompts):
        piece = prompts[start : start + max(1, num_tokens // len(prompts[start]))]
        input_ids = [torch.tensor(prompt) for prompt in piece]
        mask = pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True)
        padded = pad_sequence(input_ids, batch_first=True, padding_value=model.config.pad_token_id)
        hidden = model.get_encoder()(input_ids=padded.to(model.device), attention_mask=mask.to(model.device))
        pieces.append(hidden.last_hidden_state)
        start += len(piece)
    longest = max(map(len, prompts))
    whole = torch.cat([pad(piece, (0, 0, 0, longest - piece.shape[1])) for piece in pieces])
    return type(hidden)(last_hidden_state=whole)  # some decoders look for what their own encoder's class has


def decode_in_rounds(
    model: PreTrainedModel, encoded: BaseModelOutput, mask: torch.Tensor, config: DecodingConfig
) -> list[list[int]]:
    """Greedy: generate() until some texts have ended, and again for the others alone, from their cache.

    Args:
        encoded: what `encode` returns. mask: (n, longest), 1 where a prompt has a token.
    """

    def enough_ended(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return (has_ended(model, ids).float().mean() >= ENDED_SHARE).expand(len(ids))

    max_new_tokens = config.max_new_tokens
    ids = torch.full((len(mask), 1), model.generation_config.decoder_start_token_id, device=model.device)
    cache, running, decoded = None, list(range(len(mask))), [None] * len(mask)
    while running:
        output = model.generate(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids,
            decoder_attention_mask=torch.ones_like(ids), past_key_values=cache,
            max_new_tokens=max_new_tokens + 1 - ids.shape[1], stopping_criteria=[enough_ended],
            do_sample=False, num_beams=1, use_cache=True, return_dict_in_generate=True,
            **choose_limits(model, config) | shift_limits(model, config, ids.shape[1] - 1),
        )  # fmt: skip
        ids, cache = output.sequences, output.past_key_values
        ended = has_ended(model, ids) | (ids.shape[1] > max_new_tokens)
        for row in ended.nonzero().flatten().tolist():
            decoded[running[row]] = cut_after_end(model, ids[row, 1:].tolist())
        rows = (~ended).nonzero().flatten()
        running = [running[row] for row in rows.tolist()]
        if running:
            ids = ids[rows]
            encoded, mask = keep_rows(rows, rows, encoded, mask, cache)
    return decoded
