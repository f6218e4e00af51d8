"""The instruction around a dialogue. A run's own travels with its model, in generation_config.json."""

from typing import Any, NamedTuple


class Prompt(NamedTuple):
    """What stands before and after a dialogue, the same in training and in generation."""

    source_prefix: str = "Summarize the following conversation.\n"
    source_suffix: str = "\nSummary:"


DEFAULT_PROMPT = Prompt()


def build_prompt(dialogue: str, prompt: Prompt = DEFAULT_PROMPT) -> str:
    return f"{prompt.source_prefix}{dialogue}{prompt.source_suffix}"


def find_prompt(generation_config: Any) -> Prompt:
    """That of a model's generation config, or of the settings in its file; the default if it has none."""
    settings = generation_config if isinstance(generation_config, dict) else vars(generation_config)
    parts = [settings.get(name) for name in Prompt._fields]
    return Prompt(*parts) if all(isinstance(part, str) for part in parts) else DEFAULT_PROMPT


def clean_text(text: str) -> str:
    """The text with Unix line ends and without blank space around it."""
    return text.replace("\r\n", "\n").strip()
