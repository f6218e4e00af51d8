"""A user's mistakes: each is one line on stderr that names what is wrong, exit code 2, and no file touched. And what
only looks like a mistake, which must work."""

import csv
import dataclasses
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPOSITORY, make_rows, read_jsonl, start_warm_server, write_rows
from helpers import SCRIPTS, start
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, ByT5Tokenizer, GPT2Config, T5Config, T5ForConditionalGeneration

import utils.launch.script
from utils.config import EvaluationConfig, LoraTrainingConfig, TrainingConfig, UserError
from utils.data.rows import load_rows
from utils.launch.command_line import parse_config
from utils.launch.locks import lock_folder
from utils.launch.output_dir import check_output_dir, set_aside
from utils.prompting import build_prompt
from utils.scoring.metrics.rouge import METRICS, score_texts

TRAINING = ("train_full", "train_lora")
FP16_REASON = "fp16 overflows in T5 and trains to NaN; use --mixed_precision bf16, or no on a device without bf16"
GOOD = {"id": "a", "dialogue": "#Person1#: Hi.", "summary": "A greeting."}

every_script = pytest.mark.parametrize("script", SCRIPTS)
both_trainings = pytest.mark.parametrize("script", TRAINING)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything in the folder, byte for byte; None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to start the scripts from."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refuse(here, capsys):
    """Start a script that must refuse; returns its message, having checked that it did nothing else."""

    def refuse(script: str, *words: str | Path) -> str:
        before = snapshot(here)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            start(script, *words)
        written = capsys.readouterr()
        assert stop.value.code == 2
        assert written.out == ""
        prefix = f"{script}.py: error: "
        assert written.err.startswith(prefix) and written.err.endswith("\n")
        message = written.err.removeprefix(prefix)[:-1]
        assert len(message.splitlines()) == 1, message
        assert snapshot(here) == before
        return message

    return refuse


def name_data(script: str, path: str | Path) -> list[str]:
    return [f"--{'test' if script == 'evaluate_rouge' else 'train'}_file={path}"]


def name_model(script: str, path: str | Path) -> list[str]:
    return [f"--models=m={path}"] if script == "evaluate_rouge" else [f"--model_name_or_path={path}"]


def model_setting(script: str) -> str:
    return "--models m" if script == "evaluate_rouge" else "--model_name_or_path"


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*rows: dict, **columns: pyarrow.Array) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns) if columns else pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


