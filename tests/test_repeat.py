"""A command that has finished, repeated: it says so, changes nothing and ends with 0. Another run's results stay."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_rows, run_script, write_rows

pytestmark = pytest.mark.slow


def read_files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """When each file was written, and its content."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def change(path: Path):
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def model(tmp_path, flan_t5):
    return shutil.copytree(flan_t5, tmp_path / "model")


def test_a_training_and_its_merge(model, tmp_path):
    rows, out, merged = write_rows(tmp_path / "rows.jsonl", make_rows(20)), tmp_path / "out", tmp_path / "merged"

    def train(*words, num_processes=1):
        return run_script(
            "train_lora.py", "--model_name_or_path", model, "--train_file", rows, "--max_train_steps", 2,
            "--checkpointing_steps", 1, "--mixed_precision", "no", "--output_dir", out, "--merge_into", merged, *words,
            num_processes=num_processes,
        )  # fmt: skip

    first = train()
    assert first.returncode == 0, first.stderr
    files = read_files(tmp_path)
    for words, num_processes in (((), 1), (("--resume_from_checkpoint", "latest"), 1), ((), 2)):
        again = train(*words, num_processes=num_processes)
        assert again.returncode == 0, again.stderr
        assert f"the run in {out} has finished already; --overwrite_output_dir starts it over" in again.stderr
        assert read_files(tmp_path) == files
    preflight = train("--preflight")
    assert preflight.stdout.count("this run has finished already: the same command changes nothing\n") == 2

    for path, problem in (
        (rows, "data_fingerprint was"),
        (model / "model.safetensors", "model_fingerprint was"),
        (
            merged / "model.safetensors",
            "its model is not what was written; --resume_from_checkpoint latest exports it",
        ),
    ):
        content = path.read_bytes()
        write_rows(rows, make_rows(20, seed=3)) if path == rows else change(path)
        refused = train()
        assert refused.returncode == 2
        assert f"--output_dir {out} holds a finished run of the same settings: {problem}" in refused.stderr
        if path.parent == merged:
            resumed = train("--resume_from_checkpoint", "latest")
            assert resumed.returncode == 0, resumed.stderr
        else:
            path.write_bytes(content)
    assert {path: content for path, (_, content) in read_files(merged).items()} == {
        path: content for path, (_, content) in files.items() if path.parent == merged
    }
    more = train("--max_train_steps", 3)
    assert (more.returncode, "holds a run already" in more.stderr) == (2, True)


@pytest.mark.parametrize("kind", ["models", "predictions_file"])
def test_an_evaluation(model, tmp_path, kind):
    rows, out = write_rows(tmp_path / "rows.jsonl", make_rows(4)), tmp_path / "out"
    texts = write_rows(tmp_path / "texts.jsonl", [{"id": row["id"], "prediction": "Yes."} for row in make_rows(4)])
    source = {"models": f"model={model}", "predictions_file": texts}[kind]

    def evaluate(*words):
        return run_script(
            "evaluate_rouge.py", f"--{kind}", source, "--test_file", rows, "--max_new_tokens", 4, "--output_dir", out,
            *words,
        )  # fmt: skip

    first = evaluate()
    assert first.returncode == 0, first.stderr
    assert "Row 3 of the test split, its last: there is no --example_index 42\n" in first.stdout
    contents = {path: content for path, (_, content) in read_files(out).items()}
    (out / "report.md").unlink()
    again = evaluate()
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert f"{out} holds this evaluation, finished; --overwrite_output_dir would redo it" in again.stderr
    assert {path: content for path, (_, content) in read_files(out).items()} == contents

    changes = {
        rows: "the data has changed",
        texts if kind == "predictions_file" else model / "model.safetensors": "the models or texts have changed",
        out / "predictions.jsonl": "predictions.jsonl is not what was written",
        out / "results.json": "its scores are from an earlier version",
    }
    for path, problem in changes.items():
        content = path.read_bytes()
        if path == rows:
            write_rows(rows, make_rows(4, seed=3))
        elif path == texts:
            path.write_bytes(content.replace(b"Yes", b"Yet"))
        elif path.name == "results.json":
            path.write_bytes(content.replace(b"predictions_sha256", b"sha256"))
        else:
            change(path)
        refused = evaluate()
        assert refused.returncode == 2
        assert f"--output_dir {out} holds a finished evaluation of the same settings: {problem}" in refused.stderr
        path.write_bytes(content)
    assert json.loads((out / "results.json").read_bytes())["settings"]["output_dir"] == str(out)
