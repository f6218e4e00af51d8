"""The size that fits is found, and a step that does not fit is taken again with the same gradient.

The CPU stands for a GPU here: `auto` is let through, and the forward pass refuses more than so many tokens
with PyTorch's own error, which a CPU never raises."""

import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    make_rows,
    read_jsonl,
    relative_difference,
    run_command,
    run_script,
    write_flan_t5,
    write_rows,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5ForConditionalGeneration

import train_full
from utils.config import TrainingConfig, UserError
from utils.data.micro_batches import LAUNCH_COSTS
from utils.prompting import build_prompt


@pytest.fixture
def set_memory(monkeypatch):
    """A function that sets how many source tokens, padding included, fit into a forward pass from call `first` on."""
    monkeypatch.setattr("utils.modeling.strategies.check_auto", lambda accelerator, config: None)
    monkeypatch.setitem(LAUNCH_COSTS, "cpu", LAUNCH_COSTS["cuda"])
    forward = T5ForConditionalGeneration.forward

    def limit(num_tokens: int, first: int = 0, last: float = float("inf")):
        calls = 0

        def limited(model, input_ids=None, **inputs):
            nonlocal calls
            calls += 1
            if model.training and first <= calls <= last and input_ids.numel() > num_tokens:
                raise torch.OutOfMemoryError(f"{input_ids.numel()} tokens")
            return forward(model, input_ids=input_ids, **inputs)

        monkeypatch.setattr(T5ForConditionalGeneration, "forward", limited)

    return limit


def train(model, data_files, output_dir, size):
    AcceleratorState._reset_state(True)
    config = TrainingConfig(
        model_name_or_path=str(model), train_file=str(data_files["train"]), output_dir=str(output_dir),
        total_train_batch_size=20, per_device_train_batch_size=size, mixed_precision="no", logging_steps=1,
        learning_rate=1e-4,
    )  # fmt: skip
    train_full.main(config)
    return [(line["loss"], line["grad_norm"]) for line in read_jsonl(output_dir / "metrics.jsonl")]


def longest_source(flan_t5) -> int:
    tokenizer = AutoTokenizer.from_pretrained(flan_t5)
    return max(len(tokenizer(build_prompt(row["dialogue"])).input_ids) for row in make_rows(40))


@pytest.mark.parametrize("fitting", [1, 3, 7, 20])
def test_the_largest_size_is_found(flan_t5, data_files, tmp_path, set_memory, caplog, fitting):
    caplog.set_level("INFO", logger="utils")
    set_memory(fitting * longest_source(flan_t5))
    train(flan_t5, data_files, tmp_path / "out", "auto")
    assert f"auto: {fitting} examples of full length fit" in caplog.text
    assert "taken again" not in caplog.text


def test_a_step_that_does_not_fit_is_taken_again(data_files, tmp_path, set_memory, caplog):
    model = write_flan_t5(tmp_path / "model", dropout_rate=0.0)
    plain = train(model, data_files, tmp_path / "plain", 20)
    # The first call finds that 20 fit; then, in the middle of the first step, memory is short for a while.
    set_memory(4 * longest_source(model), first=2, last=4)
    again = train(model, data_files, tmp_path / "again", "auto")
    assert "out of memory at batch size 20: the step is taken again at 10" in caplog.text
    assert [pair[0] for pair in again] == pytest.approx([pair[0] for pair in plain], rel=1e-6)
    assert [pair[1] for pair in again] == pytest.approx([pair[1] for pair in plain], rel=1e-5)
    before, first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "plain", "again"))
    moved, expected = ({name: end[name] - before[name] for name in before} for end in (second, first))
    assert relative_difference(moved, expected) < 5e-5


def test_not_even_one_fits(flan_t5, data_files, tmp_path, set_memory):
    set_memory(10)
    with pytest.raises(UserError, match="not even one example of"):
        train(flan_t5, data_files, tmp_path / "out", "auto")


@pytest.mark.slow
def test_auto_is_refused_on_a_cpu(tmp_path):
    """Before anything is loaded, in 8 GB: 48 such rows in one micro-batch of a real model would take 37."""
    model = write_flan_t5(tmp_path / "model")
    train_file = write_rows(tmp_path / "train.jsonl", make_rows(48))
    command = (
        "train_full.py", "--model_name_or_path", model, "--train_file", train_file, "--output_dir", tmp_path / "out",
        "--per_device_train_batch_size", "auto",
    )  # fmt: skip
    limited = ("bash", "-c", 'ulimit -v 8000000; exec "$@"', "bash", sys.executable)
    run = run_command(*limited, *command, ACCELERATE_USE_CPU="true")
    assert run.returncode == 2, run.stderr
    line = run.stderr.splitlines()[-1]
    assert line.startswith("train_full.py: error: --per_device_train_batch_size auto cannot tell what fits on cpu")
    assert "begin with 4" in line and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


# Too little for the first turn of each of the two steps, on one of two processes: at 4 examples, and then at 2.
# In the first of several turns, and in the only one, after which the others exchange gradients.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("short_rank", "fitting", "num_tokens", "num_turns"),
    [(0, 4, 150, [3, 5]), (1, 4, 100, [3, 5, 10]), (0, 10, 500, [1, 2])],
)
def test_one_of_two_processes_is_short_of_memory(data_files, tmp_path, short_rank, fitting, num_tokens, num_turns):
    model = write_flan_t5(tmp_path / "model", dropout_rate=0.0)
    plain = train(model, data_files, tmp_path / "plain", 20)
    words = ("tests/memory_worker.py", model, data_files["train"], tmp_path / "auto", short_rank)
    run = run_script(*words, fitting * longest_source(model), num_tokens, num_processes=2)
    assert run.returncode == 0, run.stderr
    met = [json.loads((tmp_path / "auto" / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["batch_size"] for rank in met] == [fitting] * 2, "the other holds all 10 of its share"
    assert [rank["num_turns"] for rank in met] == [num_turns * 2] * 2
    assert met[short_rank]["refused_turns"] == [1] * 2 * (len(num_turns) - 1)
    assert met[1 - short_rank]["refused_turns"] == []
    assert run.stderr.count(f"out of memory at batch size {fitting}: the step is taken again at {fitting // 2}") == 2
    lines = read_jsonl(tmp_path / "auto" / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx([pair[0] for pair in plain], rel=1e-6)
    assert [line["grad_norm"] for line in lines] == pytest.approx([pair[1] for pair in plain], rel=1e-5)
    before, first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "plain", "auto"))
    moved, expected = ({name: end[name] - before[name] for name in before} for end in (second, first))
    # AdamW divides a gradient by its size, so the rounding of one near 0 shows: 2.5e-5 and 3.0e-5 was measured.
    assert relative_difference(moved, expected) < 5e-5
