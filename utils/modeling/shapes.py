"""A model without its weights, on the meta device: for what can be known before they are loaded."""

from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def load_shapes(name_or_path: str, config: PretrainedConfig, **settings: Any) -> tuple[PreTrainedModel, dict]:
    """What AutoModelForSeq2SeqLM.from_pretrained gives, on the meta device, and its loading report. What the hub has
    and the cache has not is not downloaded, but for the head of its file, which says whether the model's head is its
    own."""
    unset_hf_deepspeed_config()  # ZeRO-3 would shard what is not there
    if is_at_hand(name_or_path):
        return AutoModelForSeq2SeqLM.from_pretrained(name_or_path, config=config, device_map="meta", **settings)
    try:
        names = huggingface_hub.get_safetensors_metadata(name_or_path).weight_map
    except huggingface_hub.errors.NotASafetensorsRepoError:  # such as mt5's, of which only the config is known then
        names = {}
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(
            config, dtype=settings["dtype"], attn_implementation=settings["attn_implementation"]
        )
    head = model.get_output_embeddings()
    if head is not None and "lm_head.weight" in names:
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    return model, {"missing_keys": set()}


def is_at_hand(name_or_path: str) -> bool:
    """Whether the weights are in a folder or in the hub's cache, or must be: where there is no hub to ask."""
    if constants.HF_HUB_OFFLINE or Path(name_or_path).is_dir():
        return True
    cached = (huggingface_hub.try_to_load_from_cache(name_or_path, file) for file in WEIGHT_FILES)
    return any(isinstance(path, str) for path in cached)  # it is no string for a file known not to exist
