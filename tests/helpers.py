"""What several files of tests use: models of other families, a script or a training in this process, gradients and
logits, peaks of memory."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import REPOSITORY, launch, make_rows, read_jsonl, relative_difference
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    T5Tokenizer,
)

import evaluate_rouge
import train_full
import train_lora
import utils.launch.script
from utils.config import EvaluationConfig, LoraTrainingConfig, TrainingConfig
from utils.launch.script import run_script
from utils.prompting import build_prompt

SCRIPTS = {
    "train_full": (train_full.main, TrainingConfig),
    "train_lora": (train_lora.main, LoraTrainingConfig),
    "evaluate_rouge": (evaluate_rouge.main, EvaluationConfig),
}
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json"]
RECORDS = ["loss_curve.png", "metrics.jsonl", "run_manifest.json"]
MODEL_FILES = [*TOKENIZER_FILES, "generation_config.json", "README.md"]
FULL_FILES = [*RECORDS, *MODEL_FILES, "config.json", "model.safetensors"]


def write_t5(folder: Path, model_class, config_class, tied: bool, activation: str):
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "demo" / "model")
    config = config_class(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, dropout_rate=0.1,
        feed_forward_proj=activation, decoder_start_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = model_class(config)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * config.d_model**-0.5)
        model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_bart(folder: Path):
    """With a tokenizer of BART's kind, a bias of the head, and generation settings as bart-large-cnn has them."""
    texts = [text for row in make_rows(40) for text in (build_prompt(row["dialogue"]), row["summary"])]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, 400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    folder.mkdir()
    tokenizer = BartTokenizer(*trained.save_model(str(folder)))
    for path in folder.iterdir():
        path.unlink()
    layers = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, max_position_embeddings=256, scale_embedding=True, init_std=0.2,
        **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in layers.items()},
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    settings = {"forced_bos_token_id": 0, "forced_eos_token_id": 2, "num_beams": 4, "no_repeat_ngram_size": 3}
    model.generation_config.update(**settings, min_length=4, max_length=20, early_stopping=True, length_penalty=2.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_t5_tokenizer() -> T5Tokenizer:
    """Of T5's class, with its 100 tokens that stand for left out text."""
    demo = json.loads((REPOSITORY / "demo" / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    return T5Tokenizer(vocab=[tuple(piece) for piece in demo["model"]["vocab"]])


def plain_gradient(model_path, rows):
    """The reference: transformers' own mean loss over one padded batch, no part of this project but the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_path).eval()
    inputs = tokenizer([build_prompt(row["dialogue"]) for row in rows], padding=True, return_tensors="pt")
    labels = tokenizer([row["summary"] for row in rows], padding=True, return_tensors="pt").input_ids
    labels[labels == tokenizer.pad_token_id] = -100
    model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_gradient(model_path, saved, num_processes):
    assert saved["num_processes"] == num_processes
    # Rounding alone: 1.7e-7 to 2.7e-7 was measured.
    assert relative_difference(saved["gradients"], plain_gradient(model_path, make_rows(40))) < 1e-6


def start(script: str, *words: str | Path):
    """The script's entry point, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        patch.setenv("ACCELERATE_USE_CPU", "true")
        # This process keeps running, and obeys signals.
        patch.setattr(utils.launch.script, "leave_process_group", lambda: None)
        reset_accelerator_state()
        try:
            run_script(*SCRIPTS[script], f"{script}.yaml")
        finally:
            reset_accelerator_state()


def reset_accelerator_state():
    """Accelerate allows one precision per process, which is that of a script and not of the tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train_in_process(script, config_class, flan_t5, data_files, output_dir, **settings):
    """Run a script's main here; returns its lines of metrics by split."""
    common = {
        "model_name_or_path": str(flan_t5), "train_file": str(data_files["train"]),
        "validation_file": str(data_files["validation"]), "output_dir": str(output_dir), "total_train_batch_size": 8,
        "per_device_train_batch_size": 4, "logging_steps": 2, "eval_steps": 3,
    }  # fmt: skip
    AcceleratorState._reset_state(True)
    script.main(config_class(**(common | settings)))
    lines = read_jsonl(output_dir / "metrics.jsonl")
    return {split: [line for line in lines if line["split"] == split] for split in ("train", "validation")}


def read_bytes(screen: str, name: str) -> float:
    """A line of what --preflight prints."""
    number, unit = re.search(rf"^  {name} +([\d.,]+) (GB|MB)$", screen, flags=re.MULTILINE).groups()
    return float(number.replace(",", "")) * {"GB": 1e9, "MB": 1e6}[unit]


def estimate_and_measure_peak(strategy: str, command: list, folder: Path, timeout: int = 300) -> tuple[float, float]:
    """Bytes of a training: the highest peak that --preflight estimates, and what its main process takes."""
    preflight = launch(strategy, *command, "--preflight", lowered=False, timeout=timeout)
    assert preflight.returncode == 0, preflight.stderr
    moments = ["a gradient being computed, the sum", "validation, a checkpoint being written", "the export"]
    moments += ["the merge"] * ("--merge_into" in command)
    estimate = max(read_bytes(preflight.stdout, name) for name in moments)
    run = launch(strategy, "tests/peak_memory_worker.py", folder, *command, lowered=False, timeout=timeout)
    assert run.returncode == 0, run.stderr
    return estimate, float((folder / "peak_0.txt").read_text())


def read_record(output_dir: Path) -> list[tuple]:
    """What metrics.jsonl says, but for times."""
    lines = read_jsonl(output_dir / "metrics.jsonl")
    return [(line["step"], line["split"], line["loss"], line.get("grad_norm")) for line in lines]


def compute_logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = make_rows(3, seed=9)
    inputs = tokenizer([build_prompt(row["dialogue"]) for row in rows], return_tensors="pt", padding=True)
    labels = tokenizer([row["summary"] for row in rows], return_tensors="pt", padding=True).input_ids
    with torch.no_grad():
        return model.eval()(**inputs, labels=labels).logits
