"""Who writes to a folder keeps others out, and checks what is there when nobody else can change it any more."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import run_script

import evaluate_rouge
import train_full
import train_lora
from utils.config import EvaluationConfig, LoraTrainingConfig, TrainingConfig, UserError
from utils.launch.locks import LOCK, lock_folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)


@pytest.fixture
def settings(flan_t5, data_files, tmp_path) -> dict:
    return {
        "model_name_or_path": str(flan_t5), "train_file": str(data_files["train"]), "max_train_steps": 1,
        "mixed_precision": "no", "output_dir": str(tmp_path / "out"),
    }  # fmt: skip


def to_words(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def act_before(monkeypatch, module, name: str, action):
    """Call `action`, once, before a function of a script."""
    original = getattr(module, name)

    def act(*arguments, **keywords):
        monkeypatch.setattr(module, name, original)
        action()
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, name, act)


def test_a_folder_is_locked_until_the_end(tmp_path):
    folder = tmp_path / "out"
    with lock_folder(folder, "output_dir"):
        assert (folder / LOCK).exists()
        with (
            pytest.raises(UserError, match="another run writes to it; wait for its end"),
            lock_folder(folder, "output_dir"),
        ):
            pass
        assert (folder / LOCK).exists(), "the second leaves the first one's alone"
    assert not folder.exists(), "nothing was written"
    with lock_folder(folder, "output_dir"):
        (folder / "results.json").touch()
    assert [path.name for path in folder.iterdir()] == ["results.json"]
    with lock_folder(folder, "output_dir"):
        pass
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_a_lock_that_was_opened_and_then_removed_is_none(tmp_path, monkeypatch):
    """Else this run and the next, which would make a file of its own, were both let in."""
    flock = fcntl.flock

    def remove_and_lock(descriptor, operation):
        if operation & fcntl.LOCK_EX:
            (tmp_path / LOCK).unlink(missing_ok=True)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with pytest.raises(UserError, match="another run writes to it"), lock_folder(tmp_path, "output_dir"):
        pass


def refuse_locks(monkeypatch, number: int):
    def fail(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    refuse_locks(monkeypatch, errno.ENOLCK)
    with lock_folder(tmp_path, "output_dir"):
        text = f"{tmp_path} cannot be locked (No locks available): start no second run that writes to it"
        assert caplog.messages == [text]


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_flock_has_a_lock_all_the_same(tmp_path, monkeypatch):
    refuse_locks(monkeypatch, errno.ENOSYS)
    for _ in range(2):
        with (
            lock_folder(tmp_path, "output_dir"),
            pytest.raises(UserError, match="another run writes to it"),
            lock_folder(tmp_path, "output_dir"),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_ended_while_this_one_was_loading(settings, tmp_path, monkeypatch):
    """What it has left is not taken for the emptiness that was seen before."""

    def train_another():
        run = run_script("train_full.py", *to_words(settings | {"seed": 7}))
        assert run.returncode == 0, run.stderr

    act_before(monkeypatch, train_full, "load_model", train_another)
    with pytest.raises(UserError, match=r"holds a run already \(metrics.jsonl\)"):
        train_full.main(TrainingConfig(**settings))
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_merges_into_one_folder(settings, tmp_path, monkeypatch):
    settings |= {"merge_into": str(tmp_path / "merged")}

    def merge_another():
        other = settings | {"output_dir": tmp_path / "other"}
        for more in ({}, {"overwrite_output_dir": True}):
            run = run_script("train_lora.py", *to_words(other | more))
            assert run.returncode == 2
            assert f"--merge_into {tmp_path / 'merged'}: another run writes to it" in run.stderr
        assert not (tmp_path / "other").exists()

    act_before(monkeypatch, train_lora, "merge_adapter", merge_another)
    train_lora.main(LoraTrainingConfig(**settings))
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_evaluations_in_one_folder(flan_t5, data_files, tmp_path, monkeypatch):
    settings = {"test_file": str(data_files["test"]), "output_dir": str(tmp_path / "out"), "max_new_tokens": 4}

    def evaluate_another():
        for more in ([], ["--overwrite_output_dir=true"], ["--report_only=true"]):
            run = run_script("evaluate_rouge.py", "--models", f"other={flan_t5}", *to_words(settings), *more)
            assert run.returncode == 2
            assert f"--output_dir {tmp_path / 'out'}: another run writes to it" in run.stderr

    act_before(monkeypatch, evaluate_rouge, "write_results", evaluate_another)
    evaluate_rouge.main(EvaluationConfig(models=[f"first={flan_t5}"], **settings))
    names = {path.name for path in Path(tmp_path / "out").iterdir()}
    assert names == {"predictions.jsonl", "results.json", "report.md", "report.html"}
