"""One batch of prompts to new tokens, with transformers' generate(), without computing texts that have ended."""

from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AttentionInterface,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput

from utils.config import DecodingConfig, EvaluationConfig
from utils.modeling.families import takes_whole_mask

# Padded tokens that the encoder takes at once: enough to keep a device busy, and few enough that little is padding.
# The CPU's was measured.
ENCODER_TOKENS = {"cpu": 2048, "cuda": 32_768}
# Share of a GPU's memory for a batch's keys and values.
CACHE_SHARE = 0.25
# Texts that have ended are taken out of the batch when they are this share of it.
ENDED_SHARE = 0.25
# The score of a beam that is out of the race.
LOWEST = -1e9


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


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention, where the beams of a prompt may share its keys and values. It takes that one's
    place in all models.

    Args:
        query: (beams, heads, tokens, width). key, value: (beams or prompts, heads, keys, width).
        attention_mask: (beams or prompts, 1, 1, keys) if the keys are shared.
    """
    num_beams = len(query) // len(key)
    if num_beams == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    together = query.unflatten(0, (-1, num_beams)).transpose(1, 2).flatten(2, 3)  # a prompt's beams are one's tokens
    attended, _ = sdpa_attention_forward(module, together, key, value, attention_mask, **kwargs)
    return attended.unflatten(1, (num_beams, -1)).flatten(0, 1), None  # (beams, tokens, heads, width)


AttentionInterface.register("sdpa", attend)


def beams_share(model: PreTrainedModel) -> bool:
    """Whether one row of keys and values in the cross-attention can serve all beams of a prompt."""
    return takes_whole_mask(model)


def search_beams(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs,
) -> list[list[int]]:
    """The best text of each prompt. It is generate()'s own beam search, step for step, but for two things: prompts
    whose search has ended leave the batch, and what all beams of a prompt have in common is computed once: the first
    token, and the cross-attention's keys and values, which are kept once if beams_share.

    Args: what generate() gives to its `custom_generate`; a row is one beam of one prompt.
    """
    num_beams, max_length = generation_config.num_beams, generation_config.max_length
    encoded, mask, cache = (model_kwargs[name] for name in ("encoder_outputs", "attention_mask", "past_key_values"))
    encoded, mask = select_sources(torch.arange(0, len(input_ids), num_beams), encoded, mask)
    share = beams_share(model)
    penalty, early_stopping = generation_config.length_penalty, generation_config.early_stopping
    num_prompts, device = len(input_ids) // num_beams, input_ids.device
    # Enough of the likeliest continuations that num_beams of them go on even if all others end.
    num_candidates = max(2, 1 + len(end_tokens(model))) * num_beams
    decoded, running = [None] * num_prompts, list(range(num_prompts))
    # The beams that go on, and the sum of their tokens' log probabilities. At first all are one: a single one counts.
    ids = input_ids.new_zeros(num_prompts, num_beams, max_length)
    ids[:, :, 0] = input_ids.view(num_prompts, num_beams)
    totals = torch.full((num_prompts, num_beams), LOWEST, device=device)
    totals[:, 0] = 0
    # The best ended texts of each prompt, best first, and their scores: LOWEST where there is none yet.
    texts, scores = torch.zeros_like(ids), torch.full_like(totals, LOWEST)
    closed = torch.zeros((num_prompts, 1), dtype=torch.bool, device=device)  # whether a prompt's search has ended

    for length in range(1, max_length):
        last_tokens = ids[:, :, length - 1] if length > 1 else ids[:, :1, 0]
        output = model(
            encoder_outputs=encoded, attention_mask=mask[:, None, None].bool() if share else mask,
            past_key_values=cache, decoder_input_ids=last_tokens.reshape(-1, 1), use_cache=True,
        )  # fmt: skip
        log_probs = output.logits[:, -1].to(device, torch.float32).log_softmax(dim=-1)
        if length == 1:
            log_probs = log_probs.repeat_interleave(num_beams, dim=0)
            cache.self_attention_cache.batch_repeat_interleave(num_beams)
            if not share:
                cache.cross_attention_cache.batch_repeat_interleave(num_beams)
                beams = torch.arange(num_prompts, device=device).repeat_interleave(num_beams)
                encoded, mask = select_sources(beams, encoded, mask)
        log_probs = logits_processor(ids[:, :, :length].flatten(0, 1), log_probs)
        sums = (log_probs.view(*totals.shape, -1) + totals[:, :, None]).flatten(1)
        candidate_totals, indices = sums.topk(min(num_candidates, sums.shape[1]))
        beams, tokens = indices // log_probs.shape[-1], indices % log_probs.shape[-1]
        candidates = pick(ids, beams)
        candidates[:, :, length] = tokens
        ended = stopping_criteria(candidates[:, :, : length + 1].flatten(0, 1), None).view_as(tokens)

        # An ended beam counts as a text only if it is among the first num_beams.
        new_scores = (candidate_totals / length**penalty).masked_fill(~ended | closed, LOWEST)[:, :num_beams]
        scores, chosen = torch.cat((scores, new_scores), dim=1).topk(num_beams)
        texts = pick(torch.cat((texts, candidates[:, :num_beams]), dim=1), chosen)
        totals, chosen = (candidate_totals + LOWEST * ended).topk(num_beams)
        ids, beams = pick(candidates, chosen), pick(beams, chosen)
        first_beams = torch.arange(0, len(ids) * num_beams, num_beams, device=device)[:, None]
        cache.self_attention_cache.reorder_cache((first_beams + beams).flatten())

        # As good as a beam can still become: an estimate, as in _check_early_stop_heuristic of transformers.
        best_length = max_length - 1 if early_stopping == "never" and penalty > 0 else length
        closed |= totals[:, :1] / best_length**penalty <= scores[:, -1:]
        if early_stopping is True:
            closed |= scores[:, -1:] > LOWEST  # there are num_beams texts
        closed |= length == max_length - 1
        if closed.float().mean() >= ENDED_SHARE:
            for row in closed[:, 0].nonzero().flatten().tolist():
                decoded[running[row]] = cut_after_end(model, texts[row, 0, 1:].tolist())
            rows = (~closed[:, 0]).nonzero().flatten()
            running = [running[row] for row in rows.tolist()]
            if not running:
                break
            ids, totals, texts, scores, closed = (x[rows] for x in (ids, totals, texts, scores, closed))
            beams = (rows[:, None] * num_beams + torch.arange(num_beams, device=device)).flatten()
            encoded, mask = keep_rows(beams, rows if share else beams, encoded, mask, cache)
    return decoded


def pick(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(prompts, beams, ...) by (prompts, k): each prompt's k beams."""
    return values.take_along_dim(indices.view(*indices.shape, *[1] * (values.dim() - 2)), dim=1)


