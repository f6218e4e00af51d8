"""CTranslate2 writes what transformers writes, converts a model once, and says in one line what it cannot do."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import HF_HOME, REPOSITORY, make_rows, read_jsonl, run_script
from generation_worker import load_dialogues, write_unsure_model
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

from utils.config import EvaluationConfig
from utils.ctranslate import load_translator
from utils.generation import generate_summaries
from utils.modeling import load_model, load_tokenizer

pytest.importorskip("ctranslate2", reason="the optional package of requirements-ctranslate2.txt is not installed")


@pytest.fixture(scope="module")
def unsure_model(tmp_path_factory) -> Path:
    return write_unsure_model(tmp_path_factory.mktemp("unsure"))


def generate(folder: Path, backend: str, dialogues: list[str], **settings):
    defaults = {"max_new_tokens": 12, "generation_backend": backend, "output_dir": f"{folder}/texts"}
    config = EvaluationConfig(**(defaults | settings))
    model, tokenizer = load_model(str(folder), "sdpa", torch.float32), load_tokenizer(str(folder))
    return generate_summaries(Accelerator(), model, tokenizer, dialogues, config, "model", str(folder), {})


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"num_beams": 4, "length_penalty": 0.0}])
def test_the_same_texts_as_transformers(unsure_model, settings):
    dialogues = load_dialogues()
    expected = generate(unsure_model, "transformers", dialogues, **settings)
    assert len({text for text, _ in expected}) > 6 and any(cut for _, cut in expected)
    assert generate(unsure_model, "ctranslate2", dialogues, **settings) == expected


@pytest.mark.parametrize("kind", ["mt5", "umt5"])
def test_the_same_texts_of_other_models_of_the_family(tmp_path, kind):
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "demo" / "model")
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model(
            kind, vocab_size=len(tokenizer) + 5, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():  # as they are made at first, all texts are one
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    dialogues = [row["dialogue"] for row in make_rows(6)]
    expected = generate(tmp_path, "transformers", dialogues)
    assert len(set(expected)) > 3
    assert generate(tmp_path, "ctranslate2", dialogues) == expected


def test_a_model_is_converted_once_and_again_when_it_changes(unsure_model, tmp_path):
    folder = shutil.copytree(unsure_model, tmp_path / "model", ignore=shutil.ignore_patterns("ctranslate2", "texts"))
    words = [
        "evaluate_rouge.py", "--demo", "--generation_backend", "ctranslate2", "--models", f"a={folder}",
        "--max_eval_samples", 6, "--max_new_tokens", 8, "--overwrite_output_dir", "--output_dir", tmp_path / "report",
    ]  # fmt: skip
    converted = []
    for compute_type in ("float32", "int8", "float32"):
        if len(converted) == 2:
            model = load_model(str(folder), "sdpa", torch.float32)
            with torch.no_grad():
                model.shared.weight[7] += 0.001
            model.save_pretrained(folder)
        run = run_script(*words, "--ctranslate2_compute_type", compute_type, num_processes=1 + len(converted) // 2)
        assert run.returncode == 0, run.stderr
        converted.append({path.name: path.stat().st_ctime_ns for path in (folder / "ctranslate2").iterdir()})
        assert len([row for row in read_jsonl(tmp_path / "report" / "predictions.jsonl") if row["model"] == "a"]) == 2
    assert len(converted[0]) == 1 and converted[1] == converted[0]
    assert len(converted[2]) == 2 and converted[2].items() > converted[0].items()


def test_a_model_of_the_hub_is_converted_into_its_cache(unsure_model):
    model, tokenizer = load_model(str(unsure_model), "sdpa", torch.float32), load_tokenizer(str(unsure_model))
    config = EvaluationConfig(generation_backend="ctranslate2")
    load_translator(Accelerator(), model, tokenizer, "someone/unsure", "0123456789abcdef" * 4, config)
    assert (Path(HF_HUB_CACHE) / "ctranslate2" / "0123456789abcdef" / "model.bin").is_file()
    assert str(HF_HUB_CACHE).startswith(HF_HOME.name)


def test_what_cannot_be_is_said_in_one_line(flan_t5, data_files, tmp_path):
    def run(*words, model=flan_t5, code="import runpy, sys; del sys.argv[0]"):
        command = [
            sys.executable, "-c", f"{code}; runpy.run_path(sys.argv[0], run_name='__main__')", "evaluate_rouge.py",
            "--generation_backend", "ctranslate2", "--models", f"a={model}", "--test_file", data_files["test"],
            "--output_dir", tmp_path / "out", *words,
        ]  # fmt: skip
        finished = subprocess.run(map(str, command), cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
        errors = [line for line in finished.stderr.splitlines() if line.startswith("evaluate_rouge.py: error: ")]
        assert finished.returncode == 2 and len(errors) == 1 and "Traceback" not in finished.stderr, finished.stderr
        assert not (tmp_path / "out").exists()
        return errors[0]

    missing = run(code="import runpy, sys; del sys.argv[0]; sys.modules['ctranslate2'] = None")
    assert "not installed; pip install -r requirements-ctranslate2.txt" in missing
    assert "--ctranslate2_compute_type float16: this device has only float32" in run(
        "--ctranslate2_compute_type", "float16"
    )
    tokenizer = AutoTokenizer.from_pretrained(flan_t5)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    assert "a bart model, only t5, mt5, umt5; use transformers" in run(model=tmp_path / "bart")
