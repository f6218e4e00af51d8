"""What results.json holds as tables of text and as sentences."""

import itertools
from typing import Any, NamedTuple

from utils.scoring.metrics.rouge import METRICS, PROTOCOLS

ENOUGH_DIALOGUES = 40  # from there on p < .05 errs in .06 at most, for all kinds measured: tests/benchmarks/README.md
LEVEL = 0.05


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    styles: dict[tuple[int, int], str]  # of the cell (row, column): best, above, below or noise


def build_tables(results: dict[str, Any]) -> list[Table]:
    """All tables in the order shown; the reports skip those without rows."""
    tables = [build_scores(results), build_differences(results), build_bertscore(results), build_diagnostics(results)]
    return [*tables, build_unsupported(results), build_costs(results), build_facts(results.get("facts", {}))]


def build_scores(results: dict[str, Any]) -> Table:
    """Every model's ROUGE by every protocol; the best of each column and protocol is marked."""
    settings, models = results["settings"], results["models"]
    rows, styles = [], {}
    for protocol in protocols_that_differ(results):
        for name, model in models.items():
            scores = [model["scores"][protocol][metric] for metric in METRICS]
            for column, score in enumerate(scores):
                best = max(other["scores"][protocol][METRICS[column]]["value"] for other in models.values())
                if len(models) > 1 and score["value"] == best:
                    styles[len(rows), column + 2] = "best"
            rows.append([name, protocol, *(f"{format_percent(score)} {format_interval(score)}" for score in scores)])
    stemmer = "with" if settings["use_stemmer"] else "without"
    words = " on words of any script" if settings.get("rouge_tokenizer") == "unicode" else ""
    lines = "a line for each sentence" if settings.get("rouge_newline") else "text as it is"
    title = (
        f"ROUGE F1 in percent [95 % interval]{words}, {stemmer} stemmer, rougeLsum on {lines}, "
        f"{results['num_dialogues']} dialogues with {results['num_rows']} references"
    )
    return Table(title, ["model", "references", *METRICS], rows, styles)


def build_differences(results: dict[str, Any]) -> Table:
    """Every pair's differences, with each p-value as it is and as corrected."""
    rows, styles = [], {}
    for protocol in protocols_that_differ(results):
        for (a, b), comparison in pair_comparisons(results):
            entries = [comparison[protocol][metric] for metric in METRICS]
            for column, entry in enumerate(entries):
                styles[len(rows), column + 2] = judge(entry, results["num_dialogues"])
            cells = [
                f"{format_percent(entry, '+')} {format_interval(entry, '+')} p {format_p_value(entry['p_value'])} / "
                f"{format_p_value(entry['p_value_holm'])}"
                for entry in entries
            ]
            rows.append([f"{a} minus {b}", protocol, *cells])
    title = (
        "Differences in points [95 % interval], p-value alone / corrected by Holm for the "
        f"{len(METRICS) * len(results['comparisons'])} comparisons against the same references"
    )
    return Table(title, ["difference", "references", *METRICS], rows, styles)


def build_bertscore(results: dict[str, Any]) -> Table:
    """Without rows if there was no --bertscore."""
    encoder, rows, protocols = results.get("bertscore"), [], protocols_that_differ(results)
    for name, model in results["models"].items() if encoder else ():
        scores = [model["bertscore"][protocol] for protocol in protocols]
        rows.append([name, *(f"{format_percent(score)} {format_interval(score)}" for score in scores)])
    of = f"{encoder['encoder']}, layer {encoder['num_layers']}, bert_score {encoder['version']}" if encoder else ""
    title = f"BERTScore F1 in percent [95 % interval] by {of}, neither weighted nor rescaled"
    return Table(title, ["BERTScore", *protocols], rows, {})


def build_diagnostics(results: dict[str, Any]) -> Table:
    rows = []
    described = [(name, model["diagnostics"]) for name, model in results["models"].items()]
    for name, texts in [*described, ("(references)", results["references"])]:
        shares = ("coverage", "novel_bigrams", "share_empty", "share_duplicates", "share_truncated")
        coverage, *others = ("" if texts[key] is None else f"{100 * texts[key]:.1f} %" for key in shares)
        rows.append([name, f"{texts['mean_words']:.1f}", coverage, f"{texts['density']:.1f}", *others])
    header = ["texts", "words", "copied", "density", "new bigrams", "empty", "duplicates", "cut"]
    title = "What the texts are like: mean words; share of words in fragments of the dialogue, and their mean length"
    return Table(title, header, rows, {})


def build_unsupported(results: dict[str, Any]) -> Table:
    """Shares of texts that state what their dialogue does not hold, beside those of the references."""
    found = [(name, model["unsupported"]) for name, model in results["models"].items()]
    found.append(("(references)", results["references"]["unsupported"]))
    rows = [[name, *(f"{100 * share:.1f} %" for share in shares.values())] for name, shares in found]
    title = "Texts with a number or a name that their dialogue does not hold, or mostly in another script than it"
    return Table(title, ["not in the dialogue", "numbers", "names", "other script"], rows, {})


