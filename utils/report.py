"""Results as pictures and tables."""

import itertools
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from utils.rouge import METRICS, PROTOCOLS


def plot_loss_curve(output_dir: str | Path):
    """Draw the losses in output_dir/metrics.jsonl as output_dir/loss_curve.png."""
    lines = (Path(output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    figure = Figure(figsize=(7, 4), layout="constrained")  # not pyplot's, which looks for a display
    axes = figure.subplots()
    for split, style in (("train", "-"), ("validation", "o-")):
        points = [(line["step"], line["loss"]) for line in metrics if line["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=split)
    axes.set(xlabel="optimizer updates", ylabel="loss per target token (nats)", title=Path(output_dir).name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(output_dir) / "loss_curve.png", dpi=150)


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )


def format_scores(results: dict[str, Any]) -> str:
    """Every model's ROUGE and the difference of every pair, in percent and percentage points, with 95 % intervals."""
    settings = results["settings"]
    stemmer = "with" if settings["use_stemmer"] else "without"
    size = f"{results['num_dialogues']} dialogues with {results['num_rows']} references"
    parts = [f"ROUGE F1 in percent [95 % interval], {stemmer} stemmer, {size}"]
    for title, section in (("model", "models"), ("difference in points", "comparisons")):
        rows = []
        for protocol, (name, entry) in itertools.product(PROTOCOLS, results[section].items()):
            scores = entry["scores"][protocol] if section == "models" else entry[protocol]
            label = name if section == "models" else name.replace("_vs_", " minus ")
            rows.append([label, protocol, *(format_interval(scores[metric]) for metric in METRICS)])
        if rows:
            parts.append(format_table([title, "references", *METRICS], rows))
    return "\n\n".join(parts)


def format_interval(score: dict[str, float]) -> str:
    sign = "+" if "difference" in score else ""
    value = score.get("value", score.get("difference"))
    return f"{100 * value:{sign}.2f} [{100 * score['low']:{sign}.1f}, {100 * score['high']:{sign}.1f}]"


def format_example(row: dict[str, str], summaries: dict[str, str]) -> str:
    """A dialogue, the human summary and each model's."""
    texts = {"dialogue": row["dialogue"], "human summary": row["summary"], **summaries}
    return "\n".join(f"--- {name}\n{text}" for name, text in texts.items())


def format_facts(facts: dict[str, dict[str, dict[str, float]]]) -> str:
    """Facts that each model's summaries state in the right role, beside what always giving the same answer gets."""
    rows = [
        [name, *(f"{kind['correct']} of {kind['total']}" for kind in of_model.values())]
        for name, of_model in facts.items()
    ]
    kinds = next(iter(facts.values()))
    rows.append(
        [
            "(most common answer)",
            *(f"{kind['majority'] * kind['total']:.0f} of {kind['total']}" for kind in kinds.values()),
        ]
    )
    return format_table(["facts right", *kinds], rows)
