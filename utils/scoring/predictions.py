"""Texts that another system, or an earlier evaluation, wrote to files."""

from pathlib import Path
from typing import Any

from utils.config import EvaluationConfig, UserError, check_model_name
from utils.data.rows import check_encodable, read_file
from utils.files import describe_file
from utils.generation.partial_texts import Summary

WORDS = {"true": True, "false": False, "": None}
NUM_NAMED = 5  # ids that an error lists


def load_predictions(
    config: EvaluationConfig, dialogues: list[dict[str, Any]], known_ids: set[str]
) -> dict[str, dict[str, Summary]]:
    """`summaries[model][dialogue]` from the files of --predictions_file, which hold `id`, `prediction` and maybe
    `model` and `truncated`.

    Each file is named as FILE or NAME=FILE. The id may be that of any of the dialogue's rows; a system that wrote one
    text for each row must have written the same for all rows of a dialogue. Rows of known ids that are not scored are
    passed over. UserError with all ids that are missing, unknown or doubled.
    """
    summaries, problems, source_of = {}, [], {}
    for word in config.predictions_file:
        name, path = split_name(word)
        for model, rows in read_models(name, path).items():
            if model in source_of:
                raise UserError(
                    f"--predictions_file: {source_of[model]} and {path} both hold model {model!r}; name them NAME=FILE"
                )
            source_of[model] = path
            check_encodable(model, "model", str(path))
            check_model_name(model, "predictions_file", config.demo)
            chosen, wrong = choose_rows(rows, dialogues, known_ids)
            if wrong:
                problems.append(f"{path}, model {model!r}: {'; '.join(wrong)}")
                continue
            summaries[model] = {
                dialogue["dialogue"]: Summary(row["prediction"], row.get("truncated"))
                for dialogue, row in zip(dialogues, chosen, strict=True)
            }
    if problems:
        raise UserError(". ".join(problems))
    return summaries


def hash_predictions(config: EvaluationConfig) -> dict[str, str]:
    """The SHA-256 of each file of --predictions_file."""
    return {word: describe_file(split_name(word)[1])["sha256"] for word in config.predictions_file}


def split_name(word: str) -> tuple[str | None, Path]:
    """(NAME, FILE) of NAME=FILE, (None, FILE) of FILE, whose path may hold a `=` if there is such a file."""
    name, equals, path = word.partition("=")
    if not equals or Path(word).exists():
        return None, Path(word)
    if not name or not path:
        raise UserError(f"--predictions_file takes FILE or NAME=FILE, got {word!r}")
    return name, Path(path)


def read_models(name: str | None, path: Path) -> dict[str, list[dict[str, Any]]]:
    """The file's rows by model: `name` if there is one, with the row's own model if the file holds several; else the
    row's model, or the file's stem."""
    rows_of_file = read_file(path)
    if not rows_of_file:
        raise UserError(f"{path} holds no rows")
    for place, row in rows_of_file:
        where = f"{path}, {place}"
        for column, types in (("id", str | int), ("prediction", str)):
            if not isinstance(row, dict) or not isinstance(row.get(column), types):
                raise UserError(f"{where}, column {column!r}: expected text")
        check_encodable(row["prediction"], "prediction", where)
        if isinstance(row.get("truncated"), str):  # a csv file's
            row["truncated"] = WORDS.get(row["truncated"].lower(), row["truncated"])
        if not isinstance(row.get("truncated"), bool | None):
            raise UserError(f"{where}, column 'truncated': expected true or false, got {row['truncated']!r}")
    by_model = {}
    for place, row in rows_of_file:
        model = str(row.get("model") or path.stem)
        by_model.setdefault(model, []).append(row | {"place": place})
    if name is None:
        return by_model
    return {f"{name}/{model}" if len(by_model) > 1 else name: rows for model, rows in by_model.items()}


def choose_rows(
    rows: list[dict[str, Any]], dialogues: list[dict[str, Any]], known_ids: set[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row for each dialogue, what is wrong); the rows are complete only if nothing is wrong."""
    index_of = {row_id: index for index, dialogue in enumerate(dialogues) for row_id in dialogue["ids"]}
    chosen, seen, unknown, doubled, differing, moved = {}, set(), [], [], [], []
    for row in rows:
        row_id = str(row["id"])
        named = f"{row_id!r} in {row['place']}"
        if row_id not in known_ids:
            unknown.append(named)
        elif row_id in seen:
            doubled.append(named)
        elif row_id in index_of and row.get("dialogue", (of := dialogues[index_of[row_id]]["dialogue"])) != of:
            moved.append(named)
        elif row_id in index_of and chosen.setdefault(index_of[row_id], row)["prediction"] != row["prediction"]:
            differing.append(named)
        seen.add(row_id)
    missing = [repr(dialogue["id"]) for index, dialogue in enumerate(dialogues) if index not in chosen]
    kinds = {
        "missing": missing, "unknown": unknown, "doubled": doubled, "of another dialogue than the data's": moved,
        "with another text than another row of the same dialogue": differing,
    }  # fmt: skip
    wrong = [f"{len(ids)} {kind}: {list_ids(ids)}" for kind, ids in kinds.items() if ids]
    return [chosen[index] for index in sorted(chosen)], wrong


def list_ids(ids: list[str]) -> str:
    return ", ".join(ids[:NUM_NAMED]) + (f" and {len(ids) - NUM_NAMED} more" if len(ids) > NUM_NAMED else "")