def build_costs(results: dict[str, Any]) -> Table:
    """What each model that was trained here cost, beside its quality."""
    rows = []
    for name, model in results["models"].items():
        training = model.get("training")
        if training:
            minutes, seconds = divmod(round(training["seconds"] or 0), 60)
            took = f"{minutes}:{seconds:02} on {training['num_processes']} {training['device']}"
            size = f"{training['size_bytes'] / 2**20:,.1f} MiB"
            counts = [f"{training['num_trainable_parameters']:,}", size, f"{training['num_train_steps']:,}"]
            rows.append([name, *counts, took, format_percent(model["scores"]["average"]["rouge1"])])
    header = ["cost", "trained parameters", "on disk", "updates", "min:s in updates", "rouge1 average"]
    return Table("What training cost, beside what it brought", header, rows, {})


def build_facts(facts: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Facts that each model's summaries state in the right role, beside what always giving the same answer gets."""
    rows = [
        [name, *(f"{kind['correct']} of {kind['total']}" for kind in counts.values())]
        for name, counts in facts.items()
    ]
    kinds = next(iter(facts.values()), {})
    if kinds:
        often = [f"{kind['majority'] * kind['total']:.0f} of {kind['total']}" for kind in kinds.values()]
        rows.append(["(most common answer)", *often])
    return Table("Facts stated in the right role", ["facts right", *kinds], rows, {})


def protocols_that_differ(results: dict[str, Any]) -> tuple[str, ...]:
    """With one reference for each dialogue, all protocols give the same scores."""
    return PROTOCOLS if results["num_rows"] > results["num_dialogues"] else PROTOCOLS[:1]


def pair_comparisons(results: dict[str, Any]) -> list[tuple[tuple[str, str], dict]]:
    """((A, B), comparison) of each pair; a name may itself hold `_vs_`."""
    pairs = itertools.combinations(results["models"], 2)
    return [((a, b), results["comparisons"][f"{a}_vs_{b}"]) for a, b in pairs]


def is_current(results: dict[str, Any]) -> bool:
    """Whether a results.json has all that a report shows; earlier versions had other p-values and fewer measures."""
    comparisons = results.get("comparisons", {}).values()
    entries = [entry for one in comparisons for by_metric in one.values() for entry in by_metric.values()]
    has_measures = "predictions_sha256" in results and "unsupported" in results.get("references", {})
    return has_measures and all("p_value_holm" in entry for entry in entries)


def judge(entry: dict[str, float], num_dialogues: int) -> str:
    """Whether a difference is told from noise, by its corrected p-value and where there are dialogues enough."""
    if num_dialogues < ENOUGH_DIALOGUES or entry["p_value_holm"] >= LEVEL:
        return "noise"
    return "above" if entry["difference"] > 0 else "below"


def format_percent(score: dict[str, float], sign: str = "") -> str:
    return f"{100 * score.get('value', score.get('difference')):{sign}.2f}"


def format_interval(score: dict[str, float], sign: str = "") -> str:
    return f"[{100 * score['low']:{sign}.1f}, {100 * score['high']:{sign}.1f}]"


def format_p_value(p_value: float) -> str:
    return "<.001" if p_value < 0.001 else f"{p_value:.3f}".removeprefix("0")


def describe_differences(comparisons: list[tuple[tuple[str, str], dict]], num_dialogues: int) -> list[str]:
    """Sentences that say which differences are beyond noise, by the protocol `average`."""
    if num_dialogues < ENOUGH_DIALOGUES:
        few = f"Only {num_dialogues} dialogue{'s' * (num_dialogues > 1)} scored: too few to say of any difference that"
        return [f"{few} it is beyond noise; {ENOUGH_DIALOGUES} are needed. This is a quick look, not a result."]
    beyond, within = {}, []
    for (a, b), comparison in comparisons:
        metrics = {verdict: [] for verdict in ("above", "below", "noise")}
        for metric in METRICS:
            metrics[judge(comparison["average"][metric], num_dialogues)].append(metric)
        for verdict, (better, worse) in (("above", (a, b)), ("below", (b, a))):
            if metrics[verdict]:
                beyond.setdefault((better, list_metrics(metrics[verdict])), []).append(worse)
        if metrics["noise"]:
            within.append(f"{a} and {b} in {list_metrics(metrics['noise'])}")
    sentences = []
    if beyond:
        found = [f"{better} above {' and '.join(worse)} in {where}" for (better, where), worse in beyond.items()]
        sentences.append(f"Beyond noise (corrected p below .05, average over references): {'; '.join(found)}.")
    if within:
        sentences.append(f"Not told apart by these dialogues: {'; '.join(within)}.")
    return sentences


def list_metrics(metrics: list[str]) -> str:
    return "every metric" if len(metrics) == len(METRICS) else ", ".join(metrics)
