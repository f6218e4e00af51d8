"""Adapters of any of PEFT's kinds: merge one into its base, and check that it is what it says."""

import re
import signal
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from utils.config import UserError
from utils.modeling.families import record_head
from utils.modeling.generation_config import read_settings, set_generation_rules

SECONDS_FOR_PATTERNS = 5


def load_adapted(
    base: PreTrainedModel, adapter_config: PeftConfig, folder: str, setting: str
) -> PreTrainedModel | PeftModel:
    """The base with the adapter merged into it, or beside it if it is a learned prefix, which changes no weight."""
    where = f"--{setting} {folder}"
    check_patterns(adapter_config, base, where)
    if hasattr(adapter_config, "num_tasks"):
        raise UserError(f"{where}: its prompts are for several tasks, and a dialogue has no task's number")
    with warnings.catch_warnings(action="ignore"):  # of weights that are missing, which check_adapter tells
        adapted = PeftModel.from_pretrained(base, folder)
    check_adapter(adapted, Path(folder) / "adapter_model.safetensors", setting)
    if not adapter_config.is_prompt_learning:
        check_shared(adapted, where)
        adapted = record_head(adapted.merge_and_unload().requires_grad_(True))  # merging leaves the weights frozen
    if (Path(folder) / GENERATION_CONFIG_NAME).is_file():
        set_generation_rules(adapted, read_settings(folder, where), where)
    return adapted


def check_patterns(adapter_config: PeftConfig, base: PreTrainedModel, where: str):
    """UserError if a regular expression of the adapter's cannot be read, or takes ever longer: the folder may be
    anybody's."""
    values = [getattr(adapter_config, name, None) for name in ("target_modules", "exclude_modules")]
    patterns = [value for value in values if isinstance(value, str)]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns += getattr(adapter_config, name, None) or {}

    def stop(number: int, frame: FrameType | None):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_FOR_PATTERNS)
    try:
        for pattern in patterns:
            for name, _ in base.named_modules():
                re.fullmatch(rf"(.*\.)?({pattern})", name)
    except (re.error, TimeoutError) as error:
        what = error if isinstance(error, re.error) else f"does not end within {SECONDS_FOR_PATTERNS} s"
        raise UserError(f"{where}: adapter_config.json: the regular expression {pattern!r}: {what}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_adapter(model: PeftModel, path: Path, setting: str):
    """UserError if the file's weights are not those of the adapter: PEFT leaves what is missing at its first value."""

    def clean(names: Iterable[str]) -> set[str]:
        return {re.sub(r"(magnitude_vector)\.weight$", r"\1", name) for name in names}

    if path.is_file():
        with safe_open(path, framework="pt") as weights:
            found = clean(weights.keys())
        expected = clean(get_peft_model_state_dict(model, save_embedding_layers=False))
        if differing := expected - found or {name for name in found - expected if ".lora_" in name}:
            raise UserError(
                f"--{setting} {path.parent}: {path.name} and adapter_config.json differ in {len(differing)} weights, "
                f"{min(differing)} and so on"
            )


def check_shared(model: PeftModel, where: str):
    """UserError if merging the adapter would change more than the layers that it adapts."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        base_layer = getattr(module, "base_layer", None)
        if base_layer is not None and any(uses[id(parameter)] > 1 for parameter in base_layer.parameters()):
            name = name.removeprefix("base_model.model.")
            shared = f"it adapts {name}, which shares its weights with other layers"
            raise UserError(f"{where}: {shared}, so it cannot be merged")
