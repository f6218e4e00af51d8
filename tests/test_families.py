"""Every family of AutoModelForSeq2SeqLM: the table in utils/README.md is what is found here."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, make_rows, relative_difference
from families import NUM_TOKENS, SHAPES, decode_here_and_there, find_targets, write_family
from gradient_worker import main as save_gradient
from helpers import train_in_process
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

import train_full
import train_lora
from utils.config import LoraTrainingConfig, TrainingConfig, UserError
from utils.data.batching import collate
from utils.data.prefetch import move_batch
from utils.execution.passes import find_unused
from utils.modeling.families import check_trainable, has_tied_head
from utils.modeling.loading import load_model
from utils.prompting import build_prompt
from utils.training.step import compute_target_logits

FAMILIES = {config_class.model_type for config_class in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING}
README = (REPOSITORY / "utils" / "README.md").read_text(encoding="utf-8")
# One for each way to differ from T5 and BART: no method that shifts targets; eager attention; a merged attention, and
# weights stored under other names; a head tied to the decoder's embedding; a head that is an embedding.
DIFFERENT = ["m2m_100", "led", "t5gemma2", "t5gemma", "fsmt"]


def stock_gradient(folder: Path) -> dict[str, torch.Tensor | None]:
    """Of transformers' own loss on one padded batch."""
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), make_rows(40)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    inputs = tokenizer([build_prompt(row["dialogue"]) for row in rows], padding=True, return_tensors="pt")
    labels = tokenizer([row["summary"] for row in rows], padding=True, return_tensors="pt").input_ids
    labels[labels == tokenizer.pad_token_id] = -100
    given = {}
    if model.config.model_type == "fsmt":  # which by itself would shift the source instead
        given = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels.clone())}
    model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels, **given).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_gradient(folder: Path, data_files: dict[str, Path], tmp_path: Path) -> dict[str, torch.Tensor]:
    """Those that there are, by the weight's name."""
    AcceleratorState._reset_state(True)
    save_gradient(str(folder), str(data_files["train"]), "40", 7, tmp_path / "gradient.pt")
    ours, stock = torch.load(tmp_path / "gradient.pt", weights_only=True)["gradients"], stock_gradient(folder)
    used = {name for name, gradient in stock.items() if gradient is not None}
    assert {name for name, gradient in ours.items() if gradient is not None} == used
    stock = {name: stock[name] for name in used}
    assert relative_difference(ours, stock) < 1e-6
    return stock


def check_decoding(folder: Path):
    texts = {}
    for num_beams in (1, 3):
        here, texts[num_beams] = decode_here_and_there(folder, num_beams=num_beams)
        assert here == texts[num_beams]
    several = [len({str(ids) for ids in texts[num_beams]}) > 3 for num_beams in texts]
    lengths = {len(ids) for by_prompt in texts.values() for ids in by_prompt}
    assert all(several) and len(lengths) > 1, "texts that prove nothing"


def find_moved(before: PreTrainedModel, folder: Path) -> set[str]:
    after = dict(AutoModelForSeq2SeqLM.from_pretrained(folder).named_parameters())
    return {name for name, parameter in before.named_parameters() if not parameter.equal(after[name])}


