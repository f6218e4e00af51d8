"""What explains a ROUGE score: how long the texts are, and how much of them is the dialogue's own words."""

import itertools
import math
from collections import Counter

from utils.config import EvaluationConfig
from utils.scoring.metrics.words import share_unseen, split_words

LEAST_UNSEEN = 0.01  # share of the letters that is worth a sentence


def find_fragments(words: list[str], source: list[str]) -> list[int]:
    """Lengths of the text's extractive fragments: from left to right, the longest run of words that the source has.

    Grusky, Naaman and Artzi (2018), Newsroom: A Dataset of 1.3 Million Summaries with Diverse Extractive Strategies,
    figure 3.
    """
    places = {}
    for index, word in enumerate(source):
        places.setdefault(word, []).append(index)
    lengths, start = [], 0
    while start < len(words):
        longest = max((count_equal(words, start, source, place) for place in places.get(words[start], ())), default=0)
        if longest:
            lengths.append(longest)
        start += longest or 1
    return lengths


def count_equal(words: list[str], start: int, source: list[str], place: int) -> int:
    """Words that are the same from `start` and `place` on."""
    pairs = zip(words[start:], source[place:], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def describe_text(text: str, dialogue: str) -> dict[str, float | None]:
    """A text's length in words; the share of its words that lie in extractive fragments (coverage); the mean length
    in words of the fragment that a word lies in (density); the share of its bigrams that the dialogue has not, None
    if it has no bigram. All 0 of a text without words."""
    words, source = split_words(text), split_words(dialogue)
    fragments = find_fragments(words, source)
    known = set(zip(source, source[1:], strict=False))
    bigrams = list(zip(words, words[1:], strict=False))
    return {
        "words": len(words),
        "coverage": sum(fragments) / max(1, len(words)),
        "density": sum(length**2 for length in fragments) / max(1, len(words)),
        "novel_bigrams": sum(bigram not in known for bigram in bigrams) / len(bigrams) if bigrams else None,
    }


def describe_texts(
    texts: list[str], dialogues: list[str], truncated: list[bool | None] | None = None
) -> dict[str, float | None]:
    """Means over the texts of what describe_text says, and shares: of empty texts; of texts that were given to more
    than one dialogue, word for word (duplicates); of texts cut at max_new_tokens, None where that is not known.
    """
    described = [describe_text(text, dialogue) for text, dialogue in zip(texts, dialogues, strict=True)]
    num_dialogues_with = Counter(text for text, _ in set(zip(texts, dialogues, strict=True)))
    known = truncated is not None and None not in truncated
    return {
        "mean_words": mean([one["words"] for one in described]),
        "coverage": mean([one["coverage"] for one in described]),
        "density": mean([one["density"] for one in described]),
        "novel_bigrams": mean([one["novel_bigrams"] for one in described if one["novel_bigrams"] is not None]),
        "share_empty": mean([not text.strip() for text in texts]),
        "share_duplicates": mean([num_dialogues_with[text] > 1 for text in texts]),
        "share_truncated": mean(truncated) if known else None,
    }


def describe_notes(
    config: EvaluationConfig,
    texts: dict[str, list[str]],
    references: list[str],
    unknown: dict[str, list[str]],
) -> list[str]:
    """Sentences on what ROUGE and the models do not see: `texts[model]`, `unknown[model]`, see describe_unknown."""
    notes = [f"{name}: {sentence}." for name, sentences in unknown.items() for sentence in sentences]
    unseen = share_unseen(references)
    if config.rouge_tokenizer == "default" and unseen >= LEAST_UNSEEN:
        notes.append(
            f"ROUGE's default tokenizer drops {unseen:.1%} of the letters and digits of the references, all but a to "
            "z and 0 to 9: --rouge_tokenizer unicode keeps them."
        )
    if not config.rouge_newline:
        several = {name: sum("\n" in text for text in group) for name, group in texts.items()}
        several["the references"] = sum("\n" in text for text in references)
        counts = ", ".join(f"{number} of {name}" for name, number in several.items() if number)
        notes.append(
            f"rougeLsum compares line by line, and these texts have several lines: {counts}."
            if counts
            else "rougeLsum is rougeL here: every text has one line."
        )
    return notes


def mean(values: list[float]) -> float | None:
    # fsum rounds once, so that the order of the texts does not matter.
    return math.fsum(values) / len(values) if values else None
