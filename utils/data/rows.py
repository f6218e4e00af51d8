"""Load and check dialogues, from the hub or from files.

A row is a dict of `id`, `dialogue` and `summary`, all text. Whatever is wrong with one is a UserError that names file,
row and column, before any model is loaded. Rows are counted from 1, the header not counted; in .jsonl a row is a line.
"""

import csv
import io
import json
from collections.abc import Iterable
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
    """The first `max_samples` rows of a split, checked; none if the split is optional and only others have a file."""
    files = {name: getattr(config, f"{name}_file") for name in SPLITS}
    if any(path is not None for path in files.values()):
        if files[split] is None and optional:
            return []
        if not files[split]:
            raise UserError(f"--{split}_file is missing: with files of one's own the hub's data set is not used")
        source, numbered_rows = files[split], read_file(Path(files[split]))
    else:
        source = f"{config.dataset_name}[{split}]"
        with explain_hub_errors("dataset_name", config.dataset_name, "data set"):
            numbered_rows = list(enumerate(datasets.load_dataset(config.dataset_name, split=split), start=1))
    if not numbered_rows:
        raise UserError(f"{source} holds no rows")
    return check_rows(numbered_rows[:max_samples], source, split, config)


def read_file(path: Path) -> list[tuple[int, Any]]:
    """(row number, row) of each row of a csv, jsonl, json or parquet file."""
    if path.suffix not in (".csv", ".jsonl", ".json", ".parquet"):
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; use .csv, .jsonl, .json or .parquet")
    try:
        if path.suffix == ".parquet":
            return read_parquet(path)
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, and {MOST_BYTES:,} at most are read: split it")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    try:
        text = content.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8") from error
    if path.suffix == ".csv":
        return parse_csv(text, path)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return list(enumerate(parse_json(text, path), start=1))
    # split("\n") and not splitlines(): JSON text may hold U+2028 and the like unescaped.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, parse_json(line, path, number)) for number, line in lines if line.strip()]


def read_parquet(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows, num_bytes = [], 0
    with pyarrow.parquet.ParquetFile(path) as file:
        # In parts: a file of some kilobytes can hold one long text a million times.
        for batch in file.iter_batches(batch_size=256):
            num_bytes += batch.nbytes
            if num_bytes > MOST_BYTES:
                raise UserError(
                    f"{path}: over {MOST_BYTES:,} bytes when it is unpacked, and no more are read: split it"
                )
            rows += batch.to_pylist()
    return list(enumerate(rows, start=1))


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"line {line or getattr(error, 'lineno', 1)}, column {getattr(error, 'colno', 1)}"
        raise UserError(f"{path}, {where}: broken JSON: {getattr(error, 'msg', error)}") from error


def parse_csv(text: str, path: Path) -> list[tuple[int, dict[str, str]]]:
    # The standard library's reader and not pandas', which reads a dialogue "None" or "NA" as a missing value.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise UserError(f"{path}, line 1: column {twice[0]!r} is there {len(twice)} times")
        for cells in reader:
            if not cells:
                continue  # a blank line
            if len(cells) != len(header):
                raise UserError(f"{path}, row {len(rows) + 1}: {len(cells)} cells, but {len(header)} columns")
            rows.append((len(rows) + 1, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path}, row {len(rows) + 1} (line {reader.line_num}): broken csv: {error}") from error
    return rows


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
