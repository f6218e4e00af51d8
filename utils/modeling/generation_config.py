"""A model's decoding settings, read from its generation_config.json. The file may come from anyone, so values are
checked, and settings that our decoding does not follow are dropped."""

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from utils.config import TrainingConfig, UserError
from utils.prompting import DEFAULT_PROMPT, Prompt, find_prompt

logger = logging.getLogger(__name__)
# Settings that change no text, or are always given to generate().
OF_NO_TEXT = "_from_model_config|transformers_version|output_.*|return_dict_in_generate|use_cache|max_new_tokens"
TOKEN = "a token's number below {num_tokens}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # halves of characters


def is_count(value: Any, limit: float = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def is_list(value: Any, is_item: Callable[[Any], bool], least: int = 1) -> bool:
    return isinstance(value, list) and len(value) >= least and all(map(is_item, value))


def build_checks(num_tokens: int) -> dict[str, tuple[Callable[[Any], bool], str]]:
    """Of each setting that is followed: what its value must be, as a function and in words."""

    def is_token(value: Any) -> bool:
        return is_count(value, num_tokens)

    def are_tokens(value: Any) -> bool:
        return is_list(value, is_token)

    def is_biased(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and are_tokens(value[0]) and is_number(value[1])

    def is_decay(value: Any) -> bool:
        is_pair = isinstance(value, list) and len(value) == 2
        return is_pair and is_count(value[0]) and is_number(value[1]) and value[1] > 0

    token, tokens = (is_token, TOKEN), (lambda value: is_list(value, is_token, 0), f"a list of numbers, each {TOKEN}")
    ends = (lambda value: is_token(value) or are_tokens(value), f"{TOKEN}, or a list of them")
    count, flag = (is_count, "a whole number, not negative"), (lambda value: isinstance(value, bool), "true or false")
    checks = {
        **dict.fromkeys(("decoder_start_token_id", "bos_token_id", "pad_token_id", "forced_bos_token_id"), token),
        **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), ends),
        **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size"), count),
        **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), tokens),
        **dict.fromkeys(("remove_invalid_values", "renormalize_logits"), flag),
        "bad_words_ids": (lambda value: is_list(value, are_tokens), f"a list of lists of numbers, each {TOKEN}"),
        "sequence_bias": (lambda value: is_list(value, is_biased), f"a list of [[numbers, each {TOKEN}], number]"),
        "repetition_penalty": (lambda value: is_number(value) and value > 0, "a number above 0"),
        "exponential_decay_length_penalty": (is_decay, "[a whole number, a number above 0]"),
        "early_stopping": (lambda value: isinstance(value, bool) or value == "never", 'true, false or "never"'),
        **dict.fromkeys(Prompt._fields, (is_text, "a text")),
        "num_return_sequences": (lambda value: value == 1, "1: a dialogue has one summary"),
    }
    return {name: (check, words.format(num_tokens=f"{num_tokens:,}")) for name, (check, words) in checks.items()}


def read_settings(name_or_path: str, where: str) -> dict[str, Any] | None:
    """What the model's generation_config.json says, unchecked; None if it has none."""
    path = cached_file(name_or_path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    try:
        settings = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {GENERATION_CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{where}: {GENERATION_CONFIG_NAME} holds a {type(settings).__name__}, not settings by name")
    return settings


def set_generation_rules(model: PreTrainedModel, settings: dict[str, Any] | None, where: str):
    """Give the model a generation config of those of its own settings that our decoding follows. The names of the
    others are left in `model.unused_settings`. UserError for a value that cannot be meant.

    Args:
        settings: None if they are in the model's config.json, from which transformers has taken them.
        where: what to say before the mistake.
    """
    file = "config.json" if settings is None else GENERATION_CONFIG_NAME
    settings = model.generation_config.to_diff_dict() if settings is None else settings
    checks = build_checks(count_tokens(model))
    defaults, kept, unused = GenerationConfig().to_dict(), {}, []
    defaults |= GenerationConfig._get_default_generation_params()
    for name, value in settings.items():
        if name in checks and value is not None:
            check, words = checks[name]
            if not check(value):
                raise UserError(f"{where}: {file}: {name} is {json.dumps(value)[:80]}, and must be {words}")
            kept[name] = value
        elif name in defaults and value not in (None, defaults[name]) and not re.fullmatch(OF_NO_TEXT, name):
            unused.append(name)
    if len(kept.keys() & Prompt._fields) == 1:
        raise UserError(f"{where}: {file}: source_prefix and source_suffix belong together, and one is missing")
    if "exponential_decay_length_penalty" in kept and kept.get("eos_token_id") is None:
        raise UserError(f"{where}: {file}: exponential_decay_length_penalty needs an eos_token_id")
    if "repetition_penalty" in kept:
        kept["repetition_penalty"] = float(kept["repetition_penalty"])  # for transformers 2 is no number
    if "sequence_bias" in kept:
        kept["sequence_bias"] = [[tokens, float(bias)] for tokens, bias in kept["sequence_bias"]]
    try:
        model.generation_config, model.unused_settings = GenerationConfig(**kept), sorted(unused)
    except ValueError as error:  # two that contradict each other
        raise UserError(f"{where}: {file}: {' '.join(str(error).split())}") from error
    fill_in_start_token(model, where)


def fill_in_start_token(model: PreTrainedModel, where: str):
    """Fill in the token that starts a text, where one of the two configs lacks it. UserError where none has it."""
    config, generation_config = model.config, model.generation_config
    # In the order of generate(), which does not look into config.json.
    starts = (generation_config.decoder_start_token_id, generation_config.bos_token_id)
    start = next((token for token in starts if token is not None), getattr(config, "decoder_start_token_id", None))
    if start is None:
        raise UserError(f"{where}: config.json has no decoder_start_token_id, with which every summary starts")
    generation_config.decoder_start_token_id = start
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = start
    for name in ("pad_token_id", "decoder_start_token_id"):
        if not is_count(getattr(config, name), count_tokens(model)):
            words = TOKEN.format(num_tokens=f"{count_tokens(model):,}")
            raise UserError(f"{where}: config.json: {name} is {getattr(config, name)}, and must be {words}")


def count_tokens(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def set_generation_config(model: PreTrainedModel | PeftModel, config: TrainingConfig):
    """Have stock generate() write what evaluate_rouge.py does: greedily, texts as long as a target may be. The prompt
    stands beside."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    before = find_prompt(model.generation_config)
    if before not in (config.prompt, DEFAULT_PROMPT):
        logger.info("the model was trained with another prompt, %r and %r around the dialogue", *before)
    kept = {
        name: value
        for name, value in model.generation_config.to_diff_dict().items()
        if name not in ("early_stopping", *Prompt._fields)  # of beams; what would have it forget the prompt
    }
    model.generation_config = GenerationConfig(
        **kept, max_new_tokens=config.max_target_length, **config.prompt._asdict()
    )
