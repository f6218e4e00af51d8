"""From texts to ROUGE scores, and what they say of the models. There is no torch in here.

A dialogue may have several references. `average` scores its text against each and takes the mean, which is the same as
scoring every row of a split that repeats the dialogue; `max` takes the best reference; `first` the first one alone.
"""

import functools
import itertools
import math
import multiprocessing
import os
import re
import tempfile

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from tqdm.auto import tqdm

from utils.scoring.metrics.significance import compare_means, estimate_means
from utils.scoring.metrics.words import UnicodeTokenizer

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
PROTOCOLS = ("average", "max", "first")
CHUNK_SIZE = 32  # texts that one core scores at a time; a few hundredths of a second


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

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        use_stemmer: bool,
        newline: bool,
        tokenizer: str,
        name: str | None,
    ) -> dict[str, list]:
        pairs = list(zip(predictions, references, strict=True))
        score = functools.partial(score_text, use_stemmer=use_stemmer, newline=newline, tokenizer=tokenizer)
        show = functools.partial(tqdm, total=len(pairs), desc=f"{name} ROUGE", unit="text", disable=not name)
        # While training none: its 64 texts take no time, and its signals' handlers would keep a pool from ending.
        num_cores = min(count_cores() if name else 1, math.ceil(len(pairs) / CHUNK_SIZE))
        if num_cores > 1:
            # Forked and not spawned, which would import torch and all else again: longer than the scoring takes.
            with multiprocessing.get_context("fork").Pool(num_cores) as pool:
                scores = list(show(pool.imap(score, pairs, chunksize=CHUNK_SIZE)))
                pool.close()
                pool.join()  # not ended by a SIGTERM, which they may have inherited as ignored
        else:
            scores = list(show(map(score, pairs)))
        return {metric: [text_scores[metric] for text_scores in scores] for metric in METRICS}


def count_cores() -> int:
    """Cores that this process may use; one where processes cannot be forked."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def score_text(
    pair: tuple[str, list[str]], use_stemmer: bool, newline: bool, tokenizer: str
) -> dict[str, list[float]]:
    """`scores[metric][reference]` of a (text, references)."""
    prediction, references = pair
    scorer = make_scorer(use_stemmer, tokenizer)
    if newline:
        prediction, references = split_sentences(prediction), [split_sentences(text) for text in references]
    scores = [scorer.score(reference, prediction) for reference in references]
    return {metric: [one[metric].fmeasure for one in scores] for metric in METRICS}


@functools.cache
def make_scorer(use_stemmer: bool, tokenizer: str) -> RougeScorer:
    own = UnicodeTokenizer(use_stemmer) if tokenizer == "unicode" else None  # rouge_score's default
    return RougeScorer(METRICS, use_stemmer=use_stemmer, tokenizer=own)


def split_sentences(text: str) -> str:
    """The text with a line for each sentence, which is what rougeLsum takes for one; no other metric sees lines.

    A sentence ends where blank space follows `.`, `!` or `?`. run_summarization.py uses NLTK's punkt instead, whose
    model is a download; it knows abbreviations, so that the two differ at `Mr. Smith`.
    """
    return re.sub(r"(?<=[.!?])\s+", "\n", text)


def score_texts(
    predictions: list[str],
    references: list[list[str]],
    use_stemmer: bool,
    newline: bool = False,
    tokenizer: str = "default",
    name: str | None = None,
) -> dict[str, list[list[float]]]:
    """`scores[metric][dialogue][reference]`, F1 between 0 and 1; with a name, progress is shown."""
    with tempfile.TemporaryDirectory() as cache_dir:  # which it makes though it keeps all in memory
        metric = Rouge(cache_dir=cache_dir, keep_in_memory=True)
        return metric.compute(
            predictions=predictions, references=references, use_stemmer=use_stemmer, newline=newline,
            tokenizer=tokenizer, name=name,
        )  # fmt: skip


def sum_by_dialogue(scores: list[list[float]], protocol: str) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts), each of shape (dialogues,): a protocol's mean is sum(sums) / sum(counts)."""
    if protocol == "average":  # each row counts alike, also where a dialogue has fewer references than others
        return np.array([math.fsum(row) for row in scores]), np.array([len(row) for row in scores])
    choose = max if protocol == "max" else next
    return np.array([choose(iter(row)) for row in scores]), np.ones(len(scores))


def compare_models(scores: dict[str, dict[str, list[list[float]]]], seed: int) -> tuple[dict, dict]:
    """(models, comparisons) as results.json has them, of `scores[model][metric][dialogue][reference]`: fractions
    between 0 and 1, differences A minus B. `p_value_holm` is corrected for all comparisons by the same protocol."""
    models = {name: {"scores": {protocol: {} for protocol in PROTOCOLS}} for name in scores}
    pairs = list(itertools.combinations(scores, 2))
    comparisons = {f"{a}_vs_{b}": {protocol: {} for protocol in PROTOCOLS} for a, b in pairs}
    for protocol in PROTOCOLS:
        sums = {}
        for name in scores:
            columns = [sum_by_dialogue(scores[name][metric], protocol) for metric in METRICS]
            sums[name], counts = np.stack([column for column, _ in columns], axis=1), columns[0][1]
            values, lows, highs, _ = estimate_means(sums[name], counts)
            for index, metric in enumerate(METRICS):
                score = {"value": values[index], "low": max(0, lows[index]), "high": min(1, highs[index])}
                models[name]["scores"][protocol][metric] = {key: float(value) for key, value in score.items()}
        if pairs:
            # In pairs: the dialogues that are hard for one model are hard for the other.
            differences = np.concatenate([sums[a] - sums[b] for a, b in pairs], axis=1)
            entries = iter(compare_columns(differences, counts, seed))
            for (a, b), metric in itertools.product(pairs, METRICS):
                comparisons[f"{a}_vs_{b}"][protocol][metric] = next(entries)
    return models, comparisons


def compare_columns(differences: np.ndarray, counts: np.ndarray, seed: int) -> list[dict[str, float]]:
    """An entry of results.json for each column of `differences` (dialogues, columns)."""
    (values, lows, highs, p_values), corrected = compare_means(differences, counts, seed)
    columns = zip(values, np.maximum(lows, -1), np.minimum(highs, 1), p_values, corrected, strict=True)
    names = ("difference", "low", "high", "p_value", "p_value_holm")
    return [dict(zip(names, map(float, column), strict=True)) for column in columns]
