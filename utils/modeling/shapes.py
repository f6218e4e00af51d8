"""A model without its weights, on the meta device, and how many weights and operations a model has."""

from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from utils.execution.sharding import whole_shape

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


def logical_shape(parameter: torch.Tensor) -> torch.Size:
    """Of the weight that a parameter stands for: 4-bit ones are packed, two to a byte."""
    quant_state = getattr(parameter, "quant_state", None)
    return quant_state.shape if quant_state else whole_shape(parameter)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters, a shared one counted once."""
    sizes = [(logical_shape(parameter).numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def count_saved_by_4bit(model: PreTrainedModel | PeftModel) -> int:
    """Bytes that --load_in_4bit saves of a model loaded without: bitsandbytes packs two weights into a byte, with an
    fp32 scale for each 64. It packs linear layers, but not the head nor those that the model wants in fp32."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head, kept, saved = base.get_output_embeddings(), set(base._keep_in_fp32_modules or ()), 0
    for name, module in base.named_modules():
        is_packed = module is not head and "lora_" not in name and not kept & set(name.split("."))
        if isinstance(module, torch.nn.Linear) and is_packed:
            saved += module.weight.nbytes - module.weight.numel() * 9 // 16
    return saved


def count_flops_per_token(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """Floating-point operations of one training step per (source token, target token).

    2 per weight of a matrix for the forward pass, 2 for the gradient of its input and, where it is trained, 2 for its
    own (Kaplan et al. 2020, section 2.1); the encoder's weights for source tokens, all others for target tokens, also
    cross-attention's keys and values, which really see the longer sources. Left out are the embedding's look-up and
    attention's products of activations: a low estimate. And padding, so that computing more of it is not speed.
    """
    encoder, embedding = set(model.get_encoder().parameters()), model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    flops = {True: 0, False: 0}
    for parameter in model.parameters():
        shape = logical_shape(parameter)
        if len(shape) == 2 and (parameter is not embedding or parameter is head):
            is_source = parameter in encoder and parameter is not head
            flops[is_source] += (6 if parameter.requires_grad else 4) * shape.numel()
    return flops[True], flops[False]
