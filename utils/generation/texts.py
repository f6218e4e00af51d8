"""Dialogues without references from a file or stdin, and their summaries to a file."""

import base64
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from utils.config import SummaryConfig, UserError
from utils.data.rows import Place, check_encodable, iterate_file, read_text
from utils.files import describe_file, write_json, write_parts
from utils.generation.partial_texts import Summary, find_partial_files, mark_unfinished
from utils.generation.summaries import load_with_hash
from utils.launch.output_dir import check_path, check_writable, has_settings
from utils.launch.processes import call_on_main
from utils.launch.script import describe_software
from utils.prompting import clean_text

logger = logging.getLogger(__name__)
ROWS_AT_ONCE = 4096  # whose prompts are in memory together
TRUNCATED = "truncated"


def check_files(config: SummaryConfig):
    """UserError for files that cannot be what is meant, and for the first row that is wrong. Writes nothing."""
    source, target = config.input_file and Path(config.input_file), config.output_file and Path(config.output_file)
    if source and not source.is_file():
        raise UserError(f"--input_file {source}: {'not a file' if source.exists() else 'no such file'}")
    if source is None or source.suffix.lower() == ".txt":
        if target:
            raise UserError("--output_file needs an --input_file of rows; the summary of one dialogue goes to stdout")
        return
    if not target:
        raise UserError(f"--output_file is missing: a csv or jsonl file for the summaries of {source}")
    if target.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"--output_file {target}: unknown kind of file {target.suffix!r}; use .csv or .jsonl")
    check_output_file(config)
    num_rows = 0
    for place, row in iterate_file(source, in_parts=True):
        num_rows += 1
        find_text(config, place, row)
        for name, value in row.items():
            check_encodable(json.dumps({name: to_json(value)}, ensure_ascii=False), name, f"{source}, {place}")
        for name in (config.summary_column, TRUNCATED):
            if name in row:
                advice = "; --summary_column can name another" if name == config.summary_column else "; rename it"
                raise UserError(f"{source}, {place}: has a column {name!r}, which is the output's{advice}")
    if num_rows == 0:
        raise UserError(f"{source} holds no rows")


def check_output_file(config: SummaryConfig):
    target, source = Path(config.output_file), Path(config.input_file).resolve()
    if not target.parent.is_dir():
        raise UserError(f"--output_file {target}: there is no folder {target.parent}")
    batches = Path(f"{config.partial_texts}-0.jsonl")
    check_path(batches, "output_file")  # the longest name
    is_own = find_partial_files(config.partial_texts) or read_manifest(config)  # killed at its end, or finished
    if not target.exists() and read_manifest(config, same_settings=False):  # of an output that has been removed
        is_own = True
    for path in (target, manifest_path(config), target.with_name(f"{target.name}.part"), batches):
        check_path(path, "output_file")
        if path.is_dir() or path.resolve() == source:
            raise UserError(f"--output_file {target}: {path} is {'a folder' if path.is_dir() else 'the --input_file'}")
        if path.exists() and not config.overwrite_output_file and not is_own:
            raise UserError(
                f"--output_file {target}: {path} is there already: take another, or --overwrite_output_file"
            )
    check_writable(target.parent, "output_file")


def manifest_path(config: SummaryConfig) -> Path:
    return Path(f"{config.output_file}.manifest.json")


def read_manifest(config: SummaryConfig, same_settings: bool = True) -> dict[str, Any] | None:
    """The manifest of this output; None if there is none, or if `same_settings` and it is from others."""
    try:
        manifest = json.loads(manifest_path(config).read_bytes())
        if not manifest.keys() >= {"input", "output", "model_hash", "settings"}:
            return None  # a file of somebody else's
        return manifest if has_settings(manifest, config) or not same_settings else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_finished(accelerator: Accelerator, config: SummaryConfig) -> bool:
    """Whether output_file is what this very run has left when it finished. UserError, on every process, if model,
    input or output have changed since."""

    def check() -> bool:
        before = read_manifest(config)
        is_whole = Path(config.output_file).exists() and not find_partial_files(config.partial_texts)
        if before is None or config.overwrite_output_file or not is_whole:
            return False
        check_same(config, before)
        logger.info("%s is there, finished; --overwrite_output_file would make it again", config.output_file)
        return True

    return call_on_main(accelerator, check)


def check_same(config: SummaryConfig, before: dict[str, Any]):
    now = describe_summaries(config, load_with_hash(config.model, "model", config)[2])
    names = {"model_hash": "the model", "input": "the input", "output": "the output"}
    if changed := " and ".join(words for name, words in names.items() if before.get(name) != now[name]):
        raise UserError(
            f"--output_file {config.output_file} was made with these settings, but {changed} has changed since: take "
            "another file, or --overwrite_output_file"
        )


