"""The same training on any number of processes and however the steps are cut: the parameters after three updates of
256 examples, against a plain loop over unplanned batches."""

import json

import pytest
import torch
from conftest import make_rows, relative_difference, run_script, write_flan_t5, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from utils.data.batching import select_examples
from utils.prompting import build_prompt

pytestmark = pytest.mark.slow
LEARNING_RATE = 1e-4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same")
    return write_flan_t5(folder / "model", dropout_rate=0.0), write_rows(folder / "train.jsonl", make_rows(800))


@pytest.fixture(scope="module")
def reference(inputs) -> dict[str, torch.Tensor]:
    """The parameters after three updates, each of one padded batch, with transformers' own loss."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(inputs[0]), AutoTokenizer.from_pretrained(inputs[0])
    rows = make_rows(800)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0}])
    for step in range(3):
        batch = [rows[index] for index in select_examples(800, 256, 42, step)]
        prompts = tokenizer([build_prompt(row["dialogue"]) for row in batch], padding=True, return_tensors="pt")
        labels = tokenizer([row["summary"] for row in batch], padding=True, return_tensors="pt").input_ids
        labels[labels == tokenizer.pad_token_id] = -100
        model(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / 3)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("per_device", "num_processes"), [(4, 1), (16, 1), (300, 1), (4, 2), (16, 3), (300, 3)])
def test_parameters_after_three_updates(inputs, reference, tmp_path, num_processes, per_device):
    words = [
        "train_full.py", "--model_name_or_path", inputs[0], "--train_file", inputs[1], "--mixed_precision", "no",
        "--per_device_train_batch_size", per_device, "--learning_rate", LEARNING_RATE,
        "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    run = run_script(*words, num_processes=num_processes)
    assert run.returncode == 0, run.stderr
    manifest = json.loads((tmp_path / "out" / "run_manifest.json").read_text())
    assert (manifest["num_train_steps"], manifest["num_processes"]) == (3, num_processes)
    before, after = load_file(inputs[0] / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    moved, expected = ({name: end[name] - before[name] for name in before} for end in (after, reference))
    # AdamW divides a gradient by its size, so the rounding of one near 0 shows: 3e-6 to 1e-5 was measured.
    assert relative_difference(moved, expected) < 5e-5
