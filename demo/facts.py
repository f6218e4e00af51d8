"""Which facts a summary of the demo's world gets right, and the summaries that a blind guesser would give.

ROUGE forgives a wrong day or a swapped pair of speakers: most words still match. So facts are read out of a summary by
the same templates that write summaries: a word counts only in the role that it plays.
"""

import random
import re
from collections import Counter
from pathlib import Path

from demo.world import DAYS, WISHES
from utils.config import EvaluationConfig, UserError
from utils.data.rows import read_file
from utils.generation.partial_texts import Summary

_SLOTS = {
    "a": r"(?P<a>#Person[12]#)",
    "b": r"(?P<b>#Person[12]#)",
    "item": r"(?P<item>\w+)",
    "will": r"will(?: not)?",
}
_WHEN = rf"(?:on (?P<day>{'|'.join(DAYS)})|at (?P<hour>\w+ o'clock))"
_PLACE = r"at the (?P<place>\w+)"
_MEETINGS = [
    re.compile(rf"\b[Tt]hey will meet {first} {second}\.") for first, second in ((_WHEN, _PLACE), (_PLACE, _WHEN))
]


def _pattern(wish: str) -> re.Pattern:
    """Return the pattern that reads a sentence back which this template wrote."""
    pattern = wish
    for slot, group in _SLOTS.items():
        # A name used again in a template must be the same person again.
        pattern = pattern.replace(f"{{{slot}}}", group, 1).replace(f"{{{slot}}}", f"(?P={slot})")
    return re.compile(rf"{pattern}(?=[.,]| because )")


_WISHES = [_pattern(wish) for wishes in WISHES.values() for wish in wishes]


def extract_facts(summary: str) -> dict[str, str]:
    """Return who asks, the item, the time and the place that a summary states; what it does not state is left out."""
    facts = {}
    wish = next((match for pattern in _WISHES if (match := pattern.match(summary.strip()))), None)
    if wish and wish["a"] != wish.groupdict().get("b"):
        facts |= {"who": wish["a"], "item": wish["item"]}
    meeting = next((match for pattern in _MEETINGS if (match := pattern.search(summary))), None)
    if meeting:
        facts |= {"time": meeting["day"] or meeting["hour"], "place": meeting["place"]}
    return facts


def read_facts(config: EvaluationConfig, dialogues: list[dict]) -> list[dict[str, str]]:
    """The facts of each dialogue, which the demo's files hold beside its summary."""
    path = Path(getattr(config, f"{config.split}_file"))
    facts = {row.get("id"): row.get("facts") for _, row in read_file(path)}
    if not all(facts.get(dialogue["id"]) for dialogue in dialogues):
        raise UserError(f"--{config.split}_file {path}: rows without an id or facts, which --demo scores")
    return [facts[dialogue["id"]] for dialogue in dialogues]


def score_facts(
    summaries: dict[str, dict[str, Summary]], dialogues: list[dict], facts: list[dict[str, str]]
) -> dict[str, dict]:
    """`scores[model][kind]`: how many dialogues have that fact, how many summaries state it rightly, and which share
    one would get by always answering with the most common value."""
    scores = {name: {} for name in summaries}
    for kind in ("who", "item", "time", "place"):
        expected = {d["dialogue"]: fact[kind] for d, fact in zip(dialogues, facts, strict=True) if kind in fact}
        majority = max(Counter(expected.values()).values(), default=0) / max(1, len(expected))
        for name, by_dialogue in summaries.items():
            stated = {dialogue: extract_facts(by_dialogue[dialogue].text).get(kind) for dialogue in expected}
            correct = sum(stated[dialogue] == fact for dialogue, fact in expected.items())
            scores[name][kind] = {"correct": correct, "total": len(expected), "majority": majority}
    return scores


def guess_summaries(train_rows: list[dict], dialogues: list[dict], seed: int) -> dict[str, Summary]:
    """A random training summary for each dialogue."""
    rng = random.Random(seed)
    return {dialogue["dialogue"]: Summary(rng.choice(train_rows)["summary"], None) for dialogue in dialogues}
