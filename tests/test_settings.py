"""Settings that people ask of such scripts, each by what it does."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import write_flan_t5
from helpers import train_in_process
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax
from transformers import AutoModelForSeq2SeqLM

import train_full
import train_lora
from utils.config import EvaluationConfig, LoraTrainingConfig, TrainingConfig, UserError
from utils.generation.decoding import decode_batch
from utils.modeling.loading import load_model
from utils.modeling.lora import add_lora
from utils.training.optimization import num_train_steps
from utils.training.step import compute_training_losses


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (0.5, 2), (0.6, 3), (2.5, 10), (0.01, 1)])
def test_epochs_with_a_fraction(epochs, steps):
    """Of 4 updates and a remainder, which is left out; a begun one is done."""
    assert num_train_steps(TrainingConfig(num_train_epochs=epochs, total_train_batch_size=16), 70) == steps


def test_label_smoothing_by_its_definition():
    """(1 - f) of the target's cross-entropy and f of the mean over the vocabulary, as transformers' LabelSmoother."""
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 11, requires_grad=True), torch.randint(11, (7,))
    loss, plain = compute_training_losses(logits, targets, TrainingConfig(label_smoothing_factor=0.3))
    negative = -log_softmax(logits.detach().double(), dim=-1)
    expected = negative.gather(1, targets[:, None]).sum()
    assert plain.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == pytest.approx((0.7 * expected + 0.3 * negative.mean(dim=1).sum()).item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    smooth = torch.full((7, 11), 0.3 / 11).scatter_add_(1, targets[:, None], torch.full((7, 1), 0.7))
    assert torch.allclose(gradient, logits.detach().softmax(dim=-1) - smooth, atol=1e-6)


def test_label_smoothing_is_trained_on_and_the_plain_loss_stands_beside(data_files, tmp_path):
    # Of a model that is sure of its tokens: where all are about as likely, the two losses are about the same.
    flan_t5 = write_flan_t5(tmp_path / "sure", d_model=16)
    weights = load_file(flan_t5 / "model.safetensors")
    weights["lm_head.weight"] *= 8
    save_file(weights, flan_t5 / "model.safetensors", metadata={"format": "pt"})
    settings = {"max_train_steps": 2, "mixed_precision": "no", "logging_steps": 1}
    plain = train_in_process(train_full, TrainingConfig, flan_t5, data_files, tmp_path / "plain", **settings)
    settings["label_smoothing_factor"] = 0.2
    smooth = train_in_process(train_full, TrainingConfig, flan_t5, data_files, tmp_path / "smooth", **settings)
    first, second = smooth["train"]
    assert "plain_loss" not in plain["train"][0]
    assert first["plain_loss"] == pytest.approx(plain["train"][0]["loss"], rel=1e-6)
    assert first["loss"] != pytest.approx(first["plain_loss"], rel=1e-3)
    assert second["plain_loss"] != plain["train"][1]["loss"], "another gradient"
    assert smooth["validation"][0] == plain["validation"][0]


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping(flan_t5, data_files, tmp_path, monkeypatch, caplog, patience):
    """A loss that is best at the second validation: so many more are made."""
    caplog.set_level("INFO", logger="utils")
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.1, 2.0, 1.0])
    evaluate = train_full.train.__globals__["evaluate_loss"]
    monkeypatch.setitem(
        train_full.train.__globals__, "evaluate_loss", lambda *given: evaluate(*given) | {"loss": next(losses)}
    )
    settings = {"max_train_steps": 12, "eval_steps": 2, "logging_steps": 5, "early_stopping_patience": patience}
    settings |= {"load_best_model_at_end": True, "mixed_precision": "no"}
    metrics = train_in_process(train_full, TrainingConfig, flan_t5, data_files, tmp_path, **settings)
    end = 4 + 2 * patience
    assert [line["step"] for line in metrics["validation"]] == list(range(0, end + 1, 2))
    assert metrics["train"][-1]["step"] == end, "the updates since the last line are not lost"
    assert f"step {end}: no improvement since step 4: training ends early" in caplog.messages
    assert "the model is that of step 4" in caplog.messages
    assert "finished" in json.loads((tmp_path / "run_manifest.json").read_text())


def test_early_stopping_needs_a_validation_set(flan_t5, data_files, tmp_path):
    settings = {"model_name_or_path": str(flan_t5), "train_file": str(data_files["train"])}
    with pytest.raises(UserError, match="--validation_file is missing"):
        train_full.main(TrainingConfig(early_stopping_patience=1, output_dir=str(tmp_path / "out"), **settings))


def decode(model, prompts, **settings):
    return [ids for ids, _ in decode_batch(model, prompts, EvaluationConfig(max_new_tokens=14, **settings))]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("place", ["setting", "model"])
def test_shortest_texts_and_repetitions(flan_t5, place, num_beams):
    """As generate() does it, also where some texts of a batch end before others."""
    torch.manual_seed(1)
    model = load_model(str(flan_t5), "sdpa", torch.float32).eval()
    with torch.no_grad():  # so that texts end early, and not all at once
        model.lm_head.weight[model.config.eos_token_id] = 1.5 * model.lm_head.weight.abs().max() * torch.randn(32)
        model.decoder.final_layer_norm.weight *= 4
    prompts = [torch.randint(3, 200, (length,)).tolist() for length in (20, 15, 9, 9, 6, 5, 4, 3)]
    free = decode(model, prompts, num_beams=num_beams)
    assert len({len(ids) for ids in free}) > 1 and min(map(len, free)) < 7
    limits = {"min_new_tokens": 7, "no_repeat_ngram_size": 2}
    if place == "model":
        model.generation_config.update(**limits)
    found = decode(model, prompts, num_beams=num_beams, **(limits if place == "setting" else {}))
    for prompt, ids in zip(prompts, found, strict=True):
        (expected,) = model.generate(torch.tensor([prompt]), max_new_tokens=14, num_beams=num_beams, **limits)
        assert ids == expected[1:].tolist()
        assert len(ids) >= 7
    assert found != free


def test_a_shortest_text_above_the_longest():
    with pytest.raises(UserError, match="--min_new_tokens 9 is above --max_new_tokens 8"):
        EvaluationConfig(min_new_tokens=9, max_new_tokens=8)


def test_every_linear_layer(flan_t5):
    model = add_lora(
        load_model(str(flan_t5), "sdpa", torch.float32), LoraTrainingConfig(lora_target_modules=["all-linear"])
    )
    adapted = {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    stock = AutoModelForSeq2SeqLM.from_pretrained(flan_t5)
    linear = {name for name, module in stock.named_modules() if isinstance(module, torch.nn.Linear)}
    assert adapted == linear - {"lm_head"} and len(adapted) > 20


def test_an_adapter_whose_base_has_moved(flan_t5, data_files, tmp_path):
    base = tmp_path / "base"
    base.symlink_to(flan_t5)
    settings = {"max_train_steps": 1, "mixed_precision": "no"}
    train_in_process(train_lora, LoraTrainingConfig, base, data_files, tmp_path / "lora", **settings)
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"its base .*gone: no such folder"):
        load_model(str(tmp_path / "lora"), "sdpa", torch.float32)
    model = load_model(str(tmp_path / "lora"), "sdpa", torch.float32, base_model=str(flan_t5))
    expected = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(flan_t5), tmp_path / "lora")
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        difference = model(ids, labels=ids).logits - expected.eval()(input_ids=ids, labels=ids).logits
    assert difference.abs().max() < 1e-5


def test_an_adapter_is_trained_further(flan_t5, data_files, tmp_path):
    """From its weights, with its settings, and on the base that is named now."""
    common = {"mixed_precision": "no", "learning_rate": 0.02}
    first = common | {"max_train_steps": 4, "lora_r": 3, "lora_alpha": 9, "lora_target_modules": ["v", "wo"]}
    before = train_in_process(train_lora, LoraTrainingConfig, flan_t5, data_files, tmp_path / "first", **first)
    base = tmp_path / "moved"
    base.symlink_to(flan_t5)
    more = common | {"max_train_steps": 2, "adapter_name_or_path": str(tmp_path / "first")}
    after = train_in_process(train_lora, LoraTrainingConfig, base, data_files, tmp_path / "more", **more)
    assert after["validation"][0]["loss"] == before["validation"][-1]["loss"]
    assert after["validation"][-1]["loss"] < after["validation"][0]["loss"]
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "more")]
    assert configs[1].pop("base_model_name_or_path") == str(flan_t5.resolve())
    configs[0].pop("base_model_name_or_path")
    assert configs[0] | {"inference_mode": None} == configs[1] | {"inference_mode": None}
    settings = json.loads((tmp_path / "more" / "run_manifest.json").read_text())["settings"]
    assert (settings["lora_r"], settings["lora_alpha"], settings["lora_target_modules"]) == (3, 9, ["v", "wo"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./none", "--adapter_name_or_path ./none: no such folder"),
        ("MODEL", "--adapter_name_or_path .*: cannot be loaded"),
    ],
)
def test_an_adapter_that_is_none(flan_t5, data_files, tmp_path, path, message):
    settings = {"adapter_name_or_path": path.replace("MODEL", str(flan_t5))}
    with pytest.raises(UserError, match=message):
        train_in_process(train_lora, LoraTrainingConfig, flan_t5, data_files, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_an_early_end_is_found_again_on_resume(flan_t5, data_files, tmp_path, monkeypatch):
    """The run that is resumed at the update at which it had ended does not train on."""
    evaluate = train_full.train.__globals__["evaluate_loss"]
    losses = iter([5.0, 3.0, 4.0, 4.0])
    monkeypatch.setitem(
        train_full.train.__globals__, "evaluate_loss", lambda *given: evaluate(*given) | {"loss": next(losses)}
    )
    settings = {"max_train_steps": 9, "eval_steps": 2, "checkpointing_steps": 2, "early_stopping_patience": 1}
    settings |= {"mixed_precision": "no", "resume_from_checkpoint": "latest"}
    train_in_process(train_full, TrainingConfig, flan_t5, data_files, tmp_path, **settings)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    metrics = train_in_process(train_full, TrainingConfig, flan_t5, data_files, tmp_path, **settings)
    assert metrics["validation"][-1]["step"] == metrics["train"][-1]["step"] == 4
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert "4 updates; " in (tmp_path / "README.md").read_text()


def test_an_adapter_brings_its_prompt_and_is_never_replaced(flan_t5, data_files, tmp_path):
    common = {"mixed_precision": "no", "max_train_steps": 1}
    first = common | {"source_prefix": "TLDR of: "}
    train_in_process(train_lora, LoraTrainingConfig, flan_t5, data_files, tmp_path / "first", **first)
    more = common | {"adapter_name_or_path": str(tmp_path / "first")}
    train_in_process(train_lora, LoraTrainingConfig, flan_t5, data_files, tmp_path / "more", **more)
    assert json.loads((tmp_path / "more" / "generation_config.json").read_text())["source_prefix"] == "TLDR of: "
    more["overwrite_output_dir"] = True
    with pytest.raises(UserError, match="first is the --adapter_name_or_path: take another folder"):
        train_in_process(train_lora, LoraTrainingConfig, flan_t5, data_files, tmp_path / "first", **more)


def test_a_finished_run_is_not_replaced_by_a_resumed_one(flan_t5, data_files, tmp_path):
    """Which has the same settings and begins from a checkpoint elsewhere."""
    settings = {"mixed_precision": "no", "max_train_steps": 2, "checkpointing_steps": 1}
    for name in ("here", "there"):
        train_in_process(train_full, TrainingConfig, flan_t5, data_files, tmp_path / name, **settings)
    settings["resume_from_checkpoint"] = str(tmp_path / "there" / "checkpoints" / "step_000001")
    with pytest.raises(UserError, match="holds a run already"):
        train_in_process(train_full, TrainingConfig, flan_t5, data_files, tmp_path / "here", **settings)
    assert (tmp_path / "here" / "model.safetensors").exists()
