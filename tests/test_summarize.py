"""summarize.py: rows in, the same rows with a summary out, however they come and go and whatever stops it."""

import csv
import datetime
import itertools
import json
import math
import shutil
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_rows, run_script, start_script, write_flan_t5, write_rows
from warm import KILL

import summarize
from utils.config import EvaluationConfig, SummaryConfig, UserError
from utils.generation import decoding, summaries, texts
from utils.generation.summaries import generate_summaries
from utils.modeling.loading import load_model, load_tokenizer
from utils.prompting import build_prompt

ODD = 'He said "no; never", twice.\n#Person2#: Ünïcode\u2028too, and a \\ backslash.'


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Of more layers than most, so that its texts differ from dialogue to dialogue."""
    return write_flan_t5(tmp_path_factory.mktemp("model"), num_layers=3, initializer_factor=3.0)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)


@pytest.fixture
def rows() -> list[dict]:
    """Dialogues twice, an odd one, empty ones, and columns of other kinds than text."""
    rows = [{"number": index, "dialogue": row["dialogue"]} for index, row in enumerate(make_rows(5))]
    rows += [{"number": 5, "dialogue": rows[0]["dialogue"]}, {"number": 6, "dialogue": ODD}]
    return [*rows, {"number": 7, "dialogue": " \n"}, {"number": 8, "dialogue": None}]


def write_input(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        return write_rows(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def summarize_file(model: Path, source: Path, target: Path, **settings):
    AcceleratorState._reset_state(True)
    settings = {"max_new_tokens": 9, "dtype": "fp32"} | settings
    summarize.main(SummaryConfig(model=str(model), input_file=str(source), output_file=str(target), **settings))
    with target.open(encoding="utf-8", newline="") as file:
        return list(map(json.loads, file) if target.suffix == ".jsonl" else csv.DictReader(file))


def expect(model: Path, dialogues: list[str]) -> dict[str, str]:
    """As an evaluation summarises them."""
    config = EvaluationConfig(max_new_tokens=9, dtype="fp32", output_dir="/nowhere")
    loaded, tokenizer = load_model(str(model), "sdpa", torch.float32), load_tokenizer(str(model))
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summaries, "append_batch", lambda *arguments: None)
        found = generate_summaries(Accelerator(), loaded, tokenizer, dialogues, config, "m", kept, "")
    return {dialogue: summary.text for dialogue, summary in found.items()}


@pytest.mark.parametrize("target", ["out.csv", "out.jsonl"])
@pytest.mark.parametrize("source", ["in.csv", "in.jsonl", "in.json", "in.parquet"])
def test_rows_keep_their_columns_and_order(model, rows, tmp_path, monkeypatch, source, target):
    monkeypatch.setattr(texts, "ROWS_AT_ONCE", 2)
    found = summarize_file(model, write_input(tmp_path / source, rows), tmp_path / target)
    assert [list(row) for row in found] == [["number", "dialogue", "summary", "truncated"]] * 9
    is_text = "csv" in source or "csv" in target
    assert [row["number"] for row in found] == [str(index) if is_text else index for index in range(9)]
    nothing = "" if is_text else None
    assert [row["dialogue"] for row in found[:8]] == [row["dialogue"] for row in rows[:8]]
    assert found[8]["dialogue"] == nothing
    expected = expect(model, [row["dialogue"] for row in rows[:7]])
    assert [row["summary"] for row in found] == [*(expected[row["dialogue"]] for row in rows[:7]), "", ""]
    assert len({row["summary"] for row in found}) > 3, "the texts tell the dialogues apart"
    assert {path.name for path in tmp_path.iterdir()} == {source, target, f"{target}.manifest.json"}


def test_a_dialogue_is_summarised_once(model, rows, tmp_path, monkeypatch):
    """Also where it comes again in another part of the file."""
    decoded = []
    monkeypatch.setattr(texts, "ROWS_AT_ONCE", 3)
    decode = decoding.decode_batch

    def count(model, prompts, config):
        decoded.extend(prompts)
        return decode(model, prompts, config)

    monkeypatch.setattr(summaries, "decode_batch", count)
    summarize_file(model, write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert len(decoded) == len({tuple(prompt) for prompt in decoded}) == 6


def test_a_cut_source_is_told(model, rows, tmp_path, caplog):
    caplog.set_level("INFO", logger="utils")
    source = write_rows(tmp_path / "in.jsonl", rows)
    found = summarize_file(model, source, tmp_path / "out.jsonl", max_source_length=60)
    tokenizer = load_tokenizer(str(model))
    prompts = [build_prompt(row["dialogue"]) for row in rows[:7]]
    expected = [len(ids) > 60 for ids in tokenizer(prompts).input_ids] + [False, False]
    assert [row["truncated"] for row in found] == expected and True in expected[:7] and False in expected[:7]
    text = f"out.jsonl: 9 rows, of which 2 are empty and {sum(expected)} were cut at 60 tokens"
    assert caplog.messages[-1].endswith(text)


def test_columns_that_only_some_rows_have(model, tmp_path):
    dialogues = [row["dialogue"] for row in make_rows(2)]
    rows = [{"text": dialogues[0], "a": {"b": [1, None]}}, {"c": True, "text": dialogues[1]}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    found = summarize_file(model, source, tmp_path / "out.csv", dialogue_column="text", summary_column="short")
    assert [list(row) for row in found] == [["text", "a", "c", "short", "truncated"]] * 2
    assert [(row["a"], row["c"]) for row in found] == [('{"b": [1, null]}', ""), ("", "true")]


@pytest.mark.parametrize("kind", ["stdin", "txt"])
def test_one_dialogue(model, tmp_path, monkeypatch, capsys, kind):
    (tmp_path / "chat.txt").write_bytes(b"\xef\xbb\xbf" + make_rows(1)[0]["dialogue"].encode() + b"\r\n")
    settings = {"input_file": str(tmp_path / "chat.txt")} if kind == "txt" else {}
    with (tmp_path / "chat.txt").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        summarize.main(SummaryConfig(model=str(model), max_new_tokens=9, dtype="fp32", **settings))
    (expected,) = expect(model, [make_rows(1)[0]["dialogue"]]).values()
    assert capsys.readouterr().out == f"{expected}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["chat.txt"]


MISTAKES = {
    "no such file": ({"input_file": "none.jsonl"}, "--input_file none.jsonl: no such file"),
    "a folder": ({"input_file": "."}, "--input_file .: not a file"),
    "no output_file": ({"output_file": None}, "--output_file is missing: a csv or jsonl file for the summaries of"),
    "no input_file": ({"input_file": None}, "--output_file needs an --input_file of rows; the summary of one"),
    "output of another kind": ({"output_file": "out.txt"}, "--output_file out.txt: unknown kind of file '.txt'; use"),
    "input of another kind": ({"input_file": "in.xlsx"}, "in.xlsx: unknown kind of file '.xlsx'; use .csv, .jsonl"),
    "one file for both": ({"output_file": "in.jsonl"}, "--output_file in.jsonl: in.jsonl is the --input_file"),
    "output is there": ({"output_file": "old.csv"}, "--output_file old.csv: old.csv is there already: take"),
    "output is a folder": ({"output_file": "dir.csv"}, "--output_file dir.csv: dir.csv is a folder"),
    "no such folder": ({"output_file": "no/out.csv"}, "--output_file no/out.csv: there is no folder no"),
    "a name too long": ({"output_file": "a" * 240 + ".csv"}, f"--output_file {'a' * 240}.csv"),
    "another's manifest": ({"output_file": "x.csv"}, "--output_file x.csv: x.csv.manifest.json is there already"),
    "another's part": ({"output_file": "y.csv"}, "--output_file y.csv: y.csv.part is a folder"),
    "input as manifest": (
        {"input_file": "z.jsonl.manifest.json", "output_file": "z.jsonl"},
        "--output_file z.jsonl: z.jsonl.manifest.json is the --input_file",
    ),
    "no such column": ({"dialogue_column": "dialog"}, "in.jsonl, row 1: no column 'dialog', only id, dialogue; did"),
    "no text": ({"dialogue_column": "id"}, "in.jsonl, row 2, column 'id': expected text, found int '7'"),
    "column of the output's": ({"summary_column": "id"}, "in.jsonl, row 1: has a column 'id', which is the output's"),
    "no rows": ({"input_file": "empty.jsonl"}, "empty.jsonl holds no rows"),
    "no such model": ({"model": "./none"}, "--model ./none: no such folder; make it with: accelerate launch train_l"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(model, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("in.jsonl"), [{"id": "a", "dialogue": "Hi."}, {"id": 7, "dialogue": "Oh."}])
    for name in ("empty.jsonl", "old.csv", "in.xlsx"):
        Path(name).touch()
    for name in ("dir.csv", "y.csv.part"):
        Path(name).mkdir()
    write_rows(Path("x.csv.manifest.json"), [{"mine": 1, "settings": {}}])
    write_rows(Path("z.jsonl.manifest.json"), [{"dialogue": "Hi."}])
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    settings, message = MISTAKES[mistake]
    settings = {"model": str(model), "input_file": "in.jsonl", "output_file": "out.jsonl"} | settings
    with pytest.raises(UserError) as error:
        summarize.main(SummaryConfig(**settings))
    assert str(error.value).startswith(message)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("content", "message"), [(b" \n", "no text"), (b"Hi.\xff", "byte 4 is not UTF-8")])
def test_one_dialogue_that_is_none(model, tmp_path, content, message):
    (tmp_path / "chat.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"chat.txt: {message}$"):
        summarize.main(SummaryConfig(model=str(model), input_file=str(tmp_path / "chat.txt")))


@pytest.mark.parametrize("target", ["out.csv", "out.jsonl"])
def test_values_that_json_has_not(model, tmp_path, target):
    """Readers of JSON refuse a bare NaN."""
    values = {"missing": math.nan, "most": math.inf, "raw": b"\x00\xff", "day": datetime.date(2026, 11, 28)}
    row = {"dialogue": make_rows(1)[0]["dialogue"], **values, "deep": [math.nan]}
    (found,) = summarize_file(model, write_input(tmp_path / "in.parquet", [row]), tmp_path / target)
    is_csv = target == "out.csv"
    nothing, in_list = ("", "[null]") if is_csv else (None, [None])
    expected = {"missing": nothing, "most": "inf", "raw": "AP8=", "day": "2026-11-28", "deep": in_list}
    assert {name: found[name] for name in expected} == expected


def test_what_changes_meanwhile_is_not_written_over(model, rows, tmp_path, monkeypatch):
    """Neither an output that another has written, nor summaries of another input."""
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    check = summarize.check_files
    monkeypatch.setattr(summarize, "check_files", lambda config: check(config) or target.write_text("theirs"))
    with pytest.raises(UserError, match="is there already"):
        summarize_file(model, source, target)
    assert target.read_text() == "theirs"
    target.unlink()
    monkeypatch.setattr(summarize, "check_files", check)
    write = summarize.write_summaries
    changed = [{**row, "dialogue": "Another."} for row in rows]
    monkeypatch.setattr(summarize, "write_summaries", lambda *given: write_rows(source, changed) and write(*given))
    with pytest.raises(UserError, match="in.jsonl, row 1: was changed while it was summarised"):
        summarize_file(model, source, target)
    assert not target.exists()


def test_repeated(model, rows, tmp_path, caplog):
    """A finished run says so and changes nothing; it is refused if what it was made from has changed."""
    caplog.set_level("INFO", logger="utils")
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    model = shutil.copytree(model, tmp_path / "model")
    first = summarize_file(model, source, target)
    before = target.stat().st_mtime_ns
    assert summarize_file(model, source, target) == first
    assert target.stat().st_mtime_ns == before
    assert caplog.messages[-1] == f"{target} is there, finished; --overwrite_output_file would make it again"
    with pytest.raises(UserError, match="is there already"):
        summarize_file(model, source, target, max_new_tokens=8)
    for path, what in ((source, "input"), (target, "output"), (model / "model.safetensors", "model")):
        content = path.read_bytes()
        changed = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]  # a weight
        path.write_bytes(changed if path.suffix == ".safetensors" else content.replace(b": 1,", b": 11,"))
        with pytest.raises(UserError, match=f"was made with these settings, but the {what} has changed since: take"):
            summarize_file(model, source, target)
        path.write_bytes(content)
    assert summarize_file(model, source, target, overwrite_output_file=True) == first
    assert target.stat().st_mtime_ns != before
    target.unlink()  # and not its manifest
    assert summarize_file(model, source, target, max_new_tokens=8) != first


@pytest.mark.slow
def test_killed_and_repeated_on_two_processes(model, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"dialogue": row["dialogue"]} for row in make_rows(300)])

    def command(target: Path) -> list[str]:
        words = ["--model", model, "--input_file", source, "--output_file", target, "--max_new_tokens", 9]
        return ["summarize.py", *map(str, words), "--per_device_eval_batch_size", "2"]

    whole = run_script(*command(tmp_path / "whole.jsonl"))
    assert whole.returncode == 0, whole.stderr
    target = tmp_path / "killed.jsonl"
    process = start_script(*command(target))
    for _ in itertools.count():
        partial = list(tmp_path.glob("killed.jsonl.partial-*-0.jsonl"))
        if partial and partial[0].read_text().count('"key"') >= 10:
            break
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.001)
    process.send_signal(KILL)
    process.wait()
    assert not target.exists()
    again = run_script(*command(target), num_processes=2)
    assert again.returncode == 0, again.stderr
    assert "texts are there from an earlier run" in again.stderr
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    outputs = {"whole.jsonl", "killed.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.jsonl",
        *outputs,
        *(f"{x}.manifest.json" for x in outputs),
    }


def test_another_commands_batches_are_not_this_ones(model, rows, tmp_path):
    """A file of the user's own is not taken for that of a run that was stopped."""
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "own.csv"
    target.write_text("mine")
    (tmp_path / "own.csv.partial-0.jsonl").touch()
    (tmp_path / "own.csv.partial-01234567-0.jsonl").touch()
    with pytest.raises(UserError, match="is there already"):
        summarize_file(model, source, target)
    assert target.read_text() == "mine"


@pytest.mark.parametrize("name", ["model", "input_file", "output_file", "summary_column"])
def test_empty_settings(name):
    with pytest.raises(UserError, match=f"--{name} is empty"):
        SummaryConfig(**{name: ""})


def test_half_a_surrogate_pair_in_another_column(model, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"dialogue": "Hi.", "note": "\ud83d"}])
    with pytest.raises(UserError, match="in.jsonl, row 1, column 'note': half a surrogate pair"):
        summarize_file(model, source, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