def keep_rows(
    texts: torch.Tensor,
    sources: torch.Tensor,
    encoded: BaseModelOutput,
    mask: torch.Tensor,
    cache: EncoderDecoderCache,
) -> tuple[BaseModelOutput, torch.Tensor]:
    """What select_sources returns; the cache is changed: its self-attention keeps the rows of these texts, its
    cross-attention those of these sources."""
    encoded, mask = select_sources(sources, encoded, mask)
    cache.self_attention_cache.batch_select_indices(texts)
    cache.cross_attention_cache.batch_select_indices(sources)
    for layer in cache.cross_attention_cache.layers:
        layer.keys, layer.values = layer.keys[:, :, : mask.shape[1]], layer.values[:, :, : mask.shape[1]]
    return encoded, mask


def select_sources(
    rows: torch.Tensor, encoded: BaseModelOutput, mask: torch.Tensor
) -> tuple[BaseModelOutput, torch.Tensor]:
    """`encoded` and `mask` of these rows of the batch, as wide as their longest prompt."""
    longest = int(mask[rows].sum(dim=1).max())
    return type(encoded)(last_hidden_state=encoded.last_hidden_state[rows, :longest]), mask[rows, :longest]


def end_tokens(model: PreTrainedModel) -> list[int]:
    end = model.generation_config.eos_token_id
    return [] if end is None else end if isinstance(end, list) else [end]


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