NOT_UTF8_COLUMN = pyarrow.array([b"Hi", b"\xff"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
FOLDER = object()
CSV_HEADER = b"id,dialogue,summary\n"
BAD_FILES = {
    "missing csv": ("rows.csv", None, ": no such file"),
    "missing parquet": ("rows.parquet", None, ": no such file"),
    "missing below a folder that is missing": ("no/rows.jsonl", None, ": no such file"),
    "folder": ("rows.csv", FOLDER, ": cannot be read: [Errno 21] Is a directory: 'rows.csv'"),
    "folder without suffix": ("rows", FOLDER, ": unknown kind of file ''; use .csv, .jsonl, .json or .parquet"),
    "unknown suffix": ("rows.txt", b"a", ": unknown kind of file '.txt'; use .csv, .jsonl, .json or .parquet"),
    "empty csv": ("rows.csv", b"", " holds no rows"),
    "header only": ("rows.csv", CSV_HEADER, " holds no rows"),
    "empty jsonl": ("rows.jsonl", b"", " holds no rows"),
    "blank lines only": ("rows.jsonl", b"\n \n", " holds no rows"),
    "empty list": ("rows.json", b"[]", " holds no rows"),
    "empty parquet": ("rows.parquet", b"", ": cannot be read: "),
    "parquet without rows": (
        "rows.parquet",
        parquet(dialogue=pyarrow.array([], pyarrow.string()), summary=pyarrow.array([], pyarrow.string())),
        " holds no rows",
    ),
    "broken parquet": ("rows.parquet", parquet(GOOD)[:-20], ": cannot be read: "),
    "csv called parquet": ("rows.parquet", CSV_HEADER + b"a,b,c\n", ": cannot be read: "),
    "wrong column": (
        "rows.jsonl",
        lines({"id": "a", "dialog": "Hi.", "summary": "A greeting."}),
        ", row 1: no column 'dialogue', only id, dialog, summary; did you mean dialog?",
    ),
    "column with no name near": (
        "rows.jsonl",
        lines({"id": "a", "text": "Hi.", "summary": "A greeting."}),
        ", row 1: no column 'dialogue', only id, text, summary; set --dialogue_column",
    ),
    "wrong column in csv": (
        "rows.csv",
        b"dialogue,sumary\nHi.,A greeting.\n",
        ", row 1 (line 2): no column 'summary', only dialogue, sumary; did you mean sumary?",
    ),
    "column name of two lines": ("rows.csv", b'"dialogue\n(text)",summary\nHi.,A greeting.\n', ", row 1 (line 3): no"),
    "column missing in a later row": ("rows.jsonl", lines(GOOD, {"dialogue": "Hi."}), ", row 2: no column 'summary'"),
    "empty dialogue": ("rows.csv", CSV_HEADER + b"a,Hi.,b\nb,,c\n", ", row 2 (line 3), column 'dialogue': empty"),
    "blank summary": (
        "rows.jsonl",
        lines(GOOD, GOOD | {"summary": " \n\t"}),
        ", row 2, column 'summary': empty text",
    ),
    "number": (
        "rows.jsonl",
        lines(GOOD, GOOD | {"dialogue": 7}),
        ", row 2, column 'dialogue': expected text, found int '7'",
    ),
    "not a number": (
        "rows.jsonl",
        lines(GOOD, GOOD | {"summary": float("nan")}),
        ", row 2, column 'summary': expected text, found float 'nan'",
    ),
    "null": (
        "rows.jsonl",
        lines(GOOD, GOOD | {"summary": None}),
        ", row 2, column 'summary': expected text, found NoneType 'None'",
    ),
    "list": (
        "rows.json",
        json.dumps([GOOD, GOOD | {"dialogue": ["Hi.", "Hello."]}]).encode(),
        ", row 2, column 'dialogue': expected text, found list",
    ),
    "nested": (
        "rows.jsonl",
        lines(GOOD | {"dialogue": {"speaker": "Hi."}}),
        ", row 1, column 'dialogue': expected text, found dict",
    ),
    "null in parquet": (
        "rows.parquet",
        parquet(GOOD, GOOD | {"dialogue": None}),
        ", row 2, column 'dialogue': expected text, found NoneType 'None'",
    ),
    "number in parquet": (
        "rows.parquet",
        parquet(GOOD | {"summary": 1.5}),
        ", row 1, column 'summary': expected text, found float '1.5'",
    ),
    "bytes in parquet": (
        "rows.parquet",
        parquet(GOOD | {"summary": b"Hi"}),
        ", row 1, column 'summary': expected text, found bytes",
    ),
    "broken JSON line": (
        "rows.jsonl",
        lines(GOOD) + b'\n{"id": "b", "dialogue": "Hi.\n' + lines(GOOD),
        ", line 3, column 25: broken JSON: ",
    ),
    "two objects in a line": (
        "rows.jsonl",
        lines(GOOD) + lines(GOOD).strip() + lines(GOOD),
        f", line 2, column {len(lines(GOOD))}: broken JSON: Extra data",
    ),
    "broken JSON list": ("rows.json", b'[\n{"id": "a",\n]\n', ", line 3, column 1: broken JSON: "),
    "JSON number too long to read": ("rows.jsonl", lines(GOOD) + b"1" * 5000, ", line 2, column 1: broken JSON: "),
    "JSON too deep to read": ("rows.jsonl", lines(GOOD) + b"[" * 100_000, ", line 2, column 1: broken JSON: "),
    "row that is a list": ("rows.jsonl", lines(GOOD, [1]), ", row 2: expected an object with columns, found list"),
    "row that is text": ("rows.json", b'["Hi."]', ", row 1: expected an object with columns, found str"),
    "row that is null": ("rows.jsonl", lines(None), ", row 1: expected an object with columns, found NoneType"),
    "undecodable csv": ("rows.csv", CSV_HEADER + "a,Hi.,é\n".encode("latin-1"), ", line 2: byte 0xe9 is not UTF-8"),
    "undecodable jsonl": ("rows.jsonl", lines(GOOD, GOOD) + b"\xff\xfe", ", line 3: byte 0xff is not UTF-8"),
    "utf-16": ("rows.csv", CSV_HEADER.decode().encode("utf-16"), ": is UTF-16: save it as UTF-8"),
    "undecodable parquet": (
        "rows.parquet",
        parquet(dialogue=NOT_UTF8_COLUMN, summary=pyarrow.array(["a", "b"])),
        ": cannot be read: ",
    ),
    "unclosed quote": (
        "rows.csv",
        CSV_HEADER + b'a,Hi.,b\nb,"Hello.,c\nd,e,f\n',
        ", row 2 (line 4): broken csv: unexpected end of data",
    ),
    "text after a quote": (
        "rows.csv",
        CSV_HEADER + b'a,"Hi." she said,b\n',
        ", row 1 (line 2): broken csv: ',' expected after '\"'",
    ),
    "too many cells": ("rows.csv", CSV_HEADER + b"a,Hi.,b\nb,Hello,you,c\n", ", row 2 (line 3): 4 cells, but 3"),
    "column twice": ("rows.csv", CSV_HEADER.strip() + b",dialogue\n", ", line 1: column 'dialogue' is there 2 times"),
    "too few cells": ("rows.csv", CSV_HEADER + b"a,Hi.\n", ", row 1 (line 2): 2 cells, but 3 columns"),
    "half a surrogate pair": (
        "rows.jsonl",
        lines(GOOD, GOOD | {"summary": "Hi \ud83d."}),
        ", row 2, column 'summary': half a surrogate pair at character 3",
    ),
    "half a surrogate pair in the id": (
        "rows.jsonl",
        lines(GOOD, GOOD | {"id": "\ud83d"}),
        ", row 2, column 'id': half a surrogate pair",
    ),
    "id of another dialogue": (
        "rows.jsonl",
        lines(GOOD, GOOD | {"id": "b"}, GOOD | {"dialogue": "Hello."}),
        ", row 3, column 'id': 'a' is another dialogue's in row 1",
    ),
    "several rows": (
        "rows.csv",
        CSV_HEADER + b'a,"Hi.\nOh.",b\nb,,c\n,Hi.,c\nd,Hi.,\n',
        ": 3 rows are wrong: row 2 (line 4), column 'dialogue': empty text; row 3 (line 5), column 'id': empty; fill "
        "it, or leave the column out; row 4 (line 6), column 'summary': empty text",
    ),
    "more rows than are listed": (
        "rows.jsonl",
        lines(*[GOOD | {"summary": ""}] * 12),
        ": 12 rows are wrong: "
        + "; ".join(f"row {n}, column 'summary': empty text" for n in range(1, 11))
        + "; and 2 more",
    ),
    "another separator": ("rows.csv", b"id;dialogue;summary\na;b;c\n", ", line 1: columns are separated by ';': exp"),
    "tabs": ("rows.csv", b"dialogue\tsummary\nb\tc\n", ", line 1: columns are separated by '\\t': expected ','"),
    "blanks in the header": (
        "rows.csv",
        b"id, dialogue, summary\na,Hi.,b\n",
        ", row 1 (line 2): no column 'dialogue', only id, dialogue, summary; ' dialogue' has blanks around it",
    ),
    "an object around the rows": (
        "rows.json",
        json.dumps({"version": 1, "data": [GOOD]}, indent=1).encode(),
        ": an object around the rows, which are its 'data': expected the array alone",
    ),
    "gzip": ("rows.csv", gzip.compress(CSV_HEADER), ": is a gzip file: unpack it"),
    "xlsx": ("rows.csv", b"PK\x03\x04\x14\0", ": is a zip or xlsx file: save it as csv"),
    "parquet called csv": ("rows.csv", parquet(GOOD), ": is a parquet file: name it .parquet"),
    "no reference": ("rows.jsonl", lines(GOOD | {"summary": []}), ", row 1, column 'summary': an empty list"),
    "empty reference": ("rows.jsonl", lines(GOOD | {"summary": ["a", " "]}), ", row 1, column 'summary': empty text"),
    "ids alike as text": (
        "rows.jsonl",
        lines(GOOD | {"id": 1}, GOOD | {"id": "1", "dialogue": "Hello."}),
        ", row 2, column 'id': '1' is another dialogue's in row 1",
    ),
}


@every_script
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(refuse, here, script, case):
    name, content, expected = BAD_FILES[case]
    if content is FOLDER:
        (here / name).mkdir()
    elif content is not None:
        (here / name).write_bytes(content)
    assert refuse(script, *name_data(script, name)).startswith(name + expected)


@both_trainings
def test_bad_validation_file(refuse, here, script):
    write_rows(here / "train.jsonl", make_rows(3))
    (here / "dev.csv").write_bytes(CSV_HEADER + b"a,Hi.,b\nb,Hello.,\n")
    message = refuse(script, "--train_file=train.jsonl", "--validation_file=dev.csv")
    assert message == "dev.csv, row 2 (line 3), column 'summary': empty text"


@pytest.mark.parametrize(
    ("script", "words", "missing"),
    [
        ("train_full", ["--validation_file=rows.jsonl"], "train"),
        ("train_lora", ["--test_file=rows.jsonl"], "train"),
        ("evaluate_rouge", ["--train_file=rows.jsonl"], "test"),
        ("evaluate_rouge", ["--test_file=rows.jsonl", "--split=validation"], "validation"),
    ],
)
def test_file_of_another_split_only(refuse, here, script, words, missing):
    write_rows(here / "rows.jsonl", make_rows(3))
    message = refuse(script, *words)
    assert message == f"--{missing}_file is missing: with files of one's own the hub's data set is not used"


@every_script
def test_file_name_that_is_empty(refuse, script):
    """A shell's unset variable must not start a download of the hub's data set."""
    split = "test" if script == "evaluate_rouge" else "train"
    assert refuse(script, f"--{split}_file=").startswith(f"--{split}_file ")


@every_script
def test_column_that_was_asked_for(refuse, here, script):
    write_rows(here / "rows.jsonl", make_rows(3))
    message = refuse(script, *name_data(script, "rows.jsonl"), "--summary_column=highlights")
    assert message == "rows.jsonl, row 1: no column 'highlights', only id, dialogue, summary; set --summary_column"


BAD_VALUES = {
    "--max_source_length=0": "--max_source_length must be positive, got 0",
    "--per_device_eval_batch_size=-1": "--per_device_eval_batch_size must be positive, got -1",
    "--seed=-1": "--seed must",
    "--seed=18446744073709551616": "--seed",  # torch holds 64 bits
    "--seed=many": "argument --seed: invalid int value: 'many'",
    "--dialogue_column=summary": "--dialogue_column and --summary_column are both 'summary'",
    "--attn_implementation=flash": "argument --attn_implementation/--attn-implementation: invalid choice: 'flash'",
    "--demo=perhaps": "argument --demo: Truthy value expected: got perhaps",
    "--output_dri=out": "unknown setting --output_dri=out; did you mean --output_dir?",
    "--confg=my.yaml": "unknown setting --confg=my.yaml; did you mean --config?",
    "--overwrite_output=yes": "unknown setting --overwrite_output=yes; did you mean --overwrite_output_dir?",
    "--quite_another_thing": "unknown setting --quite_another_thing",
    "stray": "unknown setting stray",
    "--output_dir": "argument --output_dir/--output-dir: expected one argument",
}
BAD_TRAINING_VALUES = {
    "--max_target_length=0": "--max_target_length must be positive, got 0",
    "--total_train_batch_size=0": "--total_train_batch_size must be positive, got 0",
    "--total_train_batch_size=2.5": "argument --total_train_batch_size/--total-train-batch-size: invalid int value",
    "--per_device_train_batch_size=-16": "--per_device_train_batch_size must be positive, got -16",
    "--num_train_epochs=0": "--num_train_epochs must be positive, got 0",
    "--max_train_steps=0": "--max_train_steps must be positive, got 0",
    "--learning_rate=0": "--learning_rate must be positive, got 0.0",
    "--learning_rate=nan": "--learning_rate must be positive, got nan",
    "--learning_rate=inf": "--learning_rate must be positive, got inf",
    "--learning_rate=fast": "argument --learning_rate/--learning-rate: invalid float value: 'fast'",
    "--max_grad_norm=0": "--max_grad_norm must be positive, got 0.0",
    "--max_grad_norm=inf": "--max_grad_norm must be positive, got inf",
    "--weight_decay=-0.1": "--weight_decay must not be negative, got -0.1",
    "--weight_decay=nan": "--weight_decay must not be negative, got nan",
    "--warmup_ratio=1.5": "--warmup_ratio must be between 0 and 1, got 1.5",
    "--warmup_ratio=nan": "--warmup_ratio must be between 0 and 1, got nan",
    "--logging_steps=0": "--logging_steps must be positive, got 0",
    "--eval_steps=-1": "--eval_steps must be positive, got -1",
    "--max_train_samples=0": "--max_train_samples must be positive, got 0",
    "--max_eval_samples=0": "--max_eval_samples must be positive, got 0",
    "--mixed_precision=fp16": f"--mixed_precision fp16: {FP16_REASON}",
    "--mixed_precision=fp8": "argument --mixed_precision/--mixed-precision: invalid choice: 'fp8'",
    "--lr_scheduler_type=step": "argument --lr_scheduler_type/--lr-scheduler-type: invalid choice: 'step'",
    "--report_to=comet": "argument --report_to/--report-to: invalid choice: 'comet'",
    "--num_beams=4": "unknown setting --num_beams=4",
    "--warmup_ratio=0.1 --lr_scheduler_type=constant": (
        "--warmup_ratio 0.1 needs --lr_scheduler_type constant_with_warmup"
    ),
    "--lr_scheduler_type=inverse_sqrt": "--lr_scheduler_type inverse_sqrt needs a --warmup_ratio above 0, got 0.0",
}
BAD_LORA_VALUES = {
    "--lora_r=0": "--lora_r must be positive, got 0",
    "--lora_alpha=-1": "--lora_alpha must be positive, got -1",
    "--lora_dropout=1": "--lora_dropout must be at least 0 and below 1, got 1.0",
    "--lora_dropout=nan": "--lora_dropout must be at least 0 and below 1, got nan",
    "--lora_target_modules": "argument --lora_target_modules/--lora-target-modules: expected at least one argument",
}
BAD_EVALUATION_VALUES = {
    "--max_eval_samples=0": "--max_eval_samples must be positive, got 0",
    "--max_new_tokens=0": "--max_new_tokens must be positive, got 0",
    "--num_beams=0": "--num_beams must be positive, got 0",
    "--example_index=-1": "--example_index must not be negative, got -1",
    "--split=dev": "argument --split: invalid choice: 'dev'",
    "--models=google/flan-t5-base": "--models takes NAME=PATH_OR_HUB_ID, got 'google/flan-t5-base'",
    "--models==google/flan-t5-base": "--models takes NAME=PATH_OR_HUB_ID, got '=google/flan-t5-base'",
    "--models=base=": "--models takes NAME=PATH_OR_HUB_ID, got 'base='",
    "--models a=x b=y a=z": "--models names 'a' twice",
    "--models a=x --models=b=y": "--models is given twice, and only the last would count",
    "--learning_rate=1": "unknown setting --learning_rate=1",
}
VALUE_CASES = [
    *((script, words) for script in SCRIPTS for words in BAD_VALUES.items()),
    *((script, words) for script in TRAINING for words in BAD_TRAINING_VALUES.items()),
    *(("train_lora", words) for words in BAD_LORA_VALUES.items()),
    *(("evaluate_rouge", words) for words in BAD_EVALUATION_VALUES.items()),
]


@pytest.mark.parametrize(
    ("script", "case"), VALUE_CASES, ids=lambda part: part[0] if isinstance(part, tuple) else part
)
def test_bad_value(refuse, data_files, script, case):
    words, expected = case
    assert refuse(script, *name_data(script, data_files["train"]), *words.split(" ")).startswith(expected)


@every_script
def test_every_number_has_a_bound(refuse, script):
    numbers = (int, float, int | None)
    names = [item.name for item in dataclasses.fields(SCRIPTS[script][1]) if item.type in numbers]
    assert len(names) >= 7
    for name in names:
        expected = "--length_penalty -1.0 needs" if name == "length_penalty" else f"--{name} must"
        assert refuse(script, f"--{name}=-1").startswith(expected)


@every_script
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "[Errno 2] No such file or directory: 'my.yaml'"),
        (b"seed: [1\n", "while parsing a flow sequence"),
        (b"a:\tb: c\n", ""),
        (b"- seed: 1\n", "expected lines of 'setting: value', found list"),
        (b"seed\n", "expected lines of 'setting: value', found str"),
        (b"sede: 1\n", "unknown setting 'sede'; did you mean seed?"),
        (b"quite_another_thing: 1\n", "unknown setting 'quite_another_thing'"),
        (b"1: 2\n", "unknown setting"),
        (b"demo: true\n", "unknown setting 'demo'"),
        (b"seed: \xff\n", "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_bad_yaml(refuse, here, script, content, expected):
    if content is not None:
        (here / "my.yaml").write_bytes(content)
    assert refuse(script, "--config=my.yaml").startswith(f"--config my.yaml: {expected}")


@every_script
def test_yaml_of_aliases(refuse, here, script):
    """Fifty lines can stand for more text than there is memory."""
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 50)), "models: *a49"]
    (here / "my.yaml").write_text("\n".join(lines))
    assert (
        refuse(script, "--config=my.yaml")
        == "--config my.yaml: aliases (*name) are not supported: write the value out"
    )