def describe_summaries(config: SummaryConfig, model_hash: str) -> dict[str, Any]:
    return {
        "input": describe_file(Path(config.input_file)), "output": describe_file(Path(config.output_file)),
        "model_hash": model_hash, "settings": dataclasses.asdict(config), **describe_software(),
    }  # fmt: skip


def find_text(config: SummaryConfig, place: Place, row: Any) -> str:
    """A row's dialogue, which may be empty; UserError if it is no text."""
    where = f"{config.input_file}, {place}"
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with columns, found {type(row).__name__}")
    value = row.get(config.dialogue_column)
    is_empty = value is None or (isinstance(value, str) and not clean_text(value))
    if config.dialogue_column in row and is_empty:
        return ""
    return read_text(row, config.dialogue_column, "dialogue", where)


def read_one(accelerator: Accelerator, config: SummaryConfig) -> str:
    """The dialogue of a txt file or of stdin, which the main process reads, on every process."""

    def read() -> str:
        name = config.input_file or "stdin"
        if config.input_file:
            content = Path(config.input_file).read_bytes()
        else:
            if sys.stdin and sys.stdin.isatty():
                logger.info("reading a dialogue from the terminal, up to Ctrl-D on a line of its own")
            content = sys.stdin.buffer.read() if sys.stdin else b""
        try:
            text = clean_text(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: byte {error.start + 1} is not UTF-8") from error
        if not text:
            raise UserError(f"{name}: no text")
        return text

    return call_on_main(accelerator, read)


def read_in_parts(config: SummaryConfig) -> Iterator[dict[bytes, str]]:
    """The dialogues of up to ROWS_AT_ONCE rows at a time by their SHA-256, the empty ones left out."""
    rows = iterate_file(Path(config.input_file), in_parts=True)
    while part := list(itertools.islice(rows, ROWS_AT_ONCE)):
        texts = (find_text(config, place, row) for place, row in part)
        yield {digest(text): text for text in texts if text}


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def write_summaries(config: SummaryConfig, summaries: dict[bytes, Summary], model_hash: str):
    """Write output_file: each row of input_file in its order, with its summary and whether the dialogue was cut. Then
    its manifest, by which the same command repeated knows it.

    Args:
        summaries: by the SHA-256 of the dialogue.
    """
    num_rows = num_empty = num_cut = 0
    empty = Summary("", None)

    def add_summaries() -> Iterator[dict[str, Any]]:
        nonlocal num_rows, num_empty, num_cut
        for place, row in iterate_file(Path(config.input_file), in_parts=True):
            text = find_text(config, place, row)
            summary = summaries.get(digest(text)) if text else empty
            if summary is None:
                raise UserError(f"{config.input_file}, {place}: was changed while it was summarised")
            num_rows, num_empty, num_cut = num_rows + 1, num_empty + (not text), num_cut + summary.source_truncated
            yield row | {config.summary_column: summary.text, TRUNCATED: summary.source_truncated}

    target = Path(config.output_file)
    if target.suffix.lower() == ".csv":
        columns = dict.fromkeys(
            name for _, row in iterate_file(Path(config.input_file), in_parts=True) for name in row
        )
        names = [*columns, config.summary_column, TRUNCATED]
        header = [dict(zip(names, names, strict=True))]
        lines = (format_csv_line(row, names) for row in itertools.chain(header, add_summaries()))
    else:
        lines = (json.dumps(to_json(row), ensure_ascii=False) + "\n" for row in add_summaries())
    mark_unfinished(config.partial_texts)  # there may be no finished batch that says whose output it is
    write_parts(target, (line.encode() for line in lines))
    write_json(manifest_path(config), describe_summaries(config, model_hash))
    text = "%s: %d rows, of which %d are empty and %d were cut at %d tokens"
    logger.info(text, target, num_rows, num_empty, num_cut, config.max_source_length)


def format_csv_line(row: dict[str, Any], names: list[str]) -> str:
    """Text as it is, nothing where there is no value, and all else as JSON."""
    cells = (to_json(row.get(name)) for name in names)
    line = io.StringIO()
    csv.writer(line).writerow(
        "" if cell is None else cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)
        for cell in cells
    )
    return line.getvalue()


def to_json(value: Any) -> Any:
    """The value with what JSON has not put otherwise: NaN, a missing number, as null, bytes as base64, and an infinite
    number, a date and so on as text."""
    if isinstance(value, dict):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
