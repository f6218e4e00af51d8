"""What a summary states and its dialogue does not hold: numbers and names; and whether it is in another script.

Words are compared, nothing is understood: what the dialogue says of something else is not found. How often people's
own summaries are marked: utils/README.md.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import regex

UP_TO_19 = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
VALUES = {word: value for value, word in enumerate(UP_TO_19.split())}
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES |= {word: 10 * value for value, word in enumerate(TENS.split(), start=2)}
VALUES |= {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
VALUES |= {"first": 1, "second": 2, "third": 3, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12}
ENDINGS = (("", ""), ("ieth", "y"), ("th", ""), ("ies", "y"), ("s", ""))  # of ordinals and plurals
NO_NUMBERS = {"zero", "one", "ones", "first", "second", "seconds"}  # alone: `no one`, `at first`, `wait a second`
# What a dialogue says in another word: `half past`, `half price`, `a quarter to`.
IMPLIED = {
    "half": (30, 50), "quarter": (15, 25, 45), "couple": (2,), "both": (2,), "pair": (2,), "twice": (2,),
    "double": (2,), "triple": (3,), "dozen": (12,), "noon": (12,), "midnight": (12,),
}  # fmt: skip
LETTERS = r"\p{L}[\p{L}\p{M}]*"
PART = regex.compile(rf"(?<![\p{{L}}\p{{M}}\d])(?:\d{{1,3}}(?:,\d{{3}}){{1,4}}(?!\d)|\d{{1,15}})|{LETTERS}")
# `10:30`, `twenty-five`, `two hundred and one`.
BETWEEN_PARTS = regex.compile(r"[ .:-]|(?<=hundred|thousand|million|billion) and ", regex.IGNORECASE)
WORD = regex.compile(rf"#\w+#|{LETTERS}")
NAME = regex.compile(r"#\w+#|(?<![\p{L}\p{M}])\p{Lu}[\p{L}\p{M}]+")  # not `I`
SENTENCE_BEGINS = regex.compile(r"(?:^|[.!?:;…\n])[^\p{L}\p{N}#]*$")
TITLE = regex.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|\p{Lu})\. *$")
CONTEXT = 20  # characters before a name that tell whether a sentence begins with it
SCRIPTS = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}  # Japanese mixes the three


class Number(NamedTuple):
    text: str
    values: tuple[int, ...]  # of `twenty-five` 25, of `10:30` 10 and 30


class Held(NamedTuple):
    """What a dialogue holds."""

    numbers: frozenset[int]
    words: frozenset[str]
    script: str | None


def find_unsupported(text: str, dialogue: str, ordinary: set[str]) -> dict[str, Any]:
    """The numbers and the names that the dialogue does not hold, as they stand in the text, and whether most letters
    are of another script. A word that is `ordinary` is no name at the start of a sentence."""
    held = read_dialogue(dialogue)
    numbers = [
        number.text
        for number in find_numbers(text)
        if not held.numbers.issuperset(number.values) and join_digits(number.values) not in held.numbers
    ]
    names = []
    for match in NAME.finditer(text):
        word, before = normalize(match[0]), text[max(0, match.start() - CONTEXT) : match.start()]
        is_start = SENTENCE_BEGINS.search(before) and not TITLE.search(before)
        if word not in held.words and not (is_start and word in ordinary):
            names.append(match[0])
    scripts = {main_script(text), held.script} - {None}
    return {"numbers": numbers, "names": names, "other_script": len(scripts) == 2}


def find_all_unsupported(texts: list[str], dialogues: list[str], ordinary: set[str]) -> list[dict[str, Any]]:
    return [find_unsupported(text, dialogue, ordinary) for text, dialogue in zip(texts, dialogues, strict=True)]


def share_unsupported(found: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the texts that have any."""
    return {kind: sum(bool(one[kind]) for one in found) / len(found) for kind in ("numbers", "names", "other_script")}


def find_ordinary(texts: Iterable[str]) -> set[str]:
    """The words that the texts have in lower case."""
    return {normalize(word) for text in texts for word in WORD.findall(text) if word.islower()}


@functools.lru_cache(maxsize=1024)  # a dialogue has several texts
def read_dialogue(dialogue: str) -> Held:
    # DialogSum writes 20,000 as `20, 000`; both are read, since `20, 100` may be two numbers.
    numbers = set()
    for text in (dialogue, re.sub(r"(?<=\d), (?=\d{3}\b)", ",", dialogue)):
        numbers.update(value for part in PART.findall(text) if (value := value_of(part)) is not None)
        for number in find_numbers(text):
            numbers.update(number.values, [join_digits(number.values)])
    words = frozenset(normalize(word) for word in WORD.findall(dialogue))
    numbers.update(value for word, values in IMPLIED.items() if word in words for value in values)
    return Held(frozenset(numbers), words, main_script(dialogue))


def find_numbers(text: str) -> list[Number]:
    """From left to right; digits and number words that stand side by side are one number."""
    runs, end = [], None
    for match in PART.finditer(text):
        if value_of(match[0]) is None:
            continue
        if end is None or not BETWEEN_PARTS.fullmatch(text, end, match.start()):
            runs.append([])
        runs[-1].append(match)
        end = match.end()
    numbers = []
    for run in runs:
        parts = [match[0] for match in run]
        if parts[1:] or parts[0].lower() not in NO_NUMBERS:
            numbers.append(Number(text[run[0].start() : run[-1].end()], join_parts(parts)))
    return numbers


@functools.lru_cache(maxsize=65536)
def value_of(part: str) -> int | None:
    """Of digits or of a number's word, which may be an ordinal or a plural; None of any other word."""
    if part[0].isdigit():
        return int(part.replace(",", ""))
    word = part.lower()
    stems = [word.removesuffix(ending) + instead for ending, instead in ENDINGS if word.endswith(ending)]
    return next((VALUES[stem] for stem in stems if stem in VALUES), None)


def join_parts(parts: list[str]) -> tuple[int, ...]:
    """The values that the parts of a number make together: `two hundred fifty` one, `nineteen eighty` two."""
    values, before = [], 0  # the value of the word before, 0 if it was digits
    for part in parts:
        value, is_digits = value_of(part), part[0].isdigit()
        if is_digits or not values:
            values.append(value)
        elif value >= 100 and (multiplied := values[-1] % value):  # of `one thousand five hundred` the five
            values[-1] += multiplied * (value - 1)
        elif before >= 100 or (20 <= before and value < 10):
            values[-1] += value
        else:
            values.append(value)
        before = 0 if is_digits else value
    return tuple(value for value in values if value) or (0,)  # 6:00 is 6


def join_digits(values: tuple[int, ...]) -> int:
    """1984 of 19 and 84, 173 of 1, 7 and 3."""
    return int("".join(map(str, values))[:18])


def normalize(word: str) -> str:
    return unicodedata.normalize("NFKC", word).lower()


def main_script(text: str) -> str | None:
    """The script of most letters, by the first word of their Unicode names; None of a text without letters."""
    counts = Counter()
    for letter, count in Counter(regex.findall(r"\p{L}", normalize(text))).items():
        script = unicodedata.name(letter, "").partition(" ")[0]
        counts[SCRIPTS.get(script, script)] += count
    return max(sorted(counts), key=counts.get, default=None)
