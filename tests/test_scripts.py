"""What the three scripts have in common, what each leaves behind, and that stock libraries can use it."""

import ast
import dataclasses
import fnmatch
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, read_jsonl, run_command
from helpers import FULL_FILES, MODEL_FILES, RECORDS, compute_logits, reset_accelerator_state, start
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

import train_lora
from utils.config import EvaluationConfig, LoraTrainingConfig, SummaryConfig, TrainingConfig
from utils.launch.output_dir import RUN_FILES, RUN_FOLDERS

CONFIGS = {
    "train_full.py": TrainingConfig,
    "train_lora.py": LoraTrainingConfig,
    "evaluate_rouge.py": EvaluationConfig,
    "summarize.py": SummaryConfig,
}
LORA_FILES = [*RECORDS, *MODEL_FILES, "adapter_config.json", "adapter_model.safetensors"]
EVALUATION_FILES = ["predictions.jsonl", "report.html", "report.md", "results.json"]
METRICS = {
    "train": {"step", "split", "loss", "learning_rate", "grad_norm", "num_examples", "num_target_tokens"}
    | {"micro_batches_per_update", "samples_per_second", "padding_efficiency", "peak_memory_mib"}
    | {"target_tokens_per_second", "model_flops_per_second", "data_wait_share"},
    "validation": {"step", "split", "loss", "num_examples", "num_target_tokens"},
}


def test_the_docstrings_give_the_same_commands():
    commands = {}
    for script in ("train_full.py", "train_lora.py"):
        docstring = ast.get_docstring(ast.parse((REPOSITORY / script).read_text(encoding="utf-8")))
        commands[script] = [line.replace(script, "SCRIPT") for line in docstring.splitlines()[2:]]
    assert commands["train_full.py"] == commands["train_lora.py"]
    assert commands["train_full.py"][0].split("  ")[0] == "accelerate launch SCRIPT"


@pytest.mark.parametrize("script", CONFIGS)
def test_a_script_is_short_enough_to_read(script):
    assert len((REPOSITORY / script).read_text(encoding="utf-8").splitlines()) <= 105


@pytest.mark.parametrize("script", CONFIGS)
def test_help_names_every_setting(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    printed, log = capsys.readouterr()
    assert (stop.value.code or 0, log) == (0, "")
    assert ast.get_docstring(ast.parse((REPOSITORY / script).read_text(encoding="utf-8"))) in printed
    for setting in (REPOSITORY / "demo" / script).with_suffix(".yaml").read_text(encoding="utf-8").splitlines()[1:]:
        assert setting in printed
    names = {item.name for item in dataclasses.fields(CONFIGS[script])}
    taken = set(re.findall(r"^  (?:-h, )?--([a-z0-9_-]+)", printed, flags=re.MULTILINE))
    assert taken == names | {"config", "help"}
    for item in dataclasses.fields(CONFIGS[script]):
        first_words = " ".join(item.metadata["help"].split()[:2])
        assert first_words in " ".join(printed.split()), item.name


def test_help_does_not_wait_for_the_libraries():
    code = "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    code += "sys.argv = ['train_lora.py', '--help']; runpy.run_path('train_lora.py', run_name='__main__')"
    run = run_command(sys.executable, "-c", code)
    assert (run.returncode, run.stdout.split()[-1]) == (0, "False"), run.stderr


@pytest.fixture(scope="module")
def runs(make_once, flan_t5, data_files) -> dict[str, Path]:
    """Where a tiny full run, a tiny LoRA run and an evaluation of both left their files, nested to be made."""

    def fill(folder: Path):
        data = [f"--{split}_file={path}" for split, path in data_files.items()]
        sizes = ["--total_train_batch_size=16", "--num_train_epochs=2", "--eval_steps=2", "--logging_steps=1"]
        for name in ("full", "lora"):
            words = [*data, *sizes, f"--model_name_or_path={os.path.relpath(flan_t5)}"]
            words.append(f"--output_dir={folder / 'made' / name}")
            start(f"train_{name}", *words, "--learning_rate=0.01")
        models = [f"{name}={folder / 'made' / name}" for name in ("full", "lora")]
        words = [*data, "--max_new_tokens=4", f"--output_dir={folder / 'made' / 'report'}", "--models", *models]
        start("evaluate_rouge", *words)

    folder = make_once("runs", fill)
    return {name: folder / "made" / name for name in ("full", "lora", "report")}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "files"), [("full", FULL_FILES), ("lora", LORA_FILES), ("report", EVALUATION_FILES)])
