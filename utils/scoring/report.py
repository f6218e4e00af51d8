"""A finished evaluation for people: the console, report.md and report.html."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

from utils.config import EvaluationConfig, UserError
from utils.data.rows import parse_json, read_file
from utils.files import describe_file, write_file
from utils.launch.locks import lock_folder
from utils.launch.output_dir import CARD
from utils.modeling.model_card import add_scores
from utils.scoring.html_report import build_page
from utils.scoring.tables import Table, build_scores, build_tables, is_current

logger = logging.getLogger(__name__)
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but for tab and line feed


def show_report(config: EvaluationConfig):
    """Write report.html and report.md, from results.json and predictions.jsonl alone, and print the tables."""
    results, predictions = read_results(Path(config.output_dir))
    pages = {"report.html": build_page(results, predictions), "report.md": format_markdown(results)}
    for name, text in pages.items():
        write_file(Path(config.output_dir) / name, text.encode())
    shown = CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", format_results(results))  # a terminal would obey them
    sys.stdout.write(f"{shown}\n\nwritten: {config.output_dir}\n")


def read_results(output_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """results.json and the lines of predictions.jsonl; UserError if they are not there or lack what a report shows."""
    path = output_dir / "results.json"
    if not path.is_file():
        raise UserError(f"--report_only: there is no {path}; evaluate first, without it")
    results = parse_json(path.read_text(encoding="utf-8", errors="replace"), path)
    lines = [line for _, line in read_file(output_dir / "predictions.jsonl")]
    if not isinstance(results, dict) or not is_current(results):
        raise UserError(f"--report_only: {path} is from an earlier version; evaluate again")
    if describe_file(output_dir / "predictions.jsonl")["sha256"] != results["predictions_sha256"]:
        raise UserError(f"--report_only: predictions.jsonl does not hold the texts of {path}; evaluate again")
    return results, lines


def format_table(table: Table) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    lines = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def format_results(results: dict[str, Any]) -> str:
    """What the console shows: the example, every table, and what can be concluded."""
    parts = [format_example(results)]
    parts += [f"{table.title}\n\n{format_table(table)}" for table in build_tables(results) if table.rows]
    return "\n\n".join([*parts, "\n".join(results["conclusions"])])


def format_example(results: dict[str, Any]) -> str:
    """A dialogue, the human summary and each model's."""
    example, asked = results["example"], results["settings"]["example_index"]
    instead = "" if asked == example["index"] else f", its last: there is no --example_index {asked}"
    texts = {"dialogue": example["dialogue"], "human summary": example["summary"], **example["texts"]}
    shown = "\n".join(f"--- {name}\n{text}" for name, text in texts.items())
    return f"Row {example['index']} of the {example['split']} split{instead}\n\n{shown}"


def format_markdown(results: dict[str, Any]) -> str:
    """The tables and conclusions for a pull request or an issue."""
    parts = ["# Summaries scored", *map(escape_markdown, results["conclusions"])]
    parts += [format_markdown_table(table) for table in build_tables(results) if table.rows]
    example = format_example(results)
    fence = "`" * max(3, longest_run(example, "`") + 1)
    parts.append(f"<details><summary>A sample</summary>\n\n{fence}text\n{example}\n{fence}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def format_markdown_table(table: Table) -> str:
    lines = [table.header, ["---", *["--:"] * (len(table.header) - 1)], *table.rows]
    rows = "\n".join(f"| {' | '.join(map(escape_markdown, line))} |" for line in lines)
    return f"**{escape_markdown(table.title)}**\n\n{rows}"


def add_to_cards(config: EvaluationConfig):
    """Put the scores into the model card of each model that was trained here."""
    results, _ = read_results(Path(config.output_dir))
    settings = results["settings"]
    if settings["predictions_file"]:
        raise UserError(f"--add_to_card: {config.output_dir} holds scores of --predictions_file, not of models")
    file = settings[f"{settings['split']}_file"]
    how = (
        f"By evaluate_rouge.py on the {settings['split']} split of "
        f"{Path(file).name if file else settings['dataset_name']}: num_beams {settings['num_beams']}, max_new_tokens "
        f"{settings['max_new_tokens']}, {settings['dtype']}."
    )
    text = f"## Scores\n\n{escape_markdown(how)}\n\n{format_markdown_table(build_scores(results))}"
    for name, path in dict(model.split("=", maxsplit=1) for model in settings["models"]).items():
        if not Path(path).is_dir():
            continue
        with lock_folder(Path(path), f"models {name}"):
            if add_scores(Path(path), text):
                logger.info("%s: the scores are in its %s", path, CARD)
            else:
                logger.warning("%s: no %s with a place for scores", path, CARD)


def escape_markdown(text: str) -> str:
    """Text that stays in its cell, and is neither markup nor HTML."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def longest_run(text: str, character: str) -> int:
    return max((len(run) for run in re.findall(f"{re.escape(character)}+", text)), default=0)
