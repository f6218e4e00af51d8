"""`--compile`: the same training by few graphs. Here functions are traced, but no kernels are made of them, which
takes a CPU minutes: tests/real_sizes.py does that."""

import copy
import functools

import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import keep_checkpoint, read_jsonl, relative_difference, run_script, usual_differences, write_flan_t5
from helpers import train_in_process, write_bart
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import train_full
from utils.config import LoraTrainingConfig, TrainingConfig, UserError
from utils.data.batching import collate
from utils.data.prefetch import move_batch
from utils.execution import compiled
from utils.execution.compiled import compile_blocks
from utils.execution.fused import fuse
from utils.modeling.loading import load_model
from utils.training.step import compute_gradient

ON = {"compile": True, "mixed_precision": "no"}
BATCHES = ((3, 100, 9), (1, 30, 60), (5, 60, 50), (0, 0, 0), (7, 130, 70), (2, 64, 64))


@pytest.fixture
def without_kernels(monkeypatch):
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("kind", "num_graphs"),
    [("bart", 4), pytest.param("lora", 8, marks=pytest.mark.slow)],
)
def test_gradients_of_any_batch_by_few_graphs(without_kernels, tmp_path, kind, num_graphs):
    """Of many examples, of one and of none; sources longer than targets, shorter and as long. The encoder's blocks
    have a graph for many examples and one for one, and so have the decoder's; a stack's first block has other ones if
    nothing before it is trained."""
    AcceleratorState._reset_state(True)
    accelerator, folder = Accelerator(cpu=True), tmp_path / "model"
    write_bart(folder) if kind == "bart" else write_flan_t5(folder, num_layers=4, dropout_rate=0.0)
    model = load_model(str(folder), "sdpa", torch.float32).eval()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q", "v"]))
    fuse(model)
    plain = copy.deepcopy(model)
    compile_blocks(accelerator, model, TrainingConfig(**ON))
    generator, num_so_far = torch.Generator().manual_seed(0), []

    def compute(candidate: torch.nn.Module, examples: dict, multiple: int) -> dict[str, torch.Tensor]:
        batch = collate(pa.table(examples), model.config.pad_token_id, multiple)
        batch = move_batch(batch, candidate, accelerator.device)
        assert all(batch[name].shape[1] % multiple == 0 for name in ("input_ids", "attention_mask"))
        candidate.zero_grad()
        compute_gradient(accelerator, candidate, [batch], 30, TrainingConfig())
        return {name: p.grad.clone() for name, p in candidate.named_parameters() if p.grad is not None}

    for num_examples, source, target in BATCHES:
        sizes = ((num_examples, source), (num_examples, target))
        ids, labels = (torch.randint(3, 100, size, generator=generator).tolist() for size in sizes)
        examples = {"input_ids": ids, "labels": labels}
        ours, expected = compute(model, examples, 64), compute(plain, examples, 1)
        if num_examples:
            assert relative_difference(ours, expected) < 1e-6  # 2e-7 to 4e-7 was measured
        else:
            assert not any(gradient.any() for gradient in ours.values())
        num_so_far.append(counters["stats"]["unique_graphs"] - 1)  # one was to see that it works at all
    assert num_so_far == [num_graphs // 2] + [num_graphs] * 5


@pytest.mark.slow
def test_a_training(without_kernels, data_files, tmp_path):
    """Its micro-batches have a few tokens more, and nothing that it leaves tells that it was compiled; without
    --compile it goes on where it was stopped."""
    model = write_flan_t5(tmp_path / "model", dropout_rate=0.0, num_layers=1)
    arguments = (train_full, TrainingConfig, model, data_files)
    common = {"max_train_steps": 3, "checkpointing_steps": 2, "mixed_precision": "no"}
    plain = train_in_process(*arguments, tmp_path / "plain", **common)
    ours = train_in_process(*arguments, tmp_path / "compiled", **common, compile=True)
    step = "checkpoints/step_000002"
    (tmp_path / "resumed" / "checkpoints").mkdir(parents=True)
    (tmp_path / "compiled" / step).rename(tmp_path / "resumed" / step)
    train_in_process(*arguments, tmp_path / "resumed", **common, resume_from_checkpoint="latest")
    for split, lines in plain.items():
        assert [line["loss"] for line in ours[split]] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    assert sum(line["padding_efficiency"] for line in ours["train"]) < sum(
        line["padding_efficiency"] for line in plain["train"]
    )
    tensors = {name: load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled", "resumed")}
    assert tensors["plain"].keys() == tensors["compiled"].keys()
    for name in ("compiled", "resumed"):
        # Rounding's; updates are steps of 1e-3.
        assert usual_differences(tensors[name], tensors["plain"])[0] < 1e-5


@pytest.mark.slow
def test_two_processes(data_files, tmp_path):
    """LoRA's gradient, where DDP exchanges it, and its adapter are those of one process that compiles nothing, which
    can resume the run."""
    write_flan_t5(tmp_path / "model", dropout_rate=0.0, num_layers=1)
    words = [
        "train_lora.py", "--model_name_or_path", tmp_path / "model", "--train_file", data_files["train"],
        "--max_train_steps", 2, "--total_train_batch_size", 16, "--logging_steps", 1, "--lora_dropout", 0,
        "--per_device_train_batch_size", 4, "--mixed_precision", "no", "--checkpointing_steps", 1, "--output_dir",
    ]  # fmt: skip
    compiled = ["tests/without_kernels.py", *words, tmp_path / "compiled", "--compile", "true"]
    resumed = [*words, tmp_path / "resumed", "--resume_from_checkpoint", "latest"]
    for num_processes, command in ((1, [*words, tmp_path / "plain"]), (2, compiled), (1, resumed)):
        if command is resumed:
            keep_checkpoint(tmp_path / "compiled", tmp_path / "resumed", step=1)
        run = run_script(*command, num_processes=num_processes)
        assert run.returncode == 0, run.stderr
    lines = {name: read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("plain", "compiled", "resumed")}
    adapters = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in lines}
    for name in ("compiled", "resumed"):
        for ours, expected in zip(lines[name], lines["plain"], strict=True):
            assert (ours["loss"], ours["grad_norm"]) == pytest.approx((expected["loss"], expected["grad_norm"]), 1e-5)
        assert adapters[name].keys() == adapters["plain"].keys()
        assert usual_differences(adapters[name], adapters["plain"])[0] < 1e-5  # rounding's


def test_refusals(without_kernels, flan_t5, tmp_path, monkeypatch):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    model = load_model(str(flan_t5), "sdpa", torch.float32)

    def refused(config: TrainingConfig, reason: str, candidate: torch.nn.Module = model):
        with pytest.raises(UserError, match=f"^--compile: {reason}"):
            compile_blocks(accelerator, candidate, config)

    refused(TrainingConfig(**ON, gradient_checkpointing=True), "--gradient_checkpointing recomputes")
    refused(LoraTrainingConfig(compile=True, load_in_4bit=True), "--load_in_4bit has kernels")
    refused(TrainingConfig(**ON), "google/flan-t5-base has no repeated blocks", torch.nn.Linear(2, 2))
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "is_sharded", lambda accelerator: True)
        refused(TrainingConfig(**ON), "NO exchanges weights")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="no such backend"))
    refused(TrainingConfig(**ON), "torch.compile does not work here: ")
    assert "forward" not in vars(model.encoder.block[0])
