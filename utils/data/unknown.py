"""Characters that a tokenizer has no token for: T5's has no Chinese and no `{`. A model reads <unk> in their place,
and never writes them."""

import unicodedata
from collections import Counter
from typing import Any

from transformers import PreTrainedTokenizerBase

NUM_NAMED = 5
LEAST_SHARE = 0.01  # of the texts; fewer are not worth a line


def count_unknown(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Any]:
    """Shares of the texts that hold such a character and of all characters but blank space, and the commonest of them
    with their counts."""
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    counts = Counter()
    for text in texts:
        counts.update(text)
    characters = {character: number for character, number in counts.items() if not character.isspace()}
    unknown = Counter({name: number for name, number in characters.items() if is_unknown(tokenizer, name)})
    num_texts = sum(not unknown.keys().isdisjoint(text) for text in texts) if unknown else 0
    return {
        "share_of_texts": num_texts / max(1, len(texts)),
        "share_of_characters": sum(unknown.values()) / max(1, sum(characters.values())),
        "commonest": unknown.most_common(NUM_NAMED),
    }


def is_unknown(tokenizer: PreTrainedTokenizerBase, character: str) -> bool:
    return tokenizer.unk_token_id in tokenizer(character, add_special_tokens=False).input_ids


def keeps_line_ends(tokenizer: PreTrainedTokenizerBase) -> bool:
    """T5's does not: it makes a line end a blank."""
    return "\n" in tokenizer.decode(tokenizer("a\nb", add_special_tokens=False).input_ids)


def describe_unknown(tokenizer: PreTrainedTokenizerBase, dialogues: list[str], summaries: list[str]) -> list[str]:
    """What of dialogues a model cannot read, and what of summaries it cannot write; nothing if there is nothing."""
    lines = []
    for texts, kind, can in ((dialogues, "dialogues", "read"), (summaries, "summaries", "write")):
        found = count_unknown(tokenizer, texts)
        if found["share_of_texts"] >= LEAST_SHARE:
            named = ", ".join(f"{character} {number:,}" for character, number in found["commonest"])
            lines.append(
                f"the tokenizer has no token for {found['share_of_characters']:.2%} of the characters of the {kind} "
                f"(in {found['share_of_texts']:.1%} of them), so a model cannot {can} them: {named}"
            )
    share = sum("\n" in text for text in summaries) / max(1, len(summaries))
    if share >= LEAST_SHARE and not keeps_line_ends(tokenizer):
        lines.append(f"{share:.1%} of the summaries have several lines, and the tokenizer makes a line end a blank")
    return lines
