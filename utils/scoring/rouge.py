"""From texts to ROUGE scores, with intervals. There is no torch in here.

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

from utils.scoring.words import UnicodeTokenizer

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
PROTOCOLS = ("average", "max", "first")
NUM_DRAWS = 1000
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


@functools.lru_cache(maxsize=1)
def draw_dialogues(num_dialogues: int, seed: int) -> np.ndarray:
    """Indices of shape (NUM_DRAWS, dialogues), drawn with replacement."""
    return np.random.default_rng(seed).integers(num_dialogues, size=(NUM_DRAWS, num_dialogues))


def bootstrap(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float, float, float, float]:
    """Mean, the 2.5th and 97.5th percentile of the means of NUM_DRAWS draws of dialogues with replacement, and the
    two-sided p-value of a mean of 0.

    Dialogues are drawn and not rows, since a dialogue's rows share one text. The percentile bootstrap of Efron and
    Tibshirani (1993), An Introduction to the Bootstrap, section 13.3. The p-value is twice the share of draws on the
    rarer side of 0 (draws at 0 count on both), as Koehn (2004), Statistical Significance Tests for Machine
    Translation Evaluation, counts them on one side; with one added to the draws and to those counted, so that it is
    never 0 (Davison and Hinkley, 1997, Bootstrap Methods and their Application, section 4.2).
    """
    order = np.lexsort((counts, sums))  # so that neither draws nor rounding depend on the order of the dialogues
    sums, counts = sums[order], counts[order]
    drawn = draw_dialogues(len(sums), seed)
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    rarer = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (rarer + 1) / (NUM_DRAWS + 1))
    return float(sums.sum() / counts.sum()), float(low), float(high), float(p_value)


def compare_models(scores: dict[str, dict[str, list[list[float]]]], seed: int) -> tuple[dict, dict]:
    """(models, comparisons) as results.json has them, of `scores[model][metric][dialogue][reference]`: fractions
    between 0 and 1, differences A minus B."""
    models = {name: {"scores": {protocol: {} for protocol in PROTOCOLS}} for name in scores}
    pairs = list(itertools.combinations(scores, 2))
    comparisons = {f"{a}_vs_{b}": {protocol: {} for protocol in PROTOCOLS} for a, b in pairs}
    for protocol, metric in itertools.product(PROTOCOLS, METRICS):
        sums = {name: sum_by_dialogue(scores[name][metric], protocol) for name in scores}
        for name in scores:
            value, low, high, _ = bootstrap(*sums[name], seed)
            models[name]["scores"][protocol][metric] = {"value": value, "low": low, "high": high}
        for a, b in pairs:
            # Drawn in pairs: the dialogues that are hard for one model are hard for the other.
            difference, low, high, p_value = bootstrap(sums[a][0] - sums[b][0], sums[a][1], seed)
            entry = {"difference": difference, "low": low, "high": high, "p_value": p_value}
            comparisons[f"{a}_vs_{b}"][protocol][metric] = entry
    return models, comparisons
