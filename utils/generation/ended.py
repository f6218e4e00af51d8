"""Texts that have ended: how they are known, and how they leave the batch."""

import torch
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# Texts that have ended are taken out of the batch when they are this share of it.
ENDED_SHARE = 0.25


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
