"""Scores are rouge_score's, the protocols are what they are called, the intervals are over dialogues."""

import csv

import numpy as np
import pytest
from conftest import DIALOGSUM, make_rows
from rouge_score.rouge_scorer import RougeScorer

from utils.rouge import METRICS, bootstrap, compare_models, score_texts

REFERENCES = [
    ["the cat sat on the mat", "a cat sat"],
    ["dogs bark\nloudly at night"],
    ["he runs", "running", "she ran home"],
]
PREDICTIONS = ["a cat sat on a mat", "the dogs barked at night", ""]


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_scores_are_those_of_rouge_score(use_stemmer):
    scorer = RougeScorer(METRICS, use_stemmer=use_stemmer)
    scores = score_texts(PREDICTIONS, REFERENCES, use_stemmer)
    for metric in METRICS:
        for index, references in enumerate(REFERENCES):
            expected = [scorer.score(reference, PREDICTIONS[index])[metric].fmeasure for reference in references]
            assert scores[metric][index] == pytest.approx(expected, abs=1e-12)
    assert scores["rouge1"][2] == [0, 0, 0]
    # "barked" matches "bark" with a stemmer alone.
    assert scores["rouge1"][1][0] == pytest.approx(2 * 4 / 10 if use_stemmer else 2 * 3 / 10)


def test_protocols():
    models, _ = compare_models({"m": PREDICTIONS}, REFERENCES, use_stemmer=False, seed=0)
    scores = {protocol: models["m"]["scores"][protocol]["rouge1"]["value"] for protocol in ("average", "max", "first")}
    # F1 is 2 matches / (words of the text + words of the reference): 2*4/(6+6) and 2*3/(6+3), then 2*3/(5+5), then 0.
    assert scores["first"] == pytest.approx((4 / 6 + 0.6 + 0) / 3)
    assert scores["max"] == pytest.approx((6 / 9 + 0.6 + 0) / 3)
    # As if each of the six rows were scored: a dialogue with more rows weighs more.
    assert scores["average"] == pytest.approx((4 / 6 + 6 / 9 + 0.6 + 0 + 0 + 0) / 6)


def test_difference_is_a_minus_b_with_its_own_interval():
    better, worse = ["he runs home"] * 30, ["he naps"] * 30
    references = [["he runs home fast"]] * 15 + [["he runs"]] * 15
    models, comparisons = compare_models({"better": better, "worse": worse}, references, use_stemmer=False, seed=0)
    entry = comparisons["better_vs_worse"]["average"]["rouge1"]
    values = [models[name]["scores"]["average"]["rouge1"]["value"] for name in ("better", "worse")]
    assert entry["difference"] == pytest.approx(values[0] - values[1]) and entry["difference"] > 0
    assert list(comparisons) == ["better_vs_worse"]


def test_interval_of_a_bootstrap():
    """Of 400 scores of standard deviation 0.1, the mean's standard error is 0.005."""
    sums = np.random.default_rng(1).normal(0.5, 0.1, 400)
    value, low, high = bootstrap(sums, np.ones(400), seed=0)
    assert value == pytest.approx(sums.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * sums.std() / 20, rel=0.1)
    assert (value, low, high) == bootstrap(sums, np.ones(400), seed=0)
    # A dialogue's three rows share one text: repeating rows must not narrow the interval.
    assert bootstrap(sums * 3, np.full(400, 3), seed=0) == pytest.approx((value, low, high))


@pytest.mark.skipif(not DIALOGSUM.is_dir(), reason="DialogSum is not beside the project")
def test_scores_of_real_texts():
    """The first reference of each test dialogue against the other two."""
    with (DIALOGSUM / "test.csv").open(encoding="utf-8", newline="") as file:
        summaries = [row["summary"] for row in csv.DictReader(file)][:90]
    predictions, references = (
        summaries[::3],
        [list(pair) for pair in zip(summaries[1::3], summaries[2::3], strict=True)],
    )
    scorer = RougeScorer(METRICS, use_stemmer=False)
    scores = score_texts(predictions, references, use_stemmer=False)
    for metric in METRICS:
        expected = [
            [scorer.score(reference, text)[metric].fmeasure for reference in pair]
            for text, pair in zip(predictions, references, strict=True)
        ]
        assert np.allclose(scores[metric], expected, rtol=0, atol=1e-12)
    models, _ = compare_models({"human": predictions}, references, use_stemmer=False, seed=0)
    values = {
        protocol: models["human"]["scores"][protocol]["rouge1"]["value"] for protocol in ("average", "max", "first")
    }
    assert values["max"] > values["average"] + 0.02, "references differ, so the protocols do"


def test_row_order_does_not_matter():
    rows = make_rows(20)
    texts, references = [row["dialogue"] for row in rows], [[row["summary"]] for row in rows]
    forwards, _ = compare_models({"m": texts}, references, use_stemmer=False, seed=0)
    backwards, _ = compare_models({"m": texts[::-1]}, references[::-1], use_stemmer=False, seed=0)
    for metric in METRICS:
        values = [run["m"]["scores"]["average"][metric]["value"] for run in (forwards, backwards)]
        assert values[0] == pytest.approx(values[1], abs=1e-12)
