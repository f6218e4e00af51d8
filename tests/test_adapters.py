"""Adapters that PEFT made by itself: those that merge are merged, learned prefixes stay beside the model."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from families import write_family
from helpers import train_in_process
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

import train_full
import train_lora
from utils.config import EvaluationConfig, LoraTrainingConfig, TrainingConfig, UserError
from utils.generation.decoding import decode_batch
from utils.modeling.loading import load_model, load_tokenizer
from utils.prompting import build_prompt

TARGETS = {"target_modules": ["q", "v"]}
KINDS = {
    "lora": LoraConfig(**TARGETS, r=4, init_lora_weights=False),
    "head": LoraConfig(**TARGETS, r=4, init_lora_weights=False, modules_to_save=["lm_head", "final_layer_norm"]),
    "embedding": LoraConfig(**TARGETS, r=4, init_lora_weights=False, modules_to_save=["shared"]),
    "adalora": AdaLoraConfig(**TARGETS, init_r=4, target_r=2, total_step=10, init_lora_weights=False),
    "ia3": IA3Config(target_modules=["k", "wo"], feedforward_modules=["wo"], init_ia3_weights=False),
    "loha": LoHaConfig(**TARGETS, r=4, init_weights=False),
    "lokr": LoKrConfig(**TARGETS, r=4, init_weights=False),
    "oft": OFTConfig(**TARGETS, oft_block_size=8, init_weights=False),
    "vera": VeraConfig(**TARGETS, r=4, init_weights=False),
    "layer norms": LNTuningConfig(target_modules=["layer_norm"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5),
}
LEARNED_DIRECTLY = ("prompt", "modules_to_save", "ln_tuning")  # their first values would change no text, or hardly


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_family(tmp_path_factory.mktemp("models") / "base", "t5", steep=True)


def write_adapter(folder: Path, base: Path, config: PeftConfig) -> Path:
    torch.manual_seed(1)
    config.task_type = "SEQ_2_SEQ_LM"
    model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(part in name for part in LEARNED_DIRECTLY):
            parameter.data.normal_(std=0.5)
    model.save_pretrained(folder)
    load_tokenizer(str(base)).save_pretrained(folder)
    return folder


QUICK = ("lora", "head", "ia3", "prompt", "prefix")  # one of each way to be loaded


@pytest.mark.parametrize(
    "kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in QUICK)]
)
def test_texts_are_those_of_peft(base, tmp_path, kind):
    folder = write_adapter(tmp_path, base, KINDS[kind])
    tokenizer, stock = load_tokenizer(str(base)), AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    prompts = tokenizer([build_prompt(row["dialogue"]) for row in make_rows(8, seed=3)]).input_ids
    prompts.sort(key=len, reverse=True)

    def decode_stock(model: torch.nn.Module, num_beams: int) -> list[list[int]]:
        settings = {"do_sample": False, "num_beams": num_beams, "max_new_tokens": 12}
        one_by_one = ({"input_ids": torch.tensor([ids])} for ids in prompts)
        mask = [torch.ones(1, len(ids), dtype=torch.long) for ids in prompts]
        texts = [model.generate(**ids, attention_mask=m, **settings) for ids, m in zip(one_by_one, mask, strict=True)]
        return [ids[0, 1:].tolist() for ids in texts]

    model, plain = load_model(str(folder), "sdpa", torch.float32).eval(), decode_stock(stock, 1)
    adapted = PeftModel.from_pretrained(stock, folder).eval()
    assert isinstance(model, PeftModel) == (kind in ("prompt", "p-tuning", "prefix"))
    for num_beams in (1, 3):
        config = EvaluationConfig(max_new_tokens=12, num_beams=num_beams)
        ours, expected = [ids for ids, _ in decode_batch(model, prompts, config)], decode_stock(adapted, num_beams)
        assert ours == expected != plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_missing(base, tmp_path, kind):
    """PEFT would leave it at its first value, with a warning at most."""
    folder = write_adapter(tmp_path / "adapter", base, KINDS[kind])
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[min(weights)]
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"^--model {folder}: "), warnings.catch_warnings(action="error"):
        load_model(str(folder), "sdpa", torch.float32, "model")


def test_what_cannot_be_done(base, data_files, tmp_path):
    tied = write_adapter(tmp_path / "tied", base, LoraConfig(target_modules=["q", "shared"], r=4))
    with pytest.raises(UserError, match=f"^--model {tied}: it adapts shared, which shares its weights with other"):
        load_model(str(tied), "sdpa", torch.float32, "model")
    prefix = write_adapter(tmp_path / "prefix", base, KINDS["prefix"])
    with pytest.raises(UserError, match=f"^--model_name_or_path {prefix}: holds a learned prefix, which cannot be"):
        train_in_process(train_full, TrainingConfig, prefix, data_files, tmp_path / "out")
    several = write_adapter(tmp_path / "several", base, KINDS["prompt"])
    settings = json.loads((several / "adapter_config.json").read_text())
    settings |= {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2}
    (several / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"^--model {several}: its prompts are for several tasks, and a dialogue has"):
        load_model(str(several), "sdpa", torch.float32, "model")
    itself = write_adapter(tmp_path / "itself", base, KINDS["lora"])
    settings = json.loads((itself / "adapter_config.json").read_text())
    (itself / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(itself)}))
    with pytest.raises(UserError, match=f"^--model {itself}: adapter_config.json names the adapter's own folder"):
        load_model(str(itself), "sdpa", torch.float32, "model")
    more = write_adapter(tmp_path / "more", base, KINDS["head"])
    with pytest.raises(UserError, match=f"^--adapter_name_or_path {more}: it also holds all of .*lm_head.*, which"):
        train_in_process(
            train_lora, LoraTrainingConfig, base, data_files, tmp_path / "out", adapter_name_or_path=str(more)
        )
    assert not (tmp_path / "out").exists()