@every_script
def test_yaml_that_is_a_folder(refuse, here, script):
    (here / "my.yaml").mkdir()
    assert refuse(script, "--config=my.yaml") == "--config my.yaml: [Errno 21] Is a directory: 'my.yaml'"


@every_script
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("seed: many\n", "argument --seed: invalid int value: 'many'"),
        ("seed: {a: 1}\n", "argument --seed: invalid int value: \"{'a': '1'}\""),
        ("max_source_length: 0\n", "--max_source_length must be positive, got 0"),
    ],
)
def test_bad_value_in_yaml(refuse, here, script, content, expected):
    (here / "my.yaml").write_text(content)
    assert refuse(script, "--config=my.yaml") == expected


@every_script
def test_list_in_yaml_for_a_single_value(refuse, here, script):
    (here / "my.yaml").write_text("seed: [1, 2]\n")
    assert "seed" in refuse(script, "--config=my.yaml")


@both_trainings
def test_fp16_in_yaml(refuse, here, script):
    (here / "my.yaml").write_text("mixed_precision: fp16\n")
    assert refuse(script, "--config=my.yaml") == f"--mixed_precision fp16: {FP16_REASON}"


@both_trainings
def test_what_the_launcher_must_not_set(refuse, monkeypatch, data_files, script):
    words = name_data(script, data_files["train"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert refuse(script, *words) == f"the launcher's mixed_precision is fp16: {FP16_REASON}"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert refuse(script, *words) == (
        "the launcher sets gradient_accumulation_steps to 4; remove it: it follows from --total_train_batch_size, "
        "--per_device_train_batch_size and the number of processes"
    )


@both_trainings
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_tracker_that_is_not_installed(refuse, monkeypatch, data_files, script, tracker):
    find_spec = importlib.util.find_spec  # where it is installed after all
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == tracker else find_spec(name))
    message = refuse(script, *name_data(script, data_files["train"]), f"--report_to={tracker}")
    assert message == f"--report_to {tracker}: the package is not installed; pip install {tracker}"


# Models


@every_script
def test_missing_model_folder(refuse, data_files, script):
    message = refuse(script, *name_data(script, data_files["train"]), *name_model(script, "./nowhere"))
    assert message.startswith(f"{model_setting(script)} ./nowhere: no such folder")


@pytest.mark.parametrize(
    ("model", "command"),
    [
        ("full=./flan-t5-base-dialogsum-checkpoint", "accelerate launch train_full.py --output_dir {path}"),
        ("lora=./flan-t5-base-dialogsum-lora", "accelerate launch train_lora.py --output_dir {path}"),
        ("mine=/nowhere/with_lora", "accelerate launch train_lora.py --output_dir {path}"),
    ],
)
def test_missing_model_folder_says_how_to_make_it(refuse, data_files, flan_t5, model, command):
    words = f"--models original={flan_t5} {model}".split()
    name, path = model.split("=")
    message = refuse("evaluate_rouge", *name_data("evaluate_rouge", data_files["test"]), *words)
    assert message == f"--models {name} {path}: no such folder; make it with: {command.format(path=path)}"


@every_script
def test_model_that_is_a_file(refuse, here, data_files, script):
    (here / "model").write_text("")
    message = refuse(script, *name_data(script, data_files["train"]), *name_model(script, "model"))
    assert message.startswith(f"{model_setting(script)} model: no such folder")


@every_script
@pytest.mark.parametrize("config_class", [GPT2Config, BertConfig])
def test_model_that_is_not_an_encoder_decoder(refuse, here, data_files, flan_t5, script, config_class):
    config_class().save_pretrained(here / "model")
    for path in flan_t5.glob("tokenizer*"):
        shutil.copy(path, here / "model")
    message = refuse(script, *name_data(script, data_files["train"]), *name_model(script, here / "model"))
    kind = config_class.model_type
    assert message == f"{model_setting(script)} {here / 'model'}: {kind} is not an encoder-decoder model"


def remove_weights(folder: Path):
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def widen_config(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 64}))


