"""Figures about texts, worked out by hand."""

import pytest

from utils.scoring.metrics.diagnostics import describe_text, describe_texts, find_fragments
from utils.scoring.metrics.words import split_words

DIALOGUE = "#Person1#: The cat sat on the mat. #Person2#: Where did the dog sit?"


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("the cat sat", [3]),
        ("the dog sat on the mat", [2, 4]),  # the longest from `the` is `the dog`, which comes second in the dialogue
        ("a bird sat", [1]),
        ("birds fly", []),
        ("", []),
        ("mat person2 where dogs", [3]),  # speakers are words, too
    ],
)
def test_extractive_fragments(text, lengths):
    assert find_fragments(split_words(text), split_words(DIALOGUE)) == lengths


def test_a_text():
    described = describe_text("The dog sat on a mat", DIALOGUE)
    # Fragments: `the dog`, `sat on`, `mat`; bigrams: the dog, dog sat, sat on, on a, a mat.
    assert described == {
        "words": 6,
        "coverage": pytest.approx(5 / 6),
        "density": pytest.approx((4 + 4 + 1) / 6),
        "novel_bigrams": pytest.approx(3 / 5),
    }
    assert describe_text("", DIALOGUE) == {"words": 0, "coverage": 0, "density": 0, "novel_bigrams": None}


def test_texts():
    described = describe_texts(
        ["The cat sat.", "Birds fly", " ", "Birds fly"],
        [DIALOGUE, DIALOGUE, "Hi.", "Bye."],
        [True, False, False, False],
    )
    assert described == {
        "mean_words": (3 + 2 + 0 + 2) / 4,
        "coverage": 1 / 4,
        "density": 3 / 4,
        "novel_bigrams": pytest.approx((0 + 1 + 1) / 3),
        "share_empty": 1 / 4,
        "share_duplicates": 2 / 4,
        "share_truncated": 1 / 4,
    }


def test_what_is_not_known_is_none():
    assert describe_texts(["a"], ["b"])["share_truncated"] is None
    assert describe_texts(["a", "c"], ["b", "d"], [True, None])["share_truncated"] is None
    assert describe_texts(["a"], ["b"])["novel_bigrams"] is None


def test_rows_of_one_dialogue_are_no_duplicates():
    assert describe_texts(["a", "a", "b"], ["one", "one", "two"])["share_duplicates"] == 0
