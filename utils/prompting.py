"""The one place that knows the instruction text, the same in training and in generation."""

PROMPT_PREFIX = "Summarize the following conversation.\n"
PROMPT_SUFFIX = "\nSummary:"


def build_prompt(dialogue: str) -> str:
    return f"{PROMPT_PREFIX}{dialogue}{PROMPT_SUFFIX}"


def clean_text(text: str) -> str:
    """The text with Unix line ends and without blank space around it."""
    return text.replace("\r\n", "\n").strip()
