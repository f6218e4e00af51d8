"""Load and check dialogues, from the hub or from files.

A row is a dict of `id`, `dialogue` and `summary`, all text. Whatever is wrong with one is a UserError that names file,
row and column, before any model is loaded. Rows are counted from 1, the header not counted; in .jsonl a row is a line.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet

from utils.config import SPLITS, DataConfig, TrainingConfig, UserError, nearest
from utils.launch.hub import explain_hub_errors
from utils.launch.times import timed
from utils.prompting import clean_text

NUM_NAMED = 10  # mistakes that an error lists
# How files begin that are not what their name says, and what to do with them.
MAGIC = {
    b"\x1f\x8b": "is a gzip file: unpack it",
    b"PK\x03\x04": "is a zip or xlsx file: save it as csv",
    b"PAR1": "is a parquet file: name it .parquet",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}
MOST_BYTES = 2 * 10**9  # of a file of rows, which is read whole; DialogSum has 13 million


class Place(NamedTuple):
    """Of a row in a file."""

    number: int  # from 1, the header not counted
    line: int | None = None  # as an editor counts, where that is another number

    def __str__(self) -> str:
        return f"row {self.number}" + (f" (line {self.line})" if self.line else "")


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
        source, rows = files[split], read_file(Path(files[split]))
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
        rows = [(Place(number), row) for number, row in enumerate(data, start=1)]
    if not rows:
        raise UserError(f"{source} holds no rows")
    return check_rows(rows[:max_samples], source, split, config)


def read_file(path: Path) -> list[tuple[Place, Any]]:
    """(place, row) of each row of a csv, jsonl, json or parquet file."""
    if path.is_file() and path.suffix.lower() != ".parquet" and path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, and {MOST_BYTES:,} at most are read: split it")
    return list(iterate_file(path))


def iterate_file(path: Path, in_parts: bool = False) -> Iterator[tuple[Place, Any]]:
    """As read_file, row by row.

    Args:
        in_parts: whether the caller keeps only some of the rows at a time, which MOST_BYTES bound then, not the file.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl", ".json", ".parquet"):
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; use .csv, .jsonl, .json or .parquet")
    try:
        if suffix == ".parquet":
            yield from iterate_parquet(path, in_parts)
            return
        check_magic(path)
        # Spreadsheets write a byte order mark. JSON text may hold U+2028 and the like unescaped: its lines end at \n.
        with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else "\n") as file:
            if suffix == ".csv":
                yield from parse_csv(file, path)
            elif suffix == ".json" and (text := file.read()).lstrip().startswith("["):
                yield from ((Place(number), row) for number, row in enumerate(parse_json(text, path), start=1))
            else:
                if suffix == ".json":
                    check_not_wrapped(text, path)
                lines = text.split("\n") if suffix == ".json" else file
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield Place(number), parse_json(line.removesuffix("\n"), path, number)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, OverflowError, pyarrow.ArrowException) as error:
        if isinstance(error, UnicodeDecodeError) and suffix != ".parquet":
            raise UserError(describe_wrong_byte(path)) from error
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def check_magic(path: Path):
    with path.open("rb") as file:
        start = file.read(4)
    for magic, advice in MAGIC.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {advice}")


