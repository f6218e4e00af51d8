"""Scores are rouge_score's, the protocols are what they are called, the intervals are over dialogues."""

import csv
import time

import numpy as np
import pytest
from conftest import DIALOGSUM, make_rows
from rouge_score.rouge_scorer import RougeScorer

from utils.scoring.metrics import rouge
from utils.scoring.metrics.rouge import METRICS, PROTOCOLS, compare_models, score_texts, split_sentences
from utils.scoring.metrics.significance import correct_for_number

REFERENCES = [
    ["the cat sat on the mat", "a cat sat"],
    ["dogs bark\nloudly at night"],
    ["he runs", "running", "she ran home"],
]
PREDICTIONS = ["a cat sat on a mat", "the dogs barked at night", ""]


def compare_texts(predictions, references):
    scores = {name: score_texts(texts, references, use_stemmer=False) for name, texts in predictions.items()}
    return compare_models(scores, seed=0)


def read_test_summaries() -> list[list[str]]:
    """The three references of each dialogue."""
    with (DIALOGSUM / "test.csv").open(encoding="utf-8", newline="") as file:
        summaries = [row["summary"] for row in csv.DictReader(file)]
    return [summaries[index : index + 3] for index in range(0, len(summaries), 3)]


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
    models, _ = compare_texts({"m": PREDICTIONS}, REFERENCES)
    scores = {protocol: models["m"]["scores"][protocol]["rouge1"]["value"] for protocol in ("average", "max", "first")}
    # F1 is 2 matches / (words of the text + words of the reference): 2*4/(6+6) and 2*3/(6+3), then 2*3/(5+5), then 0.
    assert scores["first"] == pytest.approx((4 / 6 + 0.6 + 0) / 3)
    assert scores["max"] == pytest.approx((6 / 9 + 0.6 + 0) / 3)
    # As if each of the six rows were scored: a dialogue with more rows weighs more.
    assert scores["average"] == pytest.approx((4 / 6 + 6 / 9 + 0.6 + 0 + 0 + 0) / 6)


def test_difference_is_a_minus_b_with_its_own_interval():
    better, worse = ["he runs home"] * 30, ["he naps"] * 30
    references = [["he runs home fast"]] * 15 + [["he runs"]] * 15
    models, comparisons = compare_texts({"better": better, "worse": worse}, references)
    entry = comparisons["better_vs_worse"]["average"]["rouge1"]
    values = [models[name]["scores"]["average"]["rouge1"]["value"] for name in ("better", "worse")]
    assert entry["difference"] == pytest.approx(values[0] - values[1]) and entry["difference"] > 0
    assert list(comparisons) == ["better_vs_worse"]


def test_p_values_are_corrected_within_a_protocol():
    rows = make_rows(20)
    texts = {"a": [row["dialogue"] for row in rows], "b": [row["summary"] for row in rows], "c": ["the park"] * 20}
    _, comparisons = compare_texts(texts, [[row["summary"], row["dialogue"][:50]] for row in rows])
    assert list(comparisons) == ["a_vs_b", "a_vs_c", "b_vs_c"]
    for protocol in PROTOCOLS:
        entries = [comparison[protocol][metric] for comparison in comparisons.values() for metric in METRICS]
        expected = correct_for_number(np.array([entry["p_value"] for entry in entries]))
        assert [entry["p_value_holm"] for entry in entries] == expected.tolist()
        assert 12 * min(entry["p_value"] for entry in entries) == min(expected) < 0.05


def test_intervals_end_where_scores_do():
    """Two dialogues: Student's distribution, for one degree of freedom, would go far beyond."""
    models, comparisons = compare_texts({"a": ["x y", "x"], "b": ["z", "z"]}, [["x y"], ["x y"]])
    score, difference = models["a"]["scores"]["max"]["rouge1"], comparisons["a_vs_b"]["max"]["rouge1"]
    assert (score["low"], score["high"]) == (0, 1)
    assert (difference["low"], difference["high"], difference["p_value"]) == (-1, 1, 0.5)


