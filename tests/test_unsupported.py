"""Numbers, names and scripts that a summary has and its dialogue has not, worked out by hand."""

import csv
import time

import pytest
from conftest import DIALOGSUM
from hypothesis import given
from hypothesis import strategies as st

from utils.scoring.html_report import name_unsupported
from utils.scoring.metrics.unsupported import (
    find_all_unsupported,
    find_numbers,
    find_ordinary,
    find_unsupported,
    main_script,
    read_dialogue,
    share_unsupported,
)

NOTHING = {"numbers": [], "names": [], "other_script": False}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("two hundred and fifty men", [("two hundred and fifty", (250,))]),
        ("In nineteen eighty-four", [("nineteen eighty-four", (19, 84))]),
        ("at 10:30 or ten thirty", [("10:30", (10, 30)), ("ten thirty", (10, 30))]),
        ("6:00, 6.00 and 0:00", [("6:00", (6,)), ("6.00", (6,)), ("0:00", (0,))]),
        ("$1,250 or 1,25", [("1,250", (1250,)), ("1", (1,)), ("25", (25,))]),
        ("the 22nd, the Twenty-Second", [("22", (22,)), ("Twenty-Second", (22,))]),
        ("his twentieth of sixty ninths", [("twentieth", (20,)), ("sixty ninths", (69,))]),
        ("two thousand five, 2 thousand", [("two thousand five", (2005,)), ("2 thousand", (2000,))]),
        ("five hundred thousand", [("five hundred thousand", (500_000,))]),
        ("One thousand five hundred", [("One thousand five hundred", (1500,))]),
        ("a million two hundred thirty thousand", [("million two hundred thirty thousand", (1_230_000,))]),
        ("twenty ten, $12 50", [("twenty ten", (20, 10)), ("12 50", (12, 50))]),
        ("no one, at first; wait a second, ones", []),  # pronouns rather than numbers
        ("One Hundred and one, two and ten", [("One Hundred and one", (101,)), ("two", (2,)), ("ten", (10,))]),
        ("#Person1# has MP3 and tentative plans", []),
        ("१२ and １２", [("१२", (12,)), ("１２", (12,))]),
        ("9" * 40, [("9" * 15, (999_999_999_999_999,))]),
    ],
)
def test_numbers(text, numbers):
    assert find_numbers(text) == numbers


@pytest.mark.parametrize(
    ("text", "dialogue", "missing"),
    [
        ("at 10:30", "at ten thirty", []),
        ("at 10:30", "at half past ten", []),
        ("at 10:30", "at ten", ["10:30"]),
        ("at 7:45", "a quarter to eight, not seven", []),
        ("at 3 o'clock", "at 3:00 pm", []),
        ("Bus 173", "Bus one seven three", []),
        ("Bus 173", "Bus No. 713", ["173"]),
        ("on the 22nd", "on the 23rd", ["22"]),
        ("in 1984", "in nineteen eighty-four", []),
        ("in nineteen eighty-four", "in 1984", []),
        ("at 10:30 or 11", "at 9:30 or 11", ["10:30"]),
        ("20,000 RMB", "20, 000 RMB", []),
        ("five boxes", "5 boxes", []),
        ("20 boxes", "20, 100 and 300", []),
        ("10% off", "ten percent off", []),
        ("half, twelve, 2 cups", "half a dozen, a couple", []),
        ("five boxes for 9 dollars and 5 more", "no", ["five", "9", "5"]),
    ],
)
def test_missing_numbers(text, dialogue, missing):
    assert find_unsupported(text, dialogue, set())["numbers"] == missing


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("#Person1# calls ANNA and Anna's mother.", []),  # in any case, without the 's
        ("#Person3# calls Ana.", ["#Person3#", "Ana"]),
        ('Then I call. They wait. "But" he waits\nHe waits', ["But", "He"]),  # only the first two are ordinary
        ("Anna calls Then.", ["Then"]),
        ("Mr. They calls", ["Mr", "They"]),
        ("É\u0301va and ﬁnn, A, OK", ["É\u0301va", "OK"]),
    ],
)
def test_missing_names(text, missing):
    dialogue = "#Person1#: It's anna!\n#Person2#: Finn?"
    assert find_unsupported(text, dialogue, {"then", "they"})["names"] == missing


def test_ordinary_words():
    assert find_ordinary(["Then they met anna.", "THEN Bob"]) == {"they", "met", "anna"}


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Good morning, Мария", "LATIN"),
        ("Доброе утро, Mary", "CYRILLIC"),
        ("東京へ行きます", "CJK"),
        ("ｶﾀｶﾅ ＡＢ", "CJK"),
        ("12:30 #!", None),
    ],
)
def test_scripts(text, script):
    assert main_script(text) == script
    is_other = script not in (None, "LATIN")
    assert find_unsupported(text, "Hello, Mary", set())["other_script"] is is_other
    assert find_unsupported(text, "12 30", set())["other_script"] is False


def test_shares():
    found = find_all_unsupported(["Bob has 5", "Bob, Ann", "привет", ""], ["Bob has 6 cats"] * 4, set())
    assert share_unsupported(found) == {"numbers": 0.25, "names": 0.25, "other_script": 0.25}
    assert [name_unsupported(one) for one in found] == ["5", "Ann", "its script", ""]
    assert (
        name_unsupported({"numbers": ["5", "5"], "names": ["Bob", "Bob"], "other_script": True})
        == "5, Bob, its script"
    )


PIECES = st.sampled_from(
    ["#", "1", "0", ",", ".", ":", " and ", "-", "one", "hundred", "Million", "th", "ʼ", "\u0301", "Ⅻ", "½"]
)


@given(st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=20).map("".join), st.text(max_size=30))
def test_odd_texts(text, dialogue):
    """Whatever it is, a text holds all that it states."""
    assert find_unsupported(text, text, set()) == NOTHING
    found = find_unsupported(text, dialogue, set())
    assert all(word in text for word in found["numbers"] + found["names"])


def test_a_long_text_takes_no_square_of_its_length():
    started = time.perf_counter()
    found = find_unsupported("!" * 20_000 + "Bob. 10 " * 10_000, "10", set())
    assert found["names"] == ["Bob"] * 10_000
    assert time.perf_counter() - started < 10  # half a second on an idle core


@pytest.mark.skipif(not DIALOGSUM.is_dir(), reason="DialogSum is not beside the project")
def test_how_often_people_are_marked():
    """The figures of utils/README.md."""
    rows = []
    for name in ("test", "validation"):
        with (DIALOGSUM / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows += [(row["summary"], row["dialogue"]) for row in csv.DictReader(file)]
    ordinary = find_ordinary(text for row in rows for text in row)
    found = [find_unsupported(*row, ordinary) for row in rows]
    counts = {kind: sum(bool(one[kind]) for one in found) for kind in NOTHING}
    assert (len(rows), counts) == (1400, {"numbers": 9, "names": 28, "other_script": 0})
    # Set against another dialogue, those with a number or a name are marked.
    moved = [find_unsupported(text, rows[index - 700][1], ordinary) for index, (text, _) in enumerate(rows)]
    assert sum(bool(find_numbers(text)) for text, _ in rows) == 130
    assert sum(bool(one["numbers"]) for one in moved) == 122
    read_dialogue.cache_clear()
