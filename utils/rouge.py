"""From texts to ROUGE scores, with intervals. There is no torch in here.

A dialogue may have several references. `average` scores its text against each and takes the mean, which is the same as
scoring every row of a split that repeats the dialogue; `max` takes the best reference; `first` the first one alone.
"""

import itertools

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
PROTOCOLS = ("average", "max", "first")
NUM_DRAWS = 1000


class Rouge(evaluate.Metric):
    """ROUGE F1 of each text against each of its references, from rouge_score.

    `evaluate.load("rouge")` downloads its script from the hub and returns the median of random bootstrap draws; this
    needs no network and returns the scores themselves.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE F1 of each prediction against each of its references",
            citation="Lin, C.-Y. (2004). ROUGE: A Package for Automatic Evaluation of Summaries.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], use_stemmer: bool) -> dict[str, list]:
        scorer = RougeScorer(METRICS, use_stemmer=use_stemmer)
        scores = [
            [scorer.score(reference, prediction) for reference in their_references]
            for prediction, their_references in zip(predictions, references, strict=True)
        ]
        return {metric: [[one[metric].fmeasure for one in row] for row in scores] for metric in METRICS}


def score_texts(
    predictions: list[str], references: list[list[str]], use_stemmer: bool
) -> dict[str, list[list[float]]]:
    """`scores[metric][dialogue][reference]`, F1 between 0 and 1."""
    metric = Rouge(keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references, use_stemmer=use_stemmer)


def sum_by_dialogue(scores: list[list[float]], protocol: str) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts), each of shape (dialogues,): a protocol's mean is sum(sums) / sum(counts)."""
    if protocol == "average":  # each row counts alike, also where a dialogue has fewer references than others
        return np.array([sum(row) for row in scores]), np.array([len(row) for row in scores])
    choose = max if protocol == "max" else next
    return np.array([choose(iter(row)) for row in scores]), np.ones(len(scores))


def bootstrap(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Mean, and the 2.5th and 97.5th percentile of the means of NUM_DRAWS draws of dialogues with replacement.

    Dialogues are drawn and not rows, since a dialogue's rows share one text. The percentile bootstrap of Efron and
    Tibshirani (1993), An Introduction to the Bootstrap, section 13.3.
    """
    drawn = np.random.default_rng(seed).integers(len(sums), size=(NUM_DRAWS, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(sums.sum() / counts.sum()), float(low), float(high)


def compare_models(
    predictions: dict[str, list[str]], references: list[list[str]], use_stemmer: bool, seed: int
) -> tuple[dict, dict]:
    """(models, comparisons) as results.json has them: fractions between 0 and 1, differences A minus B."""
    scores = {name: score_texts(texts, references, use_stemmer) for name, texts in predictions.items()}
    models = {name: {"scores": {protocol: {} for protocol in PROTOCOLS}} for name in scores}
    pairs = list(itertools.combinations(scores, 2))
    comparisons = {f"{a}_vs_{b}": {protocol: {} for protocol in PROTOCOLS} for a, b in pairs}
    for protocol, metric in itertools.product(PROTOCOLS, METRICS):
        sums = {name: sum_by_dialogue(scores[name][metric], protocol) for name in scores}
        for name in scores:
            value, low, high = bootstrap(*sums[name], seed)
            models[name]["scores"][protocol][metric] = {"value": value, "low": low, "high": high}
        for a, b in pairs:
            # Drawn in pairs: the dialogues that are hard for one model are hard for the other.
            difference, low, high = bootstrap(sums[a][0] - sums[b][0], sums[a][1], seed)
            comparisons[f"{a}_vs_{b}"][protocol][metric] = {"difference": difference, "low": low, "high": high}
    return models, comparisons