@pytest.mark.skipif(not DIALOGSUM.is_dir(), reason="DialogSum is not beside the project")
@pytest.mark.parametrize("use_stemmer", [False, True])
def test_scores_of_real_texts(use_stemmer, monkeypatch):
    """One reference of another dialogue and one of the dialogue itself against all three, on two processes."""
    references = read_test_summaries()[:60]
    predictions = [row[index % 3] if index % 2 else references[index - 1][0] for index, row in enumerate(references)]
    scorer = RougeScorer(METRICS, use_stemmer=use_stemmer)
    expected = [[scorer.score(one, text) for one in row] for text, row in zip(predictions, references, strict=True)]
    for num_cores in (1, 2):
        monkeypatch.setattr(rouge, "count_cores", lambda num_cores=num_cores: num_cores)
        scores = score_texts(predictions, references, use_stemmer, name="m")
        for metric in METRICS:
            values = [[one[metric].fmeasure for one in row] for row in expected]
            assert np.allclose(scores[metric], values, rtol=0, atol=1e-12)


@pytest.mark.skipif(not DIALOGSUM.is_dir(), reason="DialogSum is not beside the project")
def test_1500_rows_take_seconds():
    references = (read_test_summaries() * 2)[:500]
    started = time.perf_counter()
    texts = [row[0] for row in references[1:] + references[:1]]
    scores = score_texts(texts, references, use_stemmer=True, name="m")
    assert sum(map(len, scores["rouge1"])) == 1500
    assert time.perf_counter() - started < 20  # 1 s on one core of an idle machine


@pytest.mark.skipif(not DIALOGSUM.is_dir(), reason="DialogSum is not beside the project")
def test_protocols_of_real_texts_differ():
    rows = read_test_summaries()[:30]
    models, _ = compare_texts({"human": [row[0] for row in rows]}, [row[1:] for row in rows])
    values = {protocol: models["human"]["scores"][protocol]["rouge1"]["value"] for protocol in PROTOCOLS}
    assert values["max"] > values["average"] + 0.02, "references differ, so the protocols do"


def test_a_line_for_each_sentence_changes_rougelsum_alone():
    assert split_sentences("He ran. She sat! At 2.30 p.m? \n Yes") == "He ran.\nShe sat!\nAt 2.30 p.m?\nYes"
    text, reference = "She sat down. He ran home.", "He ran home. She sat down."
    as_it_is, by_sentence = (score_texts([text], [[reference]], False, newline) for newline in (False, True))
    assert as_it_is["rougeLsum"] == as_it_is["rougeL"] == by_sentence["rougeL"] == [[0.5]]
    assert by_sentence["rougeLsum"] == [[1.0]]
    assert by_sentence["rouge1"] == as_it_is["rouge1"] and by_sentence["rouge2"] == as_it_is["rouge2"]


def test_row_order_does_not_matter():
    """To the last bit, intervals and p-values too; but for `first`, which is what it says."""
    rows = make_rows(20)
    texts = {"a": [row["dialogue"] for row in rows], "b": [row["summary"][:40] for row in rows]}
    references = [[row["summary"], row["dialogue"][:50], "the park"][: 1 + i % 3] for i, row in enumerate(rows)]
    backwards = {name: of_model[::-1] for name, of_model in texts.items()}
    one, other = compare_texts(texts, references), compare_texts(backwards, [row[::-1] for row in references[::-1]])
    assert [list(section) for section in one] == [["a", "b"], ["a_vs_b"]]
    for protocol in ("average", "max"):
        assert one[1]["a_vs_b"][protocol] == other[1]["a_vs_b"][protocol]
        for name in ("a", "b"):
            assert one[0][name]["scores"][protocol] == other[0][name]["scores"][protocol]