def check_trainings(folder: Path, data_files: dict[str, Path], tmp_path: Path, gradients: dict[str, torch.Tensor]):
    """Three updates move what they should, and nothing else. That all reads back as it was is the export's check."""
    common = {"max_train_steps": 3, "learning_rate": 0.01, "mixed_precision": "no", "max_source_length": 250}
    before = AutoModelForSeq2SeqLM.from_pretrained(folder)
    train_in_process(train_full, TrainingConfig, folder, data_files, tmp_path / "full", **common)
    moved = find_moved(before, tmp_path / "full")
    assert {name for name, gradient in gradients.items() if gradient.any()} <= moved <= gradients.keys()
    targets = find_targets(before)
    common |= {"lora_target_modules": targets, "merge_into": str(tmp_path / "merged")}
    train_in_process(train_lora, LoraTrainingConfig, folder, data_files, tmp_path / "lora", **common)
    moved = find_moved(before, tmp_path / "merged")
    assert moved == {name for name in gradients if name.split(".")[-2] in targets and name.endswith(".weight")}
    for kind in ("full", "merged"):
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert config.get("tie_word_embeddings", True) == has_tied_head(before)
    # A merged model is saved as a full one is; a family of each kind shows it.
    for kind in ("full", "merged") if before.config.model_type in DIFFERENT else ("full",):
        here, there = decode_here_and_there(tmp_path / kind, num_dialogues=2)
        assert here == there


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_a_family(family, data_files, tmp_path):
    """Gradient, three updates in full and with LoRA, export, greedy texts and beams; or one line that says why not."""
    if family not in DIFFERENT:  # whose texts the next test compares
        check_decoding(write_family(tmp_path / "steep", family, steep=True))
    folder = write_family(tmp_path / "gentle", family)
    model = load_model(str(folder), "sdpa", torch.float32)
    assert has_tied_head(load_model(str(folder), "sdpa", torch.float32, without_weights=True)) == has_tied_head(model)
    works, why_not = "training, decoding", ""
    try:
        check_trainable(model, "")
        check_trainings(folder, data_files, tmp_path, check_gradient(folder, data_files, tmp_path))
    except UserError as error:
        works, why_not = "decoding", str(error).removeprefix(": ")
    row = f"| {family} | {model.config._attn_implementation} | {works} | {why_not} |".replace("  ", " ")
    assert f"\n{row}\n" in README, row


@pytest.mark.parametrize(
    "family", [*DIFFERENT[:3], *(pytest.param(family, marks=pytest.mark.slow) for family in DIFFERENT[3:])]
)
def test_gradient_and_texts_are_those_of_the_model_itself(family, data_files, tmp_path):
    check_gradient(write_family(tmp_path / "gentle", family), data_files, tmp_path)
    check_decoding(write_family(tmp_path / "steep", family, steep=True))


@pytest.mark.parametrize("family", sorted(FAMILIES - SHAPES.keys()))
def test_a_family_that_reads_no_text(family, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: {family} is not an encoder-decoder model$"):
        load_model(str(tmp_path), "sdpa", torch.float32)
    assert f"`{family}`" in README


def test_the_table_has_every_family():
    table = README.partition("| family |")[2].partition("\n\n")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert rows == sorted(SHAPES) and SHAPES.keys() <= FAMILIES


def test_an_empty_micro_batch(tmp_path):
    """What a process gets that has no example in a turn. mBART turns each target by its end, and there is none."""
    for family in ("mbart", "t5"):
        model = load_model(str(write_family(tmp_path / family, family)), "sdpa", torch.float32)
        batch = move_batch(collate(pa.table({"input_ids": [], "labels": []}), 0), model, torch.device("cpu"))
        logits = compute_target_logits(Accelerator(cpu=True), model, batch)
        assert logits.shape == (0, NUM_TOKENS)
        logits.sum().backward()
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_weights_that_no_target_depends_on(tmp_path):
    """DDP is told of them; all others would wait for them."""
    for family, names in (("t5", set()), ("led", {"query_global", "key_global", "value_global"})):
        model = load_model(str(write_family(tmp_path / family, family)), "sdpa", torch.float32)
        unused = set(map(id, find_unused(Accelerator(cpu=True), model)))
        assert {name.split(".")[-2] for name, p in model.named_parameters() if id(p) in unused} == names


def test_sparse_attention_that_depends_on_padding_is_not_used(tmp_path):
    """BigBird's, which would make a text depend on the batch that it is in."""
    sparse = write_family(tmp_path / "sparse", "bigbird_pegasus", steep=True, block_size=4, num_random_blocks=1)
    here, there = decode_here_and_there(sparse)
    config = json.loads((sparse / "config.json").read_text())
    (sparse / "config.json").write_text(json.dumps(config | {"attention_type": "original_full"}))
    assert here != there and here == decode_here_and_there(sparse)[1]


def test_a_loss_of_more_parts(tmp_path):
    folder = write_family(tmp_path, "switch_transformers", output_router_logits=True)
    with pytest.raises(UserError, match="^here: output_router_logits in its config.json adds losses"):
        check_trainable(load_model(str(folder), "sdpa", torch.float32), "here")
