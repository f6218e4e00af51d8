"""Other models of T5's family, and BART, through the same code: gradient, training, adapter, export, generation."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import read_jsonl, run_script
from gradient_worker import main as save_gradient
from helpers import check_gradient, reset_accelerator_state, train_in_process, write_bart, write_t5
from safetensors.torch import load_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import evaluate_rouge
import train_full
import train_lora
from utils.config import EvaluationConfig, LoraTrainingConfig, TrainingConfig, UserError
from utils.modeling.lora import add_lora
from utils.modeling.shapes import count_parameters
from utils.prompting import build_prompt

TARGETS = {"t5": ["q", "v"], "t5-v1_1": ["q", "v"], "mt5": ["q", "v"], "bart": ["q_proj", "v_proj"]}
KINDS = {"full": (train_full, TrainingConfig), "lora": (train_lora, LoraTrainingConfig)}


@pytest.fixture(scope="module")
def models(make_once) -> dict[str, Path]:
    def fill(folder: Path):
        torch.manual_seed(0)
        write_t5(folder / "t5", T5ForConditionalGeneration, T5Config, True, "relu")
        write_t5(folder / "t5-v1_1", T5ForConditionalGeneration, T5Config, False, "gated-gelu")
        write_t5(folder / "mt5", MT5ForConditionalGeneration, MT5Config, False, "gated-gelu")
        write_bart(folder / "bart")

    folder = make_once("models", fill)
    return {name: folder / name for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_gradient_is_that_of_the_models_own_loss(models, data_files, tmp_path, name):
    AcceleratorState._reset_state(True)
    save_gradient(str(models[name]), str(data_files["train"]), "40", 7, tmp_path / "gradient.pt")
    check_gradient(models[name], torch.load(tmp_path / "gradient.pt", weights_only=True), 1)


@pytest.fixture(scope="module")
def trained(make_once, models, data_files) -> dict[tuple[str, str], Path]:
    """Each model trained fully and with LoRA; that it reads back as it was trained is checked by the export."""

    def fill(folder: Path):
        for name, model in models.items():
            for kind, (script, config_class) in KINDS.items():
                lora = {"lora_target_modules": TARGETS[name], "merge_into": f"{folder}/{name}_merged"}
                settings = {"max_train_steps": 3, "learning_rate": 0.01, "mixed_precision": "no"}
                settings |= {"max_source_length": 250} | (lora if kind == "lora" else {})
                train_in_process(script, config_class, model, data_files, folder / f"{name}_{kind}", **settings)

    folder = make_once("trained", fill)
    return {(name, kind): folder / f"{name}_{kind}" for name in models for kind in (*KINDS, "merged")}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_training(models, trained, name):
    before, after = (load_file(folder / "model.safetensors") for folder in (models[name], trained[name, "full"]))
    assert before.keys() == after.keys()
    # All weights moved, but not BART's bias of the head, which is none.
    assert [key for key in before if before[key].equal(after[key])] == ["final_logits_bias"] * (name == "bart")
    tied = name in ("t5", "bart")
    for kind in ("full", "merged"):
        assert json.loads((trained[name, kind] / "config.json").read_text())["tie_word_embeddings"] is tied
        model = AutoModelForSeq2SeqLM.from_pretrained(trained[name, kind])
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    for kind in KINDS:
        losses = [line["loss"] for line in read_jsonl(trained[name, kind] / "metrics.jsonl")]
        assert losses[-1] < losses[0]


@pytest.mark.slow
def test_generated_texts_are_those_of_stock_generate(models, trained, data_files, tmp_path):
    names = {"_".join(key): folder for key, folder in trained.items()} | models
    words = [f"{name}={folder}" for name, folder in names.items()]
    run = run_script(
        "evaluate_rouge.py", "--models", *words, "--test_file", data_files["test"], "--output_dir", tmp_path,
        "--max_new_tokens", 12, "--max_source_length", 250,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    texts = read_jsonl(tmp_path / "predictions.jsonl")
    for name, folder in names.items():
        model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        for line in (line for line in texts if line["model"] == name):
            prompt = tokenizer(build_prompt(line["dialogue"]), return_tensors="pt")
            output = model.generate(
                input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=12, num_beams=1,
                do_sample=False,
            )  # fmt: skip
            assert line["prediction"] == tokenizer.decode(output[0], skip_special_tokens=True).strip(), name
    assert len(texts) == 4 * len(names)


def test_texts_longer_than_the_model_takes(models, data_files, tmp_path):
    for script, config_class in KINDS.values():
        with pytest.raises(UserError, match="^--max_source_length 257: the model takes 256 tokens at most$"):
            settings = {"max_source_length": 257, "lora_target_modules": TARGETS["bart"]}
            settings = {name: value for name, value in settings.items() if name in config_class.__dataclass_fields__}
            train_in_process(script, config_class, models["bart"], data_files, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    reset_accelerator_state()
    with pytest.raises(UserError, match="^--max_new_tokens 257: the model takes 256 tokens at most$"):
        evaluate_rouge.main(
            EvaluationConfig(
                models=[f"bart={models['bart']}"], test_file=str(data_files["test"]), max_source_length=256,
                max_new_tokens=257, output_dir=str(tmp_path / "report"),
            )
        )  # fmt: skip
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("shape", "num_parameters", "num_lora_parameters"),
    [
        ((512, 64, 6, 1024, 8), 76_961_152, 1_376_256),
        ((768, 64, 12, 2048, 12), 247_577_856, 3_538_944),
        ((1024, 64, 16, 2816, 24), 783_150_080, 9_437_184),
        ((2048, 64, 32, 5120, 24), 2_849_757_184, 18_874_368),
        ((4096, 64, 64, 10240, 24), 11_135_332_352, 37_748_736),
    ],
    ids=["small", "base", "large", "xl", "xxl"],
)
def test_parameters_of_flan_t5(shape, num_parameters, num_lora_parameters):
    """Those of the hub's models, without their memory."""
    names = ("d_model", "d_kv", "num_heads", "d_ff", "num_layers")
    config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **dict(zip(names, shape, strict=True)))
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        assert count_parameters(model) == (num_parameters, num_parameters)
        model = add_lora(model, LoraTrainingConfig())
    assert count_parameters(model) == (num_parameters + num_lora_parameters, num_lora_parameters)