def deepen_config(folder: Path):
    """The weights then lack a layer, which transformers fills with random numbers and a warning."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))


def remove_tokenizer(folder: Path):
    """transformers 5 then invents a tokenizer without words, and says nothing."""
    for path in folder.glob("tokenizer*"):
        path.unlink()


def remove_everything(folder: Path):
    for path in folder.iterdir():
        path.unlink()


def write_file(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


BROKEN_MODELS = {
    "config.json is not JSON": write_file("config.json", "{"),
    "config.json is a list": write_file("config.json", "[]"),
    "config.json is empty": write_file("config.json", "{}"),
    "config.json of an unknown kind": write_file("config.json", '{"model_type": "t17"}'),
    "tokenizer.json is not JSON": write_file("tokenizer.json", "{"),
    "no weights": remove_weights,
    "weights cut short": cut_weights,
    "weights of another size": widen_config,
    "weights lack a layer": deepen_config,
    "no tokenizer": remove_tokenizer,
    "empty folder": remove_everything,
}


@every_script
@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_broken_model(refuse, here, data_files, flan_t5, script, case):
    shutil.copytree(flan_t5, here / "model")
    BROKEN_MODELS[case](here / "model")
    message = refuse(script, *name_data(script, data_files["train"]), *name_model(script, "./model"))
    assert re.match(rf"{model_setting(script)} \S*model: ", message)


def break_adapter(folder: Path, **changes: object):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def rename_weights(folder: Path):
    path = folder / "adapter_model.safetensors"
    save_file({name.replace("lora_A", "lora_C"): tensor for name, tensor in load_file(path).items()}, path)


BROKEN_ADAPTERS = {
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "adapter_config.json is not JSON": write_file("adapter_config.json", "{"),
    "no name of a base": lambda folder: break_adapter(folder, base_model_name_or_path=None),
    "weights of other names": rename_weights,
    "fewer layers than weights": lambda folder: break_adapter(folder, target_modules=["q"]),
    "base is gone": lambda folder: break_adapter(folder, base_model_name_or_path="/nowhere"),
    "base is on the hub": lambda folder: break_adapter(folder, base_model_name_or_path="google/flan-t5-base"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_full", "evaluate_rouge"])
@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_broken_adapter(refuse, here, data_files, finished, script, case):
    shutil.copytree(finished["train_lora"], here / "adapter")
    BROKEN_ADAPTERS[case](here / "adapter")
    message = refuse(script, *name_data(script, data_files["train"]), *name_model(script, "./adapter"))
    assert re.match(rf"{model_setting(script)} \S*adapter(: |, its base (/nowhere|google/flan-t5-base): )", message)


@every_script
def test_tokenizer_of_another_model(refuse, here, data_files, flan_t5, script):
    shutil.copytree(flan_t5, here / "model")
    tokenizer = AutoTokenizer.from_pretrained(flan_t5)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(here / "model")
    message = refuse(script, *name_data(script, data_files["train"]), *name_model(script, "./model"))
    num_tokens = len(tokenizer)
    assert message == f"the tokenizer has {num_tokens} tokens and the model only {num_tokens - 1}: not a pair"


def test_lora_on_a_lora_folder(refuse, here, data_files, finished):
    """The new adapter could not name its base, the merged model, which is in no folder."""
    shutil.copytree(finished["train_lora"], here / "adapter")
    message = refuse("train_lora", *quick_run("train_lora", Path("adapter"), data_files), "--output_dir=out")
    assert re.match(r"--model_name_or_path \S*adapter: ", message)


@every_script
def test_model_of_the_hub_while_offline(refuse, data_files, script):
    message = refuse(script, *name_data(script, data_files["train"]), *name_model(script, "google/flan-t5-base"))
    assert message == (
        f"{model_setting(script)} google/flan-t5-base: not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE=1"
        " forbids asking the hub; load it once where there is a network: python -c \"n='google/flan-t5-base'; "
        'import transformers as t; t.AutoTokenizer.from_pretrained(n); t.AutoModelForSeq2SeqLM.from_pretrained(n)"'
    )


@every_script
@pytest.mark.parametrize("words", [[], ["--dataset_name=my/dialogues"]])
def test_data_set_of_the_hub_while_offline(refuse, script, words):
    name = words[0].split("=")[1] if words else "knkarthick/dialogsum"
    message = refuse(script, *words)
    assert message == (
        f"--dataset_name {name}: not in the cache {Path(constants.HF_HOME) / 'datasets'}, and HF_HUB_OFFLINE=1 "
        f"forbids asking the hub; load it once where there is a network: python -c \"n='{name}'; "
        'from datasets import load_dataset; load_dataset(n)"'
    )


@pytest.mark.parametrize("modules", ["nope", "q vv", "SelfAttention", "layer", "shared"])
def test_lora_target_modules(refuse, data_files, flan_t5, modules):
    words = [*name_data("train_lora", data_files["train"]), *name_model("train_lora", flan_t5)]
    message = refuse("train_lora", *words, "--lora_target_modules", *modules.split())
    names = "k, lm_head, o, q, v, wi_0, wi_1, wo"
    target = modules.split()[-1]
    assert message == f"--lora_target_modules {modules}: t5 has no linear layers named {target!r}, but {names}"


@every_script
def test_max_source_length_below_the_prompt(refuse, data_files, flan_t5, script):
    words = [*name_data(script, data_files["train"]), *name_model(script, flan_t5)]
    shortest = len(AutoTokenizer.from_pretrained(flan_t5)(build_prompt("")).input_ids)
    message = refuse(script, *words, f"--max_source_length={shortest}")
    assert message.startswith(
        f"--max_source_length must be over {shortest}, the prompt without a dialogue; got {shortest}"
    )


# output_dir


@pytest.fixture(scope="module")
def finished(make_once, flan_t5, data_files) -> dict[str, Path]:
    """A folder with the results of each script."""

    def fill(folder: Path):
        for script in SCRIPTS:
            start(script, *quick_run(script, flan_t5, data_files), f"--output_dir={folder / script}")

    folder = make_once("finished", fill)
    return {script: folder / script for script in SCRIPTS}


def quick_run(script: str, model: Path, data_files: dict[str, Path]) -> list[str]:
    words = [*name_data(script, data_files["test"]), *name_model(script, model)]
    if script == "evaluate_rouge":
        return [*words, "--max_new_tokens=2", "--max_eval_samples=3"]
    return [*words, "--mixed_precision=no", "--max_train_samples=3"]


@every_script
@pytest.mark.parametrize("earlier", SCRIPTS)
def test_output_dir_with_a_finished_run(refuse, here, data_files, flan_t5, finished, script, earlier):
    shutil.copytree(finished[earlier], here / "out")
    message = refuse(script, *quick_run(script, flan_t5, data_files), "--output_dir=out")
    first = "predictions.jsonl" if earlier == "evaluate_rouge" else "metrics.jsonl"
    ways = "take another, or --overwrite_output_dir"
    if earlier != "evaluate_rouge" and script != "evaluate_rouge":
        ways = f"resume with --resume_from_checkpoint latest, {ways}"
    assert message == f"--output_dir out holds a run already ({first}): {ways}"


@every_script
def test_mistake_beside_overwrite_output_dir(refuse, here, finished, script):
    """The earlier run stays where the new one cannot start."""
    shutil.copytree(finished[script], here / "out")
    refuse(script, *name_data(script, "absent.csv"), "--output_dir=out", "--overwrite_output_dir")
    (here / "rows.csv").write_bytes(CSV_HEADER + b"a,Hi.,b\n")
    words = [*name_data(script, "rows.csv"), "--output_dir=out", "--overwrite_output_dir"]
    refuse(script, *words, *name_model(script, "google/flan-t5-base"))


@pytest.mark.parametrize(
    ("script", "earlier"), [("train_full", "train_lora"), ("train_lora", "train_full"), ("evaluate_rouge", None)]
)
def test_overwrite_output_dir(here, data_files, flan_t5, finished, script, earlier):
    shutil.copytree(finished[earlier or script], here / "out")
    (here / "out" / "notes.txt").write_text("mine")
    (here / "out" / "notes.safetensors").write_text("mine")
    (here / "out" / "tokenizer.json.bak").mkdir()
    (here / "out" / "drafts").mkdir()
    (here / "out" / "drafts" / "config.json").write_text("mine too")
    start(script, *quick_run(script, flan_t5, data_files), "--output_dir=out", "--overwrite_output_dir")
    left = snapshot(here / "out")
    assert left.pop("notes.txt") == left.pop("notes.safetensors") == b"mine"
    assert left.pop("drafts/config.json") == b"mine too"
    assert left.pop("drafts") is None and left.pop("tokenizer.json.bak") is None
    assert left.keys() == snapshot(finished[script]).keys()


def test_evaluation_does_not_clear_a_model_away(here, data_files, flan_t5, finished):
    shutil.copytree(finished["train_full"], here / "out")
    before = snapshot(here / "out")
    words = quick_run("evaluate_rouge", here / "out", data_files)
    start("evaluate_rouge", *words, "--output_dir=out", "--overwrite_output_dir")
    assert snapshot(here / "out").items() >= before.items()


@every_script
def test_output_dir_that_cannot_be_made(refuse, here, data_files, flan_t5, script):
    (here / "file").write_text("mine")
    (here / "file").chmod(0o755)  # as a folder that may be written to
    words = quick_run(script, flan_t5, data_files)
    for folder in ("file", "file/out", "file/out/deep"):
        expected = f"--output_dir {folder}: cannot write to {here / 'file'}"
        assert refuse(script, *words, f"--output_dir={folder}") == expected
    assert refuse(script, *words, "--output_dir=").startswith("--output_dir ")  # not the current folder
    long = "x" * 300
    assert refuse(script, *words, f"--output_dir={long}").startswith(f"--output_dir {long}: ")
    if os.getuid():  # root may write anywhere
        (here / "closed").mkdir(mode=0o500)
        expected = f"--output_dir closed/out: cannot write to {here / 'closed'}"
        assert refuse(script, *words, "--output_dir=closed/out") == expected


# predictions_file

TEST_ROWS = [
    {"id": "t_1", "dialogue": "Hi.", "summary": "A greeting."},
    {"id": "t_2", "dialogue": "Hi.", "summary": "They greet."},
    {"id": "u_1", "dialogue": "Bye.", "summary": "A farewell."},
]
GOOD_TEXTS = [{"id": "t_1", "prediction": "a"}, {"id": "u_1", "prediction": "b"}]
BAD_PREDICTIONS = {
    "unknown, missing and doubled ids": (
        [{"id": name, "prediction": "a"} for name in ("t_1", "v", "w", "t_1")],
        ", model 'texts': 1 missing: 'u_1'; 2 unknown: 'v' in row 2, 'w' in row 3; 1 doubled: 't_1' in row 4",
    ),
    "many unknown ids": (
        GOOD_TEXTS + [{"id": f"x{number}", "prediction": "a"} for number in range(9)],
        ", model 'texts': 9 unknown: 'x0' in row 3, 'x1' in row 4, 'x2' in row 5, 'x3' in row 6, 'x4' in row 7 "
        "and 4 more",
    ),
    "wrong ids of two models": (
        [{"id": name, "prediction": "a", "model": "x"} for name in ("t_1", "v")]
        + [{"id": "u_1", "prediction": "a", "model": "y"}],
        ", model 'x': 1 missing: 'u_1'; 1 unknown: 'v' in row 2. texts.jsonl, model 'y': 1 missing: 't_1'",
    ),
    "two texts for a dialogue": (
        [{"id": "t_1", "prediction": "a"}, {"id": "t_2", "prediction": "b"}, {"id": "u_1", "prediction": "c"}],
        ", model 'texts': 1 with another text than another row of the same dialogue: 't_2' in row 2",
    ),
    "no prediction": ([{"id": "t_1", "text": "a"}], ", row 1, column 'prediction': expected text"),
    "no id": ([{"prediction": "a"}], ", row 1, column 'id': expected text"),
    "prediction that is null": ([{"id": "t_1", "prediction": None}], ", row 1, column 'prediction': expected text"),
    "row that is a list": ([["t_1", "a"]], ", row 1, column 'id': expected text"),
    "half a surrogate pair": (
        [{"id": "t_1", "prediction": "\ud83d"}, {"id": "u_1", "prediction": "a"}],
        ", row 1, column 'prediction': half a surrogate pair",
    ),
    "truncated that is text": (
        [{"id": "t_1", "prediction": "a", "truncated": "no"}],
        ", row 1, column 'truncated': expected true or false, got 'no'",
    ),
    "no rows": ([], " holds no rows"),
}


@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_bad_predictions_file(refuse, here, case):
    rows, expected = BAD_PREDICTIONS[case]
    write_rows(here / "test.jsonl", TEST_ROWS)
    write_rows(here / "texts.jsonl", rows)
    words = ["--test_file=test.jsonl", "--predictions_file=texts.jsonl"]
    assert refuse("evaluate_rouge", *words).startswith("texts.jsonl" + expected)


def test_two_predictions_files_of_one_name(refuse, here):
    write_rows(here / "test.jsonl", TEST_ROWS)
    for name in ("one", "two"):
        write_rows(here / f"{name}.jsonl", [row | {"model": "m"} for row in GOOD_TEXTS])
    words = ["--test_file=test.jsonl", "--predictions_file", "one.jsonl", "two.jsonl"]
    message = refuse("evaluate_rouge", *words)
    assert message == "--predictions_file: one.jsonl and two.jsonl both hold model 'm'; name them NAME=FILE"
    assert refuse("evaluate_rouge", words[0], "--predictions_file==one.jsonl").startswith("--predictions_file takes")


def test_missing_predictions_file(refuse, here):
    write_rows(here / "test.jsonl", TEST_ROWS)
    message = refuse("evaluate_rouge", "--test_file=test.jsonl", "--predictions_file=texts.jsonl")
    assert message == "texts.jsonl: no such file"


# The same through processes, as users see it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("train_full", ["--learning_rate=nan"], "--learning_rate must be positive, got nan"),
        ("train_lora", ["{data}", "{model}", "--lora_target_modules=nope"], "--lora_target_modules nope: "),
        ("evaluate_rouge", [], "--dataset_name knkarthick/dialogsum: not in the cache "),
        (
            "evaluate_rouge",
            ["--test_file={rows}"],
            "--models full ./flan-t5-base-dialogsum-checkpoint: no such folder",
        ),
    ],
)
def test_process(tmp_path, data_files, flan_t5, script, words, expected):
    places = {"data": f"--train_file={data_files['train']}", "model": f"--model_name_or_path={flan_t5}"}
    words = [word.format(**places, rows=data_files["test"]) for word in words]
    warm = [] if script == "train_full" else [REPOSITORY / "tests" / "warm.py"]
    process = subprocess.run(
        [sys.executable, *warm, REPOSITORY / f"{script}.py", *words],
        env=os.environ | {"WARM_SOCKET": start_warm_server()}, cwd=tmp_path, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(f"{script}.py: error: {expected}")
    assert process.stderr.endswith("\n") and process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# What is no mistake


def load(path: Path, **settings: str) -> list[dict[str, str]]:
    return load_rows(TrainingConfig(train_file=str(path), **settings), "train")


def write_csv(path: Path, rows: list[dict], line_end: str = "\n") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator=line_end)
        writer.writeheader()
        writer.writerows(rows)
    return path


ODD_ROWS = [
    {"id": "a", "dialogue": "NA", "summary": "None"},
    {"id": "b", "dialogue": "null", "summary": "nan"},
    {"id": "c", "dialogue": "1", "summary": "1.50"},
    {"id": "d", "dialogue": "#Person1#: 你好, «ça va»?\n#Person2#: \U0001f600.", "summary": 'He said "hi", she left.'},
    {"id": "e", "dialogue": "one\u2028two\x85three\x0cfour\x1cfive", "summary": "a\u2029b"},
]


@pytest.mark.parametrize("kind", ["csv", "csv of Windows", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    if kind.startswith("csv"):
        path = write_csv(tmp_path / "rows.csv", ODD_ROWS, "\r\n" if kind.endswith("Windows") else "\n")
    elif kind == "parquet":
        path = tmp_path / "rows.parquet"
        path.write_bytes(parquet(*ODD_ROWS))
    elif kind == "jsonl":
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ODD_ROWS), encoding="utf-8")
    else:
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(ODD_ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    assert load(path) == ODD_ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "id,dialogue,summary\na,Hi.,A greeting.\n"),
        ("rows.csv", "\ufeffid,dialogue,summary\na,Hi.,A greeting.\n"),
        ("rows.csv", "id,dialogue,summary\r\na,Hi.,A greeting.\r\n"),
        ("rows.csv", 'id,dialogue,summary\na,"Hi.\n","\nA greeting."\n\n'),
        ("rows.csv", "summary,more,id,dialogue\nA greeting.,,a,Hi."),
        ("rows.csv", '"id","dialogue","summary"\n"a","Hi.","A greeting."'),
        ("rows.jsonl", '{"id": "a", "dialogue": " Hi. ", "summary": "A greeting.\\n"}'),
        ("rows.jsonl", '\ufeff{"id": "a", "dialogue": "Hi.", "summary": "A greeting."}\r\n\r\n'),
        ("rows.json", '{"id": "a", "dialogue": "Hi.", "summary": "A greeting."}\n'),
        ("rows.json", '\n [\n{"id": "a", "dialogue": "Hi.", "summary": "A greeting.", "more": null}\n]\n'),
    ],
)
def test_one_row_written_in_many_ways(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert load(tmp_path / name) == [{"id": "a", "dialogue": "Hi.", "summary": "A greeting."}]


def test_lines_within_a_cell(tmp_path):
    """Windows' line ends within a text become Unix', whatever holds it."""
    (tmp_path / "rows.csv").write_bytes(b'id,dialogue,summary\r\na,"#Person1#: Hi.\r\n#Person2#: ""Oh""!",b\r\n')
    (tmp_path / "rows.jsonl").write_bytes(
        lines({"id": "a", "dialogue": '#Person1#: Hi.\r\n#Person2#: "Oh"!', "summary": "b"})
    )
    expected = [{"id": "a", "dialogue": '#Person1#: Hi.\n#Person2#: "Oh"!', "summary": "b"}]
    assert load(tmp_path / "rows.csv") == load(tmp_path / "rows.jsonl") == expected


def test_ids(tmp_path):
    """Numbers are taken as text; rows without an id are named by split and number, counted from 0 as on the hub."""
    rows = [{"id": number, "dialogue": f"Hi {number}.", "summary": "b"} for number in (7, 0, -3)]
    assert [row["id"] for row in load(write_rows(tmp_path / "rows.jsonl", rows))] == ["7", "0", "-3"]
    (tmp_path / "rows.parquet").write_bytes(parquet(*rows))
    assert [row["id"] for row in load(tmp_path / "rows.parquet")] == ["7", "0", "-3"]
    for row in rows:
        del row["id"]
    assert [row["id"] for row in load(write_rows(tmp_path / "rows.jsonl", rows))] == ["train_0", "train_1", "train_2"]


def test_columns_of_other_names(tmp_path):
    path = write_csv(tmp_path / "rows.csv", [{"Text": "Hi.", "highlights": "A greeting.", "summary": "not this"}])
    rows = load(path, dialogue_column="Text", summary_column=["highlights"])
    assert rows == [{"id": "train_0", "dialogue": "Hi.", "summary": "A greeting."}]


def test_bad_rows_beyond_max_train_samples(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {"id": "b"}])
    config = TrainingConfig(train_file=str(path), max_train_samples=1)
    assert load_rows(config, "train", config.max_train_samples) == [GOOD]


def test_one_row_is_enough_to_train_on(here, flan_t5):
    write_rows(here / "rows.jsonl", [GOOD])
    start("train_full", "--train_file=rows.jsonl", f"--model_name_or_path={flan_t5}", "--output_dir=out")
    manifest = json.loads((here / "out" / "run_manifest.json").read_text())
    assert (manifest["num_train_examples"], manifest["num_train_steps"]) == (1, 1)


def test_full_training_of_a_lora_folder(here, data_files, finished):
    """It starts from the base with the adapter merged, and trains all of it."""
    words = quick_run("train_full", finished["train_lora"], data_files)
    start("train_full", *words, "--output_dir=out", f"--validation_file={data_files['validation']}")
    manifest = json.loads((here / "out" / "run_manifest.json").read_text())
    full = json.loads((finished["train_full"] / "run_manifest.json").read_text())
    assert manifest["num_trainable_parameters"] == manifest["num_parameters"] == full["num_parameters"]
    start("train_full", *quick_run("train_full", here / "out", data_files), "--output_dir=again")


def test_tokenizer_without_a_file(here, data_files):
    """ByT5's tokens are bytes; its tokenizer is written in Python."""
    config = T5Config(vocab_size=384, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(here / "model")
    ByT5Tokenizer().save_pretrained(here / "model")
    start("train_full", *quick_run("train_full", here / "model", data_files), "--output_dir=out")
    assert read_jsonl(here / "out" / "metrics.jsonl")[0]["num_examples"] == 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line_wins_over_yaml(here, script):
    config_class = SCRIPTS[script][1]
    (here / "my.yaml").write_text("seed: 7\nmax_source_length: 99\noutput_dir: my out\nmax_eval_samples: null\n")
    for words in (["--config", "my.yaml", "--seed", "8"], ["--seed=8", "--config=my.yaml"]):
        config = parse_config(config_class, f"{script}.yaml", words)
        assert config == config_class(seed=8, max_source_length=99, output_dir="my out")


def test_values_in_yaml(here):
    """YAML reads 1e-3 as text and no as False."""
    (here / "my.yaml").write_text("learning_rate: 1e-3\nmixed_precision: no\ngradient_checkpointing: true\n")
    config = parse_config(TrainingConfig, "train_full.yaml", ["--config=my.yaml"])
    assert config == TrainingConfig(learning_rate=1e-3, mixed_precision="no", gradient_checkpointing=True)


def test_lists_in_yaml(here):
    (here / "my.yaml").write_text("lora_target_modules: [q, k]\n")
    assert parse_config(LoraTrainingConfig, "train_lora.yaml", ["--config=my.yaml"]).lora_target_modules == ["q", "k"]
    (here / "my.yaml").write_text("models:\n- a=x\n- b=y=z\n")
    for words, expected in (([], ["a=x", "b=y=z"]), (["--models", "c=x"], ["c=x"])):
        config = parse_config(EvaluationConfig, "evaluate_rouge.yaml", ["--config=my.yaml", *words])
        assert config.models == expected


def test_a_users_own_folder_named_demo(here):
    """Only what the demo's own settings name lies beside the scripts."""
    (here / "my.yaml").write_text("train_file: demo/train.jsonl\n")
    config = parse_config(TrainingConfig, "train_full.yaml", ["--demo", "--config=my.yaml"])
    assert config.train_file == "demo/train.jsonl"
    assert config.validation_file == str(REPOSITORY / "demo" / "validation.jsonl")


def test_empty_yaml(here):
    (here / "my.yaml").write_text("# nothing yet\n")
    assert parse_config(TrainingConfig, "train_full.yaml", ["--config=my.yaml"]) == TrainingConfig()


def test_settings_are_checked_without_a_command_line():
    with pytest.raises(UserError, match="^--num_train_epochs must be positive, got 0$"):
        TrainingConfig(num_train_epochs=0)
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize("id_type", [str, int])
def test_predictions_by_another_system(here, id_type):
    rows = [row | {"id": id_type(number)} for number, row in enumerate(TEST_ROWS)]
    write_rows(here / "test.jsonl", rows)
    write_rows(here / "texts.jsonl", [{"id": id_type(2), "prediction": ""}, {"id": id_type(1), "prediction": "Hi 你"}])
    nothing = {"numbers": [], "names": [], "other_script": False}
    start("evaluate_rouge", "--test_file=test.jsonl", "--predictions_file=texts.jsonl", "--output_dir=out")
    assert read_jsonl(here / "out" / "predictions.jsonl") == [
        {
            "id": "0", "model": "texts", "prediction": "Hi 你", "references": ["A greeting.", "They greet."],
            "dialogue": "Hi.", "scores": dict.fromkeys(METRICS, [0, 0]), "unsupported": nothing,
        },
        {
            "id": "2", "model": "texts", "prediction": "", "references": ["A farewell."],
            "dialogue": "Bye.", "scores": dict.fromkeys(METRICS, [0]), "unsupported": nothing,
        },
    ]  # fmt: skip


def test_two_systems_are_compared(here):
    """Named by the command line, in one flag or in several; rows that are not scored are passed over."""
    write_rows(here / "test.jsonl", TEST_ROWS)
    write_rows(here / "a=1.jsonl", [{"id": "t_1", "prediction": "A greeting.", "truncated": True}] + GOOD_TEXTS[1:])
    several = [{"id": "t_2", "prediction": text, "model": text} for text in ("they", "greet")]
    write_rows(here / "b.jsonl", several)
    words = ["--test_file=test.jsonl", "--max_eval_samples=2", "--predictions_file"]
    start("evaluate_rouge", *words, "a=1.jsonl", "--predictions_file", "b=b.jsonl", "--output_dir=out")
    results = json.loads((here / "out" / "results.json").read_text())
    assert list(results["comparisons"]) == ["a=1_vs_b/they", "a=1_vs_b/greet", "b/they_vs_b/greet"]
    assert results["comparisons"]["b/they_vs_b/greet"]["max"]["rouge1"] == {
        "difference": 0, "low": 0, "high": 0, "p_value": 1, "p_value_holm": 1
    }  # fmt: skip
    assert results["models"]["a=1"]["diagnostics"]["share_truncated"] == 1
    assert results["models"]["b/they"]["diagnostics"]["share_truncated"] is None
    assert [line.get("truncated") for line in read_jsonl(here / "out" / "predictions.jsonl")] == [True, None, None]
    assert results["conclusions"][0].startswith("Only 1 dialogue scored: too few")


def test_predictions_files_of_the_command_line_replace_those_of_yaml(here):
    (here / "my.yaml").write_text("predictions_file: [c, d]\n")
    for words, expected in ((["--predictions_file=a", "--predictions_file", "b"], ["a", "b"]), ([], ["c", "d"])):
        config = parse_config(EvaluationConfig, "evaluate_rouge.yaml", ["--config=my.yaml", *words])
        assert config.predictions_file == expected


@pytest.mark.parametrize(
    ("name", "value"), [("ACCELERATE_MIXED_PRECISION", "fp16"), ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")]
)
def test_evaluation_does_not_mind_the_launchers_settings(here, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    write_rows(here / "test.jsonl", TEST_ROWS[:1])
    write_rows(here / "texts.jsonl", [{"id": "t_1", "prediction": "A greeting."}])
    start("evaluate_rouge", "--test_file=test.jsonl", "--predictions_file=texts.jsonl", "--output_dir=out")
    results = json.loads((here / "out" / "results.json").read_text())
    assert results["models"]["texts"]["scores"]["average"]["rouge1"]["value"] == 1.0


def test_code_of_a_model_is_never_run(refuse, here, flan_t5, monkeypatch):
    """Not even if who is asked says yes."""
    shutil.copytree(flan_t5, here / "model")
    (here / "model" / "theirs.py").write_text(f"open({str(here / 'ran')!r}, 'w')")
    for file, changes in (
        ("config.json", {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.T", None]}}),
    ):
        path = here / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    write_rows(here / "test.jsonl", [{"id": "a", "dialogue": "Hi.", "summary": "Hi."}])
    message = refuse("evaluate_rouge", "--models", "m=./model", "--test_file=test.jsonl", "--output_dir=out")
    assert "model: this model needs Python code of its own, and these scripts never run a model's code" in message
    assert not (here / "ran").exists()


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_files_that_memory_does_not_hold(refuse, here, monkeypatch, kind):
    """A parquet of kilobytes may unpack to gigabytes; here to 600 MB, of which 20 are read."""
    monkeypatch.setattr("utils.data.rows.MOST_BYTES", 20_000_000)
    path = here / f"rows.{kind}"
    if kind == "parquet":
        long = pyarrow.array(["x" * 10_000] * 30_000)
        pyarrow.parquet.write_table(pyarrow.table({"dialogue": long, "summary": long}), path)
        assert path.stat().st_size < 100_000
    else:
        path.write_bytes(bytes(20_000_001))
    message = refuse("train_full", f"--train_file={path.name}", "--output_dir=out")
    assert message.startswith(f"{path.name}: ") and "20,000,000" in message and message.endswith(": split it")


# --- what could be lost, or mistaken for another -------------------------------------------------------------------


def test_merge_into_cannot_hold_the_run_or_its_base(tmp_path):
    base = tmp_path / "there" / "last_good_model"
    base.mkdir(parents=True)
    for output_dir, model in ((tmp_path / "runs" / "checkpoints", "some/model"), (tmp_path / "out", base)):
        merge_into = output_dir.parent if model == "some/model" else base.parent
        config = LoraTrainingConfig(
            output_dir=str(output_dir), model_name_or_path=str(model), merge_into=str(merge_into)
        )
        with pytest.raises(UserError, match="--merge_into .* is or holds the --"):
            check_output_dir(config)
    with pytest.raises(UserError, match="--merge_into x+: File name too long"):
        check_output_dir(LoraTrainingConfig(merge_into="x" * 300))


def test_the_base_cannot_lie_in_what_is_replaced(tmp_path):
    base = tmp_path / "last_good_model"
    base.mkdir()
    config = TrainingConfig(output_dir=str(tmp_path), model_name_or_path=str(base), overwrite_output_dir=True)
    with pytest.raises(UserError, match="lies in what --output_dir .* replaces"):
        check_output_dir(config)


@pytest.mark.parametrize("setting", ["train_file", "validation_file", "test_file", "predictions_file"])
def test_what_is_read_cannot_lie_in_what_is_replaced(tmp_path, setting):
    path = tmp_path / "predictions.jsonl"
    path.touch()
    config_class, value = TrainingConfig, str(path)
    if setting == "predictions_file":
        config_class, value = EvaluationConfig, [f"theirs={path}"]
    with pytest.raises(UserError, match=f"--{setting} .* lies in what --output_dir .* replaces"):
        check_output_dir(config_class(output_dir=str(tmp_path), overwrite_output_dir=True, **{setting: value}))


@pytest.mark.parametrize(
    "theirs", ["results.json", "report.md", "tokenizer.json", "model.safetensors", "vocab.json", "tracker/events",
               "checkpoints/epoch1.pt", "checkpoints/step_000006_backup", "checkpoints/best_step_000006"],
)  # fmt: skip
def test_nothing_is_cleared_by_a_resume_that_finds_nothing(tmp_path, theirs):
    (tmp_path / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / theirs).touch()
    with pytest.raises(UserError, match="holds a run already"):
        check_output_dir(TrainingConfig(output_dir=str(tmp_path), resume_from_checkpoint="latest"))


@pytest.mark.parametrize("name", ["STOP", "metrics.jsonl", "results.json"])
def test_folders_where_files_should_be(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} in it is a folder: remove it, or take another"):
        check_output_dir(TrainingConfig(output_dir=str(tmp_path), overwrite_output_dir=True))


def test_where_no_folder_can_be_made():
    with (
        pytest.raises(UserError, match="--output_dir /proc/nope: cannot be written: No such file or directory"),
        lock_folder(Path("/proc/nope"), "output_dir"),
    ):
        pass


def test_nothing_is_removed_where_one_thing_cannot_be(tmp_path, small_disk):
    """A file system that is mounted in the folder."""
    mounted = small_disk(64)
    (tmp_path / "model.safetensors").write_bytes(b"theirs")
    with pytest.raises(UserError, match="disk cannot be replaced: Device or resource busy"):
        set_aside([tmp_path / "model.safetensors", mounted], tmp_path / "aside")
    assert (tmp_path / "model.safetensors").read_bytes() == b"theirs" and not (tmp_path / "aside").exists()
    set_aside([tmp_path / "model.safetensors"], tmp_path / "aside")
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_links_are_not_replaced(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match="checkpoints in it is a link: remove it, or take another folder"):
        check_output_dir(TrainingConfig(output_dir=str(tmp_path / "out"), overwrite_output_dir=True))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="gone: a dangling link"):
        check_output_dir(TrainingConfig(output_dir=str(tmp_path / "gone")))


def test_texts_that_rouge_does_not_see(here, capsys):
    write_rows(here / "test.jsonl", [{"id": "a", "dialogue": "Hi.", "summary": "Привет."}])
    write_rows(here / "texts.jsonl", [{"id": "a", "prediction": "Привет."}])
    start("evaluate_rouge", "--test_file=test.jsonl", "--predictions_file=texts.jsonl", "--output_dir=out")
    assert (
        "ROUGE's default tokenizer drops 100.0% of the letters and digits of the references" in capsys.readouterr().out
    )


def test_texts_of_another_dialogue(refuse, here):
    """Without ids, rows are named by their place, which may have changed."""
    write_rows(here / "test.jsonl", [{"dialogue": text, "summary": text} for text in ("Hi.", "Bye.")])
    rows = [{"id": f"test_{i}", "dialogue": text, "prediction": "Hi."} for i, text in enumerate(("Bye.", "Hi."))]
    write_rows(here / "texts.jsonl", rows)
    message = refuse("evaluate_rouge", "--test_file=test.jsonl", "--predictions_file=texts.jsonl", "--output_dir=out")
    assert "2 of another dialogue than the data's: 'test_0' in row 1, 'test_1' in row 2" in message


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["evaluate_rouge.py"])
    assert utils.launch.script.run(main, EvaluationConfig, "evaluate_rouge.yaml") == 130
    assert capsys.readouterr().err.splitlines() == ["evaluate_rouge.py: error: interrupted"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [">&-", "| true"])
def test_a_closed_output(finished, tmp_path, ending):
    """The report is written all the same; a letter that the terminal does not have is no reason to fail."""
    folder = tmp_path / "ü"
    shutil.copytree(finished["evaluate_rouge"], folder)
    (folder / "report.html").unlink()
    command = f"set -o pipefail; {sys.executable} evaluate_rouge.py --report_only --output_dir {folder} {ending}"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(
        ["bash", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert (folder / "report.html").is_file()


def test_names_that_would_be_taken_for_others(tmp_path):
    for words, text in (
        (["--models", "a_vs_b=x"], "'a_vs_b' contains '_vs_', which separates"),
        (["--demo", "--models", "random=x"], "'random' is the name of"),
        (["--models", "human summary=x"], "'human summary' cannot be a model's name"),
        (["--models", "a  b=x"], "'a  b' cannot be a model's name"),
        (["--models", "a=x\udcff"], "holds what is no character"),
        (["--output_dir", "a\0b"], "holds what is no character"),
        (["--num_beams", "2", "--length_penalty", "1e308"], "--length_penalty must be between"),
        (["--max_new_tokens", "1000000000"], "--max_new_tokens must be at most"),
    ):
        with pytest.raises(UserError, match=text):
            parse_config(EvaluationConfig, "evaluate_rouge.yaml", words)


def test_sixty_four_texts_are_scored_under_a_training_s_signal_handlers():
    """A pool of processes would inherit them, and never end."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        for number in handlers:
            signal.signal(number, lambda *_: None)
        texts = [f"text {index} of many" for index in range(64)]
        for _ in range(20):
            assert score_texts(texts, [[text] for text in texts], use_stemmer=False)["rouge1"] == [[1.0]] * 64
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
