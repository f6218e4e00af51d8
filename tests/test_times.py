"""A run's times are those of its parts, each second charged to one; its memory is its own."""

import re
import time

import pytest
from conftest import read_jsonl, run_script

from utils.launch import times


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves on."""
    monkeypatch.setattr(times, "seconds", times.Counter())
    monkeypatch.setattr(times, "charged_until", 0.0)
    now = [0.0]
    monkeypatch.setattr(times.time, "perf_counter", lambda: now[0])

    def wait(seconds: float):
        now[0] += seconds

    return wait


def test_a_part_within_a_part_is_not_counted_twice(clock):
    clock(1)
    with times.timed("validation"):
        clock(2)
        with times.timed("checkpoints"):
            clock(4)
        clock(8)

    @times.timed("validation")
    def fail():
        clock(16)
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            fail()
    clock(32)
    assert times.describe_times() == "took 79.0 s: validation 42.0, checkpoints 4.0, the rest 33.0"


def test_imports_count_from_the_start_of_the_process(clock, monkeypatch):
    clock(5)
    monkeypatch.setattr(times.time, "time", lambda: times.psutil.Process().create_time() + 3)
    times.charge_imports()
    clock(1)
    assert times.describe_times() == "took 4.0 s: imports 3.0, the rest 1.0"


@pytest.mark.slow
def test_a_training_tells_its_own_time_and_memory(data_files, flan_t5, tmp_path):
    """In a process of its own. getrusage would count what its parent held when it started it."""
    held = bytearray(2 * 2**30)
    started = time.time()
    run = run_script(
        "train_lora.py", "--model_name_or_path", flan_t5, "--train_file", data_files["train"], "--validation_file",
        data_files["validation"], "--max_train_steps", 3, "--eval_steps", 1, "--output_dir", tmp_path / "out",
        "--merge_into", tmp_path / "merged", cold=True,
    )  # fmt: skip
    elapsed = time.time() - started
    del held
    assert run.returncode == 0, run.stderr
    total, parts = re.fullmatch(r"took (\d+\.\d) s: (.*)", run.stderr.splitlines()[-1]).groups()
    parts = {part.rpartition(" ")[0]: float(part.rpartition(" ")[2]) for part in parts.split(", ")}
    assert parts.keys() == {
        "imports", "data", "the model", "validation", "the first update", "updates", "checkpoints", "export", "merge",
        "the rest",
    }  # fmt: skip
    assert sum(parts.values()) == pytest.approx(float(total), abs=0.05 * (len(parts) + 1))  # rounded to a tenth
    assert float(total) <= elapsed + 0.1
    assert all(parts[name] > 0 for name in ("imports", "the first update", "updates", "export"))
    lines = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    peaks = [line["peak_memory_mib"] for line in lines if line["split"] == "train"]
    assert all(100 < peak < 1500 for peak in peaks) and peaks
