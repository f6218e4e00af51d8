"""evaluate_rouge.py holds a whole model on each process whatever the launcher says, or spreads it."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import run_command, run_script

from utils.config import EvaluationConfig, UserError
from utils.decoding import decode_batch
from utils.modeling import load_model
from utils.placement import place_model


@pytest.fixture(scope="module")
def words(flan_t5, data_files) -> tuple:
    return ("--models", f"a={flan_t5}", "--test_file", data_files["test"], "--max_new_tokens", "8", "--output_dir")


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> Path:
    """The report of one process."""
    output_dir = tmp_path_factory.mktemp("alone") / "out"
    run = run_script("evaluate_rouge.py", *words, output_dir)
    assert run.returncode == 0, run.stderr
    return output_dir


def check_same(output_dir: Path, alone: Path):
    assert (output_dir / "predictions.jsonl").read_bytes() == (alone / "predictions.jsonl").read_bytes()
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (output_dir, alone))
    assert ours["models"]["a"]["scores"] == theirs["models"]["a"]["scores"]


@pytest.mark.parametrize("name", ["deepspeed_zero2", "deepspeed_zero3", "fsdp2", "multi_gpu"])
def test_whole_models_under_each_config(words, alone, tmp_path, name):
    launch = ("accelerate", "launch", "--config_file", f"accelerate_configs/{name}.yaml", "--num_processes", "2")
    script = ("--main_process_port", "0", "evaluate_rouge.py", *words, tmp_path / "out")
    run = run_command(*launch, *script, DS_ACCELERATOR="cpu")
    assert run.returncode == 0, run.stderr
    check_same(tmp_path / "out", alone)


def test_device_map(words, alone, tmp_path):
    run = run_script("evaluate_rouge.py", *words, tmp_path / "out", "--device_map", "auto")
    assert run.returncode == 0, run.stderr
    check_same(tmp_path / "out", alone)


def test_device_map_on_several_processes(words, tmp_path):
    run = run_script("evaluate_rouge.py", *words, tmp_path / "out", "--device_map", "auto", num_processes=2)
    assert [line for line in run.stderr.splitlines() if "error: " in line] == [
        "evaluate_rouge.py: error: --device_map auto gives one process all GPUs, and 2 were started: take "
        "--num_processes 1"
    ]
    assert not (tmp_path / "out").exists()


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("num_bytes", [150_000, 220_000])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_where_memory_ends_weights_are_brought_in_to_compute(accelerator, flan_t5, tmp_path, num_bytes, num_beams):
    """As those are that a GPU has no room for; here from a folder, since a CPU has nothing bigger beside it."""
    config = EvaluationConfig(device_map="auto", max_new_tokens=12, num_beams=num_beams)
    generator = torch.Generator().manual_seed(0)
    prompts = [[*torch.randint(3, 300, (size,), generator=generator).tolist(), 1] for size in (30, 20, 9)]
    whole = load_model(str(flan_t5), "sdpa", torch.float32).eval()
    model = load_model(str(flan_t5), "sdpa", torch.float32).eval()
    model = place_model(model, accelerator, config, {"cpu": num_bytes}, tmp_path)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    assert decode_batch(model, prompts, config) == decode_batch(whole, prompts, config)
    with pytest.raises(UserError, match="--device_map auto: the model fits neither the GPUs nor the host"):
        place_model(whole, accelerator, config, {"cpu": num_bytes})