def check_not_wrapped(text: str, path: Path):
    """UserError for one object around the array of rows."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return  # lines
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
                raise UserError(f"{path}: an object around the rows, which are its {name!r}: expected the array alone")


def describe_wrong_byte(path: Path) -> str:
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8"
    return f"{path}: was changed while it was read"


def iterate_parquet(path: Path, in_parts: bool) -> Iterator[tuple[Place, dict[str, Any]]]:
    number = num_bytes = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: column {twice[0]!r} is there {names.count(twice[0])} times")
        # In parts: a file of some kilobytes can hold one long text a million times.
        for batch in file.iter_batches(batch_size=256):
            num_bytes = batch.nbytes + (0 if in_parts else num_bytes)
            if num_bytes > MOST_BYTES:
                raise UserError(
                    f"{path}: over {MOST_BYTES:,} bytes when it is unpacked, and no more are read: split it"
                )
            for row in batch.to_pylist():
                number += 1
                yield Place(number), row


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"line {line or getattr(error, 'lineno', 1)}, column {getattr(error, 'colno', 1)}"
        raise UserError(f"{path}, {where}: broken JSON: {getattr(error, 'msg', error)}") from error


def parse_csv(lines: Iterable[str], path: Path) -> Iterator[tuple[Place, dict[str, str]]]:
    # The standard library's reader and not pandas', which reads a dialogue "None" or "NA" as a missing value.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, strict=True)
    number = 1
    try:
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise UserError(f"{path}, line 1: column {twice[0]!r} is there {len(twice)} times")
        for separator in ";\t|":
            if len(header) == 1 and separator in header[0]:
                raise UserError(f"{path}, line 1: columns are separated by {separator!r}: expected ','")
        line = reader.line_num + 1
        for cells in reader:
            place, line = Place(number, line), reader.line_num + 1
            if not cells:
                continue  # a blank line
            if len(cells) != len(header):
                raise UserError(f"{path}, {place}: {len(cells)} cells, but {len(header)} columns")
            yield place, dict(zip(header, cells, strict=True))
            number += 1
    except csv.Error as error:
        raise UserError(f"{path}, row {number} (line {reader.line_num}): broken csv: {error}") from error


def check_rows(
    places_and_rows: Iterable[tuple[Place, Any]], source: str, split: str, config: DataConfig
) -> list[dict]:
    """Rows of `id`, `dialogue` and `summary` under these names; those without an id are named by split and number. Of
    several references an evaluation's row has all as `references`, and a training has a row of the first, or of each.
    UserError with the first NUM_NAMED mistakes."""
    rows, place_of, mistakes = [], {}, []
    for place, given in places_and_rows:
        try:
            row_id, dialogue, summaries = read_row(given, place, split, config)
            first_place, first_dialogue = place_of.setdefault(row_id, (place, dialogue))
            if dialogue != first_dialogue:
                raise UserError(f"{place}, column 'id': {row_id!r} is another dialogue's in {first_place}")
            row = {"id": row_id, "dialogue": dialogue, "summary": summaries[0]}
            if not isinstance(config, TrainingConfig):
                rows.append(row | ({"references": summaries} if len(summaries) > 1 else {}))
            else:
                rows += [
                    row | {"summary": text} for text in summaries[: None if config.train_on_all_references else 1]
                ]
        except UserError as error:
            mistakes.append(str(error))
            if place.number == 1 and ": no column " in mistakes[0]:  # which the others would repeat
                break
    if len(mistakes) == 1:
        raise UserError(f"{source}, {mistakes[0]}")
    if mistakes:
        more = f"; and {len(mistakes) - NUM_NAMED} more" * (len(mistakes) > NUM_NAMED)
        raise UserError(f"{source}: {len(mistakes)} rows are wrong: {'; '.join(mistakes[:NUM_NAMED])}{more}")
    return rows


def read_row(given: Any, place: Place, split: str, config: DataConfig) -> tuple[str, str, list[str]]:
    """Its id, its dialogue and its summaries."""
    if not isinstance(given, dict):
        raise UserError(f"{place}: expected an object with columns, found {type(given).__name__}")
    dialogue = read_text(given, config.dialogue_column, "dialogue", str(place))
    summaries = []
    for column in config.summary_column:
        texts = given.get(column)
        if not isinstance(texts, list):
            summaries.append(read_text(given, column, "summary", str(place)))
            continue
        if not texts:
            raise UserError(f"{place}, column {column!r}: an empty list")
        summaries += [read_text({column: text}, column, "summary", str(place)) for text in texts]
    row_id = str(given["id"]) if given.get("id") is not None else f"{split}_{place.number - 1}"
    if not row_id.strip():
        raise UserError(f"{place}, column 'id': empty; fill it, or leave the column out")
    check_encodable(row_id, "id", str(place))
    return row_id, dialogue, summaries


def read_text(row: dict, column: str, name: str, where: str) -> str:
    if column not in row:
        hint = nearest(column, [str(key) for key in row], "") or f"; set --{name}_column"
        if same := [key for key in row if str(key).strip() == column]:
            hint = f"; {same[0]!r} has blanks around it"
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
        group["references"] += row.get("references", [row["summary"]])
    return list(groups.values())
