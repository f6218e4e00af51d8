"""What encoder-decoder models do each in their own way: attention and its masks, the tokens that start and pad, how
targets become the decoder's input, how long texts may be, which weights are one. The model is asked, not its name."""

import logging
import math

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from utils.config import UserError

logger = logging.getLogger(__name__)


def choose_attention(wanted: str) -> str | None:
    """What from_pretrained is to be given. None is sdpa in each part of the model that has it, and eager in others."""
    return None if wanted == "sdpa" else wanted


def use_whole_attention(config: PretrainedConfig):
    """BigBird's block-sparse attention draws blocks at random, and depends on how a batch is padded."""
    for part in (config, getattr(config, "encoder", None)):
        if getattr(part, "attention_type", None) == "block_sparse":
            part.attention_type = "original_full"


def log_attention(model: PreTrainedModel, wanted: str):
    """Call this after all checks of the user's input, so that an error stays the only line in the log."""
    if model.config._attn_implementation != wanted:
        full = " and full, not sparse" * (getattr(model.config, "attention_type", None) == "original_full")
        logger.info("attention is eager%s: %s has no %s", full, model.config.model_type, wanted)


def takes_whole_mask(model: PreTrainedModel) -> bool:
    """Whether the encoder's attention mask may be (examples, 1, 1, source), which transformers uses as it is. Eager
    attention wants another kind, and layers that see different things make their own from (examples, source)."""
    parts = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return all(part._attn_implementation == "sdpa" and getattr(part, "layer_types", None) is None for part in parts)


def check_trainable(model: PreTrainedModel | PeftModel, where: str):
    """UserError if the model's own loss is more than the cross-entropy of the target tokens, which is what is trained
    on, or if it is a learned prefix beside a model.

    Args:
        where: what to say before the mistake.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise UserError(f"{where}: holds a learned prefix, which cannot be trained further; give its base model")
    if getattr(model.config, "ngram", None):  # ProphetNet's
        raise UserError(f"{where}: its loss predicts several tokens at once and changes with the padding of targets")
    if getattr(model.config, "output_router_logits", False):
        raise UserError(f"{where}: output_router_logits in its config.json adds losses that are not computed here")


def shift_targets(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """The decoder's input that goes with labels, of (examples, longest target), -100 where one has ended. It is what
    the model makes of them in its own loss."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, model.config.pad_token_id)


def count_positions(config: PretrainedConfig, side: str) -> float:
    """How many tokens the model's "encoder" or "decoder" has positions for; T5's takes any number."""
    part = getattr(config, side, None)
    part = part.get_text_config() if isinstance(part, PretrainedConfig) else config
    names = (f"max_{side}_position_embeddings", "max_position_embeddings")
    return next((getattr(part, name) for name in names if getattr(part, name, None)), math.inf)


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the head's matrix is that of an embedding, the encoder's or the decoder's or both's."""
    head = model.get_output_embeddings()
    embeddings = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    return head is not None and any(module.weight is head.weight for module in embeddings if module is not head)


def record_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model, its config saying whether the head is an embedding.

    transformers 5 sets `tie_word_embeddings` in every T5 config, whatever the checkpoint holds. Flan-T5's head is its
    own: a later `tie_weights()` would destroy it, and a config that says otherwise misleads other versions. PEFT, once
    it has merged, denies a tie to the decoder's embedding.
    """
    is_tied = has_tied_head(model)
    if getattr(model.config, "tie_word_embeddings", True) != is_tied:
        model.config.tie_word_embeddings = is_tied
    return model


def check_head(model: PreTrainedModel):
    """RuntimeError if a wrapper or a checkpoint has tied a head that has its own weights to the embedding."""
    if has_tied_head(model) and not getattr(model.config, "tie_word_embeddings", True):
        raise RuntimeError("lm_head has been tied to the embedding, and its own weights are lost")


def share_embedding_module(model: PreTrainedModel):
    """T5's and BART's encoder and decoder have modules of their own around one embedding matrix, of which FSDP2 would
    shard the first and miss the others."""
    embedding = model.get_input_embeddings()
    for module in model.modules():
        for name, child in module.named_children():
            # BART's kind of module multiplies; one of another kind does something else with the matrix.
            if type(child) is type(embedding) and child.weight is embedding.weight:
                setattr(module, name, embedding)
