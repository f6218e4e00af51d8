"""What `auto` finds fits, and one example more would not; a resumed run keeps it.

The CPU stands for a GPU here: the bytes are those of real passes, counted tensor by tensor.
"""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import keep_checkpoint, make_rows
from helpers import train_in_process
from safetensors.torch import load_file

import train_full
from utils.config import TrainingConfig, UserError
from utils.data.batching import measure_lengths
from utils.data.tokens import tokenize_rows
from utils.modeling.loading import load_model, load_tokenizer
from utils.training.resources import batch_size
from utils.training.resources.batch_size import USED_SHARE, count_fitting, estimate_fitting, find_batch_size
from utils.training.resources.memory_estimate import LiveBytes, MicroBatch, count_bytes, estimate_memory


class FakeGpu:
    """A CPU that says how much of its memory is in use and how much there is."""

    def __init__(self, monkeypatch, model: torch.nn.Module):
        self.weights, self.size = count_bytes(model)[0], None
        measure_peak = batch_size.measure_peak

        def measure(accelerator, model, config, examples):
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            with LiveBytes(model.parameters(), 0) as live:
                measure_peak(accelerator, model, config, examples)
            peak = self.weights + gradients + live.peak
            if peak > self.size:
                raise torch.OutOfMemoryError
            return peak

        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
        monkeypatch.setattr(batch_size, "measure_memory", lambda accelerator: self.size)
        monkeypatch.setattr(batch_size, "measure_peak", measure)


@pytest.fixture
def parts(flan_t5, tmp_path):
    """What find_batch_size is called with."""
    AcceleratorState._reset_state(True)
    config = TrainingConfig(model_name_or_path=str(flan_t5), output_dir=str(tmp_path), total_train_batch_size=20)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(load_model(str(flan_t5), "sdpa", torch.float32))
    data = tokenize_rows(accelerator, make_rows(40), load_tokenizer(str(flan_t5)), config, "train")
    return accelerator, model, data, config


@pytest.mark.parametrize("megabytes", [4, 5, 10, 1000])
def test_it_fits_and_one_more_would_not(parts, monkeypatch, megabytes):
    accelerator, model, data, config = parts
    gpu = FakeGpu(monkeypatch, model)
    gpu.size = megabytes * 1e6
    found = find_batch_size(*parts)
    gpu.size = 1e12
    source, target = (int(index) for index in measure_lengths(data).argmax(axis=0))
    example = {"input_ids": [data[source]["input_ids"]], "labels": [data[target]["labels"]]}
    batch_size.measure_peak(accelerator, model, config, example)  # gradients
    moments = 2 * count_bytes(model)[1]
    needed = [
        moments
        + batch_size.measure_peak(accelerator, model, config, {name: ids * size for name, ids in example.items()})
        for size in (found, found + 1)
    ]
    if megabytes == 1000:
        assert found == config.total_train_batch_size, "more are never asked for"
    else:
        assert 1 <= found < 20
        assert needed[0] <= USED_SHARE * megabytes * 1e6 < needed[1]


def test_not_even_one_fits(parts, monkeypatch):
    gpu = FakeGpu(monkeypatch, parts[1])
    for size in (1.2e6, gpu.weights):  # its peak, but not what the optimizer needs as well; nothing at all
        gpu.size = size
        with pytest.raises(UserError, match="not even one example of"):
            find_batch_size(*parts)


def test_one_fits_and_two_run_out_of_memory(parts, monkeypatch):
    gpu = FakeGpu(monkeypatch, parts[1])
    gpu.size, measure = 1e9, batch_size.measure_peak

    def refuse_two(accelerator, model, config, examples):
        if len(examples["input_ids"]) > 1:
            raise torch.OutOfMemoryError
        return measure(accelerator, model, config, examples)

    monkeypatch.setattr(batch_size, "measure_peak", refuse_two)
    assert find_batch_size(*parts) == 1


def test_a_peak_that_grows_faster_than_a_line(parts, monkeypatch):
    """What is extrapolated is tried, and made smaller until it fits."""
    sizes = []

    def measure(accelerator, model, config, examples):
        sizes.append(len(examples["input_ids"]))
        return 1000 + max(10 * sizes[-1], 100 * (sizes[-1] - 3))

    monkeypatch.setattr(batch_size, "measure_peak", measure)
    monkeypatch.setattr(batch_size, "count_moments", lambda accelerator, model: 0)
    monkeypatch.setattr(batch_size, "measure_memory", lambda accelerator: 1500 / USED_SHARE)
    assert find_batch_size(*parts) == 8
    assert sizes == [1, 1, 2, 20, 15, 11, 8]


def test_probing_leaves_no_gradient(parts, monkeypatch):
    FakeGpu(monkeypatch, parts[1]).size = 1e9
    find_batch_size(*parts)
    assert all(parameter.grad is None for parameter in parts[1].parameters())


@pytest.mark.slow
def test_preflight_estimates_it(parts, flan_t5):
    accelerator, _, data, config = parts
    shapes, lengths = load_model(str(flan_t5), "sdpa", torch.float32, without_weights=True), measure_lengths(data)
    source, target = lengths.max(axis=0).tolist()
    found = estimate_fitting(accelerator, shapes, lengths, config, 10_000_000)
    needed = [
        sum(estimate_memory(accelerator, shapes, config, micro_batch, None, accumulating=True)[0].values())
        for micro_batch in (MicroBatch(n, source, target, n * source, n * target) for n in (found, found + 1))
    ]
    assert 1 <= found < 20 and needed[0] <= USED_SHARE * 10_000_000 < needed[1]


def test_preflight_estimates_a_peak_that_grows_faster_than_a_line(parts, monkeypatch):
    """Whatever the first two examples promise, what it says fits."""
    accelerator, _, data, config = parts

    def estimate(accelerator, model, config, micro_batch, validation, accumulating):
        return {"activations": 1000 + max(10 * micro_batch.num_examples, 100 * (micro_batch.num_examples - 3))}, {}

    monkeypatch.setattr(batch_size, "estimate_memory", estimate)
    found = [estimate_fitting(accelerator, None, measure_lengths(data), config, m / USED_SHARE) for m in (1009, 1500)]
    assert found == [0, 6], "8 would fit; from one example and two it would be 20"


def test_count_fitting():
    assert [count_fitting(100, 110, memory, 5) for memory in (99, 100, 109, 110, 145, 1000)] == [0, 1, 1, 2, 5, 5]
    assert count_fitting(float("inf"), float("inf"), 1e9, 5) == 0
    assert count_fitting(100, float("inf"), 1e9, 5) == 1
    assert count_fitting(100, 100, 110, 5) == 5


def test_auto_is_16_on_a_cpu_unless_the_run_began_with_another(flan_t5, data_files, tmp_path):
    def train(name: str, **settings) -> int:
        train_in_process(
            train_full, TrainingConfig, flan_t5, data_files, tmp_path / name, mixed_precision="no",
            checkpointing_steps=2, **settings,
        )  # fmt: skip
        return json.loads((tmp_path / name / "run_manifest.json").read_text())["settings"][
            "per_device_train_batch_size"
        ]

    assert train("auto", per_device_train_batch_size="auto", max_train_steps=1) == 16
    assert train("whole", per_device_train_batch_size=3) == 3
    keep_checkpoint(tmp_path / "whole", tmp_path / "cut")
    assert train("cut", per_device_train_batch_size="auto", resume_from_checkpoint="latest") == 3
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert all(tensor.equal(expected[name]) for name, tensor in ours.items())
