"""Load a model and its tokenizer, and check that they are what they should be."""

import json
import logging
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import cached_file

from utils.config import EvaluationConfig, TrainingConfig, UserError
from utils.execution.sharding import gather_tensor, zero3_loads_in
from utils.launch.hub import explain_hub_errors
from utils.launch.times import timed
from utils.modeling.adapters import load_adapted
from utils.modeling.families import (
    choose_attention,
    count_positions,
    record_head,
    share_embedding_module,
    use_whole_attention,
)
from utils.modeling.generation_config import read_settings, set_generation_rules
from utils.modeling.shapes import load_shapes

logger = logging.getLogger(__name__)
TOKENIZER_FILES = ("tokenizer*", "spiece.model")


def load_tokenizer(
    name_or_path: str, setting: str = "model_name_or_path", **settings: bool
) -> PreTrainedTokenizerBase:
    check_folder(name_or_path, setting)
    folder = Path(name_or_path)
    if folder.is_dir() and not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        raise UserError(f"--{setting} {name_or_path}: no tokenizer in this folder")  # transformers would invent one
    with explain_hub_errors(setting, name_or_path, "model"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **settings)
    if tokenizer.is_fast:  # as tokenising would leave it, which a warm cache spares: both are part of what is exported
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


@timed("the model")
def load_model(
    name_or_path: str,
    attn_implementation: str,
    dtype: torch.dtype,
    setting: str = "model_name_or_path",
    quantization_config: BitsAndBytesConfig | None = None,
    without_weights: bool = False,
    base_model: str | None = None,
) -> PreTrainedModel | PeftModel:
    """An encoder-decoder model, or what load_adapted makes of an adapter's folder; on the meta device if it is to be
    `without_weights`. `base_model` stands in for the base that the folder names."""
    check_folder(name_or_path, setting)
    if Path(name_or_path).is_dir():
        name_or_path = str(Path(name_or_path).resolve())  # an adapter remembers it, wherever it is used from
    where = f"--{setting} {name_or_path}"
    with explain_hub_errors(setting, name_or_path, "model"):
        if (Path(name_or_path) / "adapter_config.json").is_file():
            adapter_config = PeftConfig.from_pretrained(name_or_path)
            base_name = base_model or adapter_config.base_model_name_or_path
            if not base_name:
                raise UserError(f"{where}: adapter_config.json names no base")
            if Path(base_name).resolve() == Path(name_or_path):
                raise UserError(f"{where}: adapter_config.json names the adapter's own folder as its base")
            base_setting = "base_model_name_or_path" if base_model else f"{setting} {name_or_path}, its base"
            base = load_model(base_name, attn_implementation, dtype, base_setting, without_weights=without_weights)
            # With the adapter merged into it, its shape is the same.
            return base if without_weights else load_adapted(base, adapter_config, name_or_path, setting)
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        if not config.is_encoder_decoder:
            raise UserError(f"{where}: {config.model_type} is not an encoder-decoder model")
        use_whole_attention(config)
        own_rules = read_settings(name_or_path, where)
        load = load_shapes if without_weights else AutoModelForSeq2SeqLM.from_pretrained
        with zero3_loads_in(dtype):
            model, report = load(
                name_or_path, config=config, dtype=dtype, attn_implementation=choose_attention(attn_implementation),
                output_loading_info=True, quantization_config=quantization_config, trust_remote_code=False,
                # An empty one: the library is not to read what nobody has checked.
                generation_config=None if own_rules is None else GenerationConfig(),
            )  # fmt: skip
        if report["missing_keys"]:  # transformers would make them up
            raise UserError(f"{where}: its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
        if is_deepspeed_zero3_enabled():
            untie_head(model, name_or_path, setting)
        set_generation_rules(model, own_rules, where)
        if unused := sorted(report.get("unexpected_keys", ())):  # unknown without the weights
            logger.warning("%s: %d of its weights are not used, %s and so on", name_or_path, len(unused), unused[0])
    share_embedding_module(model)
    return record_head(model)


def untie_head(model: PreTrainedModel, name_or_path: str, setting: str):
    """Give the head its own weights back: transformers cannot see under ZeRO-3 that they are not the embedding's, and
    has tied the two."""
    name = "lm_head.weight"
    try:
        index = json.loads(Path(cached_file(name_or_path, "model.safetensors.index.json")).read_bytes())["weight_map"]
    except OSError:
        index = {name: "model.safetensors"}
    try:
        with safe_open(cached_file(name_or_path, index.get(name, "model.safetensors")), framework="pt") as weights:
            own = weights.get_tensor(name) if name in weights.keys() else None
    except OSError as error:
        raise UserError(f"--{setting} {name_or_path}: ZeRO-3 needs its weights as model.safetensors") from error
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if own is not None and not gather_tensor(embedding).cpu().equal(own := own.to(embedding.dtype)):
        head.weight = torch.nn.Parameter(own)


def check_folder(name_or_path: str, setting: str, advice: str = ""):
    """UserError for a path that is not there; the libraries would take it for a hub name."""
    path = Path(name_or_path)
    if not path.is_dir() and (path.is_absolute() or name_or_path.startswith(".") or path.exists()):
        raise UserError(f"--{setting} {name_or_path}: no such folder{advice}")


def check_sizes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig | EvaluationConfig):
    """UserError if the tokenizer is another model's, or if texts may be longer than the model can take; T5 takes any,
    BART as many as it has positions for."""
    num_tokens, num_embeddings = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().num_embeddings
    if num_tokens > num_embeddings:
        raise UserError(f"the tokenizer has {num_tokens} tokens and the model only {num_embeddings}: not a pair")
    sides = {"max_source_length": "encoder", "max_target_length": "decoder", "max_new_tokens": "decoder"}
    for name, side in sides.items():
        positions = count_positions(model.config, side)
        if side == "encoder" and isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            positions -= model.active_peft_config.num_virtual_tokens
        if getattr(config, name, 0) > positions:
            raise UserError(f"--{name} {getattr(config, name)}: the model takes {positions} tokens at most")
