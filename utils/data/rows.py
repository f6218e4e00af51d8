"""Load and check dialogues, from the hub or from files.

A row is a dict of `id`, `dialogue` and `summary`, all text. Whatever is wrong with one is a UserError that names file,
row and column, before any model is loaded. Rows are counted from 1, the header not counted; in .jsonl a row is a line.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from utils.config import SPLITS, DataConfig, UserError, nearest
from utils.launch.hub import explain_hub_errors
from utils.launch.times import timed
from utils.prompting import clean_text

MOST_BYTES = 2 * 10**9  # of a file of rows, which is read whole; DialogSum has 13 million


@timed("data")
def load_rows(
    config: DataConfig, split: str, max_samples: int | None = None, optional: bool = False
) -> list[dict[str, str]]:
    """The first `max_samples` rows of a split, checked; none if it is optional and there are others alone."""
    files = {name: getattr(config, f"{name}_file") for name in SPLITS}
    if any(path is not None for path in files.values()):
        if files[split] is None and optional:
            return []
        if not files[split]:
            raise UserError(f"--{split}_file is missing: with files of one's own the hub's data set is not used")
        source, numbered_rows = files[split], read_file(Path(files[split]))
    else:
        name = config.validation_split if split == "validation" else split
        source = f"{config.dataset_name}[{name}]"
        with explain_hub_errors("dataset_name", config.dataset_name, "data set"):
            try:
                data = datasets.load_dataset(
                    config.dataset_name, config.dataset_config_name, split=name, revision=config.dataset_revision
                )
            except ValueError as error:
                if not (optional and name == split and str(error).startswith("Unknown split")):
                    raise
                return []
        numbered_rows = list(enumerate(data, start=1))
    if not numbered_rows:
        raise UserError(f"{source} holds no rows")
    return check_rows(numbered_rows[:max_samples], source, split, config)


def read_file(path: Path) -> list[tuple[int, Any]]:
    """(row number, row) of each row of a csv, jsonl, json or parquet file."""
    if path.is_file() and path.suffix != ".parquet" and path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, and {MOST_BYTES:,} at most are read: split it")
    return list(iterate_file(path))


def iterate_file(path: Path, in_parts: bool = False) -> Iterator[tuple[int, Any]]:
    """As read_file, row by row.

    Args:
        in_parts: whether the caller keeps but a part of the rows, so that MOST_BYTES bound a part and not the file.
    """
    if path.suffix not in (".csv", ".jsonl", ".json", ".parquet"):
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; use .csv, .jsonl, .json or .parquet")
    try:
        if path.suffix == ".parquet":
            yield from iterate_parquet(path, in_parts)
            return
        # Spreadsheets write a byte order mark. JSON text may hold U+2028 and the like unescaped: its lines end at \n.
        with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else "\n") as file:
            if path.suffix == ".csv":
                yield from parse_csv(file, path)
            elif path.suffix == ".json" and (text := file.read()).lstrip().startswith("["):
                yield from enumerate(parse_json(text, path), start=1)
            else:
                lines = text.split("\n") if path.suffix == ".json" else file
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield number, parse_json(line.removesuffix("\n"), path, number)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        if isinstance(error, UnicodeDecodeError) and path.suffix != ".parquet":
            raise UserError(describe_wrong_byte(path)) from error
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def describe_wrong_byte(path: Path) -> str:
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8"
    return f"{path}: was changed while it was read"


def iterate_parquet(path: Path, in_parts: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    number = num_bytes = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        # In parts: a file of some kilobytes can hold one long text a million times.
        for batch in file.iter_batches(batch_size=256):
            num_bytes = batch.nbytes + (0 if in_parts else num_bytes)
            if num_bytes > MOST_BYTES:
                raise UserError(
                    f"{path}: over {MOST_BYTES:,} bytes when it is unpacked, and no more are read: split it"
                )
            for row in batch.to_pylist():
                number += 1
                yield number, row


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"line {line or getattr(error, 'lineno', 1)}, column {getattr(error, 'colno', 1)}"
        raise UserError(f"{path}, {where}: broken JSON: {getattr(error, 'msg', error)}") from error


def parse_csv(lines: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    # The standard library's reader and not pandas', which reads a dialogue "None" or "NA" as a missing value.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, strict=True)
    number = 1
    try:
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise UserError(f"{path}, line 1: column {twice[0]!r} is there {len(twice)} times")
        for cells in reader:
            if not cells:
                continue  # a blank line
            if len(cells) != len(header):
                raise UserError(f"{path}, row {number}: {len(cells)} cells, but {len(header)} columns")
            yield number, dict(zip(header, cells, strict=True))
            number += 1
    except csv.Error as error:
        raise UserError(f"{path}, row {number} (line {reader.line_num}): broken csv: {error}") from error


def check_rows(numbered_rows: Iterable[tuple[int, Any]], source: str, split: str, config: DataConfig) -> list[dict]:
    """Rows of `id`, `dialogue` and `summary` under these names; rows without an id are named by split and number."""
    rows, first_with_id = [], {}
    for number, given in numbered_rows:
        where = f"{source}, row {number}"
        if not isinstance(given, dict):
            raise UserError(f"{where}: expected an object with columns, found {type(given).__name__}")
        row = {
            name: read_text(given, getattr(config, f"{name}_column"), name, where) for name in ("dialogue", "summary")
        }
        row["id"] = str(given["id"]) if given.get("id") is not None else f"{split}_{number - 1}"
        check_encodable(row["id"], "id", where)
        first_number, first_dialogue = first_with_id.setdefault(row["id"], (number, row["dialogue"]))
        if row["dialogue"] != first_dialogue:
            raise UserError(f"{where}, column 'id': {row['id']!r} is another dialogue's in row {first_number}")
        rows.append(row)
    return rows


def read_text(row: dict, column: str, name: str, where: str) -> str:
    if column not in row:
        hint = nearest(column, [str(key) for key in row], "") or f"; set --{name}_column"
        raise UserError(f"{where}: no column {column!r}, only {', '.join(map(str, row))}{hint}")
    text = row[column]
    if not isinstance(text, str):
        raise UserError(f"{where}, column {column!r}: expected text, found {type(text).__name__} {str(text)[:40]!r}")
    if not clean_text(text):
        raise UserError(f"{where}, column {column!r}: empty text")
    check_encodable(text, column, where)
    return clean_text(text)


def check_encodable(text: str, column: str, where: str):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}, column {column!r}: half a surrogate pair at character {error.start}") from error


def group_by_dialogue(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Each distinct dialogue once, in order, with the `ids` of its rows, their summaries as `references`, and the
    first of the ids as its `id`."""
    groups = {}
    for row in rows:
        empty = {"id": row["id"], "dialogue": row["dialogue"], "ids": [], "references": []}
        group = groups.setdefault(row["dialogue"], empty)
        group["ids"].append(row["id"])
        group["references"].append(row["summary"])
    return list(groups.values())