def test_exactly_these_files_are_left(runs, name, files):
    assert sorted(path.name for path in runs[name].parent.iterdir()) == ["full", "lora", "report"]
    left = sorted(path.name for path in runs[name].iterdir() if path.is_file())
    assert left == sorted(files)
    folders = [path.name for path in runs[name].iterdir() if path.is_dir()]
    assert folders == ([] if name == "report" else ["checkpoints"])
    for file in files:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in RUN_FILES), "a later run would not know it as a run's"


def test_every_pattern_of_a_runs_files_matches_one():
    """But for those of tokenizers and models that are not as small as the tests'."""
    left = {*FULL_FILES, *LORA_FILES, *EVALUATION_FILES, "merged_from.json"}
    unused = [pattern for pattern in RUN_FILES if not fnmatch.filter(left, pattern)]
    assert unused == [
        "model-*-of-*.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "spiece.model",
        "added_tokens.json",
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
    ]
    assert RUN_FOLDERS == ("last_good_model", "export.unchecked", "tracker", "checkpoints")


@pytest.mark.parametrize("name", ["full", "lora"])
def test_records(runs, data_files, name):
    metrics = read_jsonl(runs[name] / "metrics.jsonl")
    assert [(line["step"], line["split"]) for line in metrics] == [
        (0, "validation"),
        (1, "train"),
        (2, "train"),
        (2, "validation"),
        (3, "train"),
        (4, "train"),
        (4, "validation"),
    ]
    for line in metrics:
        assert line.keys() == METRICS[line["split"]]
        assert line["num_examples"] == {"train": 16, "validation": 9}[line["split"]]
    manifest = json.loads((runs[name] / "run_manifest.json").read_text(encoding="utf-8"))
    expected = {"num_train_examples": 40, "num_train_steps": 4, "num_processes": 1, "strategy": "NO", "device": "cpu"}
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["settings"]["train_file"] == str(data_files["train"])
    assert manifest["settings"].keys() == {item.name for item in dataclasses.fields(CONFIGS[f"train_{name}.py"])}
    assert (runs[name] / "loss_curve.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_full_model_loads_with_stock_transformers(runs, flan_t5):
    config = json.loads((runs["full"] / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model, report = AutoModelForSeq2SeqLM.from_pretrained(runs["full"], output_loading_info=True)
    assert not any(report.values()), report
    assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    saved, before = load_file(runs["full"] / "model.safetensors"), load_file(flan_t5 / "model.safetensors")
    assert saved.keys() == before.keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert [name for name in saved if torch.equal(saved[name], before[name])] == []  # every weight was trained
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved.get(name, saved["shared.weight"])), name
    manifest = json.loads((runs["full"] / "run_manifest.json").read_text())
    num_parameters = sum(tensor.numel() for tensor in saved.values())
    assert (manifest["num_parameters"], manifest["num_trainable_parameters"]) == (num_parameters, num_parameters)


def test_the_adapter_loads_with_stock_transformers(runs, flan_t5):
    stock = AutoModelForSeq2SeqLM.from_pretrained(runs["lora"])
    base = AutoModelForSeq2SeqLM.from_pretrained(flan_t5)
    before = compute_logits(base, runs["lora"])
    with_peft = compute_logits(PeftModel.from_pretrained(base, runs["lora"]), runs["lora"])
    assert torch.equal(compute_logits(stock, runs["lora"]), with_peft)
    assert (with_peft - before).abs().max() > 1e-3  # it does something


def test_the_adapter_knows_its_base_wherever_it_is_used_from(runs, flan_t5):
    config = json.loads((runs["lora"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(flan_t5.resolve())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (32, 32, 0.1)
    assert (config["task_type"], sorted(config["target_modules"])) == ("SEQ_2_SEQ_LM", ["q", "v"])


def test_lora_moves_and_saves_the_adapter_alone(runs, flan_t5):
    with safe_open(runs["lora"] / "adapter_model.safetensors", "pt") as file:
        adapter = {name: file.get_tensor(name) for name in file.keys()}
    assert {name.split(".")[-2] for name in adapter} == {"lora_A", "lora_B"}
    assert {name.split(".")[-3] for name in adapter} == {"q", "v"}
    assert len(adapter) == 2 * 2 * 6  # A and B of q and v in 2 + 2 * 2 attentions
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)  # B starts at zero: all moved
    manifest = json.loads((runs["lora"] / "run_manifest.json").read_text())
    assert manifest["num_trainable_parameters"] == sum(tensor.numel() for tensor in adapter.values()) == 32 * 64 * 12
    base = load_file(flan_t5 / "model.safetensors")
    assert manifest["num_parameters"] == 32 * 64 * 12 + sum(tensor.numel() for tensor in base.values())
    # Bit for bit: what is loaded under the adapter is what was there before.
    loaded = AutoModelForSeq2SeqLM.from_pretrained(runs["lora"]).state_dict()
    for name, tensor in base.items():
        stem, _, leaf = name.rpartition(".")
        assert torch.equal(loaded[name] if name in loaded else loaded[f"{stem}.base_layer.{leaf}"], tensor), name


@pytest.fixture
def fresh_accelerator_state():
    reset_accelerator_state()
    yield
    reset_accelerator_state()


def test_lora_trains_nothing_but_the_adapter(fresh_accelerator_state, flan_t5, data_files, tmp_path, monkeypatch):
    """In this process, so that the frozen weights can be compared in memory, after training."""
    trained = []
    monkeypatch.setattr(train_lora, "export_model", lambda accelerator, model, *rest: trained.append(model))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train_lora.main(
        LoraTrainingConfig(
            model_name_or_path=str(flan_t5), train_file=str(data_files["train"]), output_dir=str(tmp_path / "out"),
            max_train_steps=2, total_train_batch_size=8, learning_rate=0.01,
        )
    )  # fmt: skip
    before = {name: tensor.bfloat16() for name, tensor in load_file(flan_t5 / "model.safetensors").items()}
    num_frozen = 0
    for name, parameter in trained[0].named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad and parameter.dtype == torch.float32, name
        else:
            original = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert not parameter.requires_grad and torch.equal(parameter, before[original]), name
            num_frozen += 1
    assert num_frozen == len(before)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*RECORDS, "README.md", "checkpoints"])


def test_the_report(runs):
    results = json.loads((runs["report"] / "results.json").read_text(encoding="utf-8"))
    assert (list(results["models"]), list(results["comparisons"])) == (["full", "lora"], ["full_vs_lora"])
    assert (results["num_dialogues"], results["num_rows"]) == (4, 12)
    assert results["settings"].keys() == {item.name for item in dataclasses.fields(EvaluationConfig)}
    for name, weights in (("full", "model"), ("lora", "adapter_model")):
        training = results["models"][name]["training"]
        manifest = json.loads((runs[name] / "run_manifest.json").read_text(encoding="utf-8"))
        assert training["num_trainable_parameters"] == manifest["num_trainable_parameters"]
        assert training["size_bytes"] == (runs[name] / f"{weights}.safetensors").stat().st_size
        lines = read_jsonl(runs[name] / "metrics.jsonl")
        assert training["curves"] == {
            split: [[line["step"], line["loss"]] for line in lines if line["split"] == split]
            for split in ("train", "validation")
        }
        train = [line for line in lines if line["split"] == "train"]
        assert training["seconds"] == pytest.approx(sum(16 / line["samples_per_second"] for line in train))
    predictions = read_jsonl(runs["report"] / "predictions.jsonl")
    assert [(line["model"], line["id"]) for line in predictions] == [
        (model, f"test_{dialogue}_1") for model in ("full", "lora") for dialogue in range(4)
    ]
    columns = {"id", "model", "prediction", "references", "dialogue", "scores", "unsupported"}
    assert all(line.keys() - {"truncated"} == columns for line in predictions)
    assert [len(line["references"]) for line in predictions] == [3] * 8
