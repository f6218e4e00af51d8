"""Beam search: generate()'s own, without computing what has ended or what a prompt's beams have in common."""

import torch
from transformers import (
    AttentionInterface,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils.generation.ended import ENDED_SHARE, cut_after_end, end_tokens, keep_rows, select_sources
from utils.modeling.families import takes_whole_mask

LOWEST = -1e9  # the score of a beam that is out of the race


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
