"""LoRA variants: exact where a number can be stated, read back, resumed bit-identically; merged into a full model."""

import json
import logging
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from conftest import check_near, launch, write_flan_t5
from helpers import FULL_FILES, RECORDS, compute_logits, train_in_process
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

import train_lora
import utils.modeling.lora
from utils.config import LoraTrainingConfig, UserError
from utils.modeling.families import record_head
from utils.modeling.loading import load_model
from utils.modeling.lora import add_lora, check_4bit, load_frozen_base
from utils.modeling.shapes import count_parameters, count_saved_by_4bit
from utils.training.checkpoint_files import fingerprint_model
from utils.training.optimization import build_lr_scheduler, build_optimizer
from utils.training.resources.memory_estimate import count_bytes

VARIANTS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "loraplus": {"loraplus_lr_ratio": 16.0},
    "all": {"use_rslora": True, "use_dora": True, "loraplus_lr_ratio": 4.0},
}
NUM_MODULES = 12  # q and v of 2 encoder layers, and of 2 attentions in 2 decoder layers, each of 32 to 32


def train(model: Path, data_files: dict, output_dir: Path, **settings) -> dict[str, list[dict]]:
    common = {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 0.01}
    return train_in_process(train_lora, LoraTrainingConfig, model, data_files, output_dir, **(common | settings))


@pytest.fixture(scope="module")
def finished(flan_t5, data_files, tmp_path_factory) -> dict[str, Path]:
    """Of each variant the folder of a finished run; what it merged is beside it."""
    folder = tmp_path_factory.mktemp("variants")
    for name, variant in VARIANTS.items():
        train(flan_t5, data_files, folder / name, **variant, merge_into=str(folder / f"{name}_merged"))
    return {name: folder / name for name in VARIANTS}


def merged(output_dir: Path) -> Path:
    return output_dir.with_name(f"{output_dir.name}_merged")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_saved(finished, flan_t5, name):
    variant = VARIANTS[name]
    config = json.loads((finished[name] / "adapter_config.json").read_text())
    assert config["use_rslora"] is variant.get("use_rslora", False)
    assert config["use_dora"] is variant.get("use_dora", False)
    tensors = load_file(finished[name] / "adapter_model.safetensors")
    kinds = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * config["use_dora"]
    assert sorted(key.split(".")[-2] for key in tensors) == sorted(kinds * NUM_MODULES)
    num_trained = NUM_MODULES * 32 * (32 + 32 + config["use_dora"])  # A, B, and a length for each row
    assert sum(tensor.numel() for tensor in tensors.values()) == num_trained
    manifest = json.loads((finished[name] / "run_manifest.json").read_text())
    assert manifest["num_trainable_parameters"] == num_trained
    base = load_file(flan_t5 / "model.safetensors")
    for key, tensor in tensors.items():
        if "magnitude" in key:
            weight = base[key.removeprefix("base_model.model.").replace("lora_magnitude_vector.", "")]
            # From the lengths of the base's rows, rounded to bf16, by 4 updates of at most 0.01 to 0.04.
            assert 1e-3 < (tensor - weight.norm(dim=1)).abs().max() < 0.2
    losses = [json.loads(line)["loss"] for line in (finished[name] / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_reads_back_with_stock_libraries(finished, flan_t5, name):
    stock, report = AutoModelForSeq2SeqLM.from_pretrained(finished[name], output_loading_info=True)
    assert not any(report.values()), report
    base = AutoModelForSeq2SeqLM.from_pretrained(flan_t5)
    before = compute_logits(base, finished[name])
    with_peft = compute_logits(PeftModel.from_pretrained(base, finished[name]), finished[name])
    assert torch.equal(compute_logits(stock, finished[name]), with_peft)
    assert (with_peft - before).abs().max() > 1e-2
    # The merged model: its files, its head, its logits.
    names = {path.name for path in merged(finished[name]).iterdir()}
    assert names == (set(FULL_FILES) - set(RECORDS)) | {"merged_from.json"}
    assert json.loads((merged(finished[name]) / "config.json").read_text())["tie_word_embeddings"] is False
    one, report = AutoModelForSeq2SeqLM.from_pretrained(merged(finished[name]), output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(
        compute_logits(one, merged(finished[name])), with_peft, rtol=0, atol=2e-6 * with_peft.abs().max()
    )


def test_merged_weights_are_the_bases_own_and_the_product(finished, flan_t5):
    """In fp32, though the base was trained on in bf16."""
    base, after = (load_file(folder / "model.safetensors") for folder in (flan_t5, merged(finished["rslora"])))
    adapter = load_file(finished["rslora"] / "adapter_model.safetensors")
    assert base.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.float32}
    for name, tensor in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            product = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            torch.testing.assert_close(after[name], tensor + 32 / math.sqrt(32) * product, rtol=0, atol=1e-6)
        else:
            assert torch.equal(after[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_is_uninterrupted(finished, flan_t5, data_files, tmp_path, name):
    output_dir = tmp_path / name
    shutil.copytree(finished[name] / "checkpoints" / "step_000002", output_dir / "checkpoints" / "step_000002")
    settings = VARIANTS[name] | {"resume_from_checkpoint": "latest", "merge_into": str(merged(output_dir))}
    train(flan_t5, data_files, output_dir, **settings)
    for ours, expected in ((output_dir, finished[name]), (merged(output_dir), merged(finished[name]))):
        weights = "adapter_model.safetensors" if ours == output_dir else "model.safetensors"
        assert (ours / weights).read_bytes() == (expected / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_a_base_that_is_stored_in_16_bits(flan_t5, data_files, tmp_path, dtype, precision):
    """The adapter is exported in fp32, as it was trained; the merged model is the sum of the two in fp32."""
    base = AutoModelForSeq2SeqLM.from_pretrained(flan_t5)
    record_head(base.to(dtype)).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(flan_t5).save_pretrained(tmp_path / "base")
    folders = {"merge_into": str(tmp_path / "merged"), "mixed_precision": precision}
    train(tmp_path / "base", data_files, tmp_path / "out", **folders)
    adapter, stored, merged = (
        load_file(path)
        for path in (tmp_path / "out" / "adapter_model.safetensors",
                     tmp_path / "base" / "model.safetensors",
                     tmp_path / "merged" / "model.safetensors")
    )  # fmt: skip
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert {tensor.dtype for tensor in (adapter | merged).values()} == {torch.float32}
    stem = "decoder.block.1.layer.1.EncDecAttention.q"
    product = adapter[f"base_model.model.{stem}.lora_B.weight"] @ adapter[f"base_model.model.{stem}.lora_A.weight"]
    difference = merged[f"{stem}.weight"] - stored[f"{stem}.weight"].float()
    torch.testing.assert_close(difference, product, rtol=0, atol=1e-6)
    # What evaluation loads answers as the merged model does.
    together, alone = (load_model(str(tmp_path / name), "sdpa", torch.float32).eval() for name in ("out", "merged"))
    expected = compute_logits(alone, tmp_path / "out")
    torch.testing.assert_close(
        compute_logits(together, tmp_path / "out"), expected, rtol=0, atol=2e-6 * expected.abs().max()
    )


@pytest.mark.parametrize(
    ("name", "value"), [("use_rslora", False), ("use_dora", False), ("loraplus_lr_ratio", 5.0), ("load_in_4bit", True)]
)
def test_another_variant_is_another_run(finished, flan_t5, data_files, monkeypatch, name, value):
    monkeypatch.setattr(
        train_lora, "load_frozen_base", lambda *_: load_model(str(flan_t5), "sdpa", torch.bfloat16)
    )  # without 4 bits, which need a GPU
    settings = VARIANTS["all"] | {name: value, "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match=f"it is of another run: {name} was"):
        train(flan_t5, data_files, finished["all"], **settings)


def test_a_finished_run_is_merged_afterwards(finished, flan_t5, data_files, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "merged" / "export.unchecked").mkdir(parents=True)  # left by a kill
    settings = {"resume_from_checkpoint": "latest", "merge_into": str(tmp_path / "merged")}
    train(flan_t5, data_files, finished["dora"], **VARIANTS["dora"], **settings)
    assert not [record for record in caplog.messages if "train loss" in record]
    difference = next(float(text.split()[-4]) for text in caplog.messages if text.startswith("merged base and"))
    assert 0 < difference < 2e-6
    weights = [folder / "model.safetensors" for folder in (tmp_path / "merged", merged(finished["dora"]))]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_scaling_of_rslora(flan_t5):
    config = LoraTrainingConfig(lora_r=16, lora_alpha=8, use_rslora=True)
    model = add_lora(load_model(str(flan_t5), "sdpa", torch.float32), config)
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {8 / math.sqrt(16)}


def test_parameters_of_dora_on_flan_t5_base():
    shape = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 2048, "num_layers": 12}
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**shape, feed_forward_proj="gated-gelu"))
        model = add_lora(model, LoraTrainingConfig(use_dora=True))
    assert count_parameters(model)[1] == 3_538_944 + 72 * 768  # LoRA's and a length for each row of 72 matrices


def test_learning_rates_of_loraplus(flan_t5):
    config = LoraTrainingConfig(loraplus_lr_ratio=16.0, learning_rate=2e-3, weight_decay=0.5, use_dora=True)
    model = add_lora(load_model(str(flan_t5), "sdpa", torch.float32), config)
    kinds = {id(parameter): name.split(".")[-3] for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    lr_scheduler = build_lr_scheduler(optimizer, config, 4)

    def describe():
        """{kind: (learning rate, weight decay)}; DoRA's lengths belong to B for PEFT, and are no matrices."""
        found = {}
        for group in optimizer.param_groups:
            for kind in {kinds[id(parameter)] for parameter in group["params"]}:
                assert kind not in found and group["fused"]
                found[kind] = (group["lr"], group["weight_decay"])
        return found

    assert describe() == {"lora_A": (2e-3, 0.5), "lora_B": (32e-3, 0.5), "lora_magnitude_vector": (32e-3, 0.0)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3 * NUM_MODULES
    for _ in range(2):
        optimizer.step()
        lr_scheduler.step()
    assert describe() == {"lora_A": (1e-3, 0.5), "lora_B": (16e-3, 0.5), "lora_magnitude_vector": (16e-3, 0.0)}


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_first_update_of_loraplus(flan_t5, data_files, tmp_path, ratio):
    """AdamW's first update moves what has a gradient by the learning rate, and B is 0 before."""
    train(flan_t5, data_files, tmp_path, max_train_steps=1, learning_rate=1e-3, loraplus_lr_ratio=ratio)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    moved = torch.cat([tensor.abs().flatten() for name, tensor in tensors.items() if "lora_B" in name])
    assert float(moved.median()) == pytest.approx(1e-3 * (ratio or 1), rel=1e-3)


def test_the_fingerprint_is_of_the_base_alone(flan_t5):
    model = add_lora(load_model(str(flan_t5), "sdpa", torch.float32), LoraTrainingConfig(use_dora=True))
    before = fingerprint_model(model, with_adapter=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    assert fingerprint_model(model, with_adapter=False) == before
    model.get_input_embeddings().weight.data[0, 0] += 1
    assert fingerprint_model(model, with_adapter=False) != before


def test_a_merge_that_changes_the_model_is_refused(data_files, tmp_path):
    """The old T5's head is its embedding: merged into the one, the adapter is in the other too."""
    tied = write_flan_t5(tmp_path / "untied")
    model = AutoModelForSeq2SeqLM.from_pretrained(tied)
    model.lm_head.weight = model.shared.weight
    model.config.tie_word_embeddings = True
    model.save_pretrained(tied)
    settings = {"lora_target_modules": ["lm_head"], "merge_into": str(tmp_path / "merged"), "learning_rate": 0.1}
    with pytest.raises(UserError, match="nothing written: the merged model's logits differ .* holds the adapter"):
        train(tied, data_files, tmp_path / "out", **settings)
    assert not (tmp_path / "merged").exists() and (tmp_path / "out" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("", "is empty"),
        ("out", "is or holds the --output_dir"),
        ("model", "is or holds the --model_name_or_path"),
        ("held", "holds a run or a model already (config.json): take another, or --overwrite_output_dir"),
        ("file", "cannot write to"),
        ("file/below", "cannot write to"),
    ],
)
def test_where_nothing_can_be_merged_into(data_files, flan_t5, tmp_path, where, expected):
    """Said before anything is written."""
    (tmp_path / "model").symlink_to(flan_t5)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as refused:
        train(flan_t5, data_files, tmp_path / "out", merge_into=str(tmp_path / where) if where else "")
    assert str(refused.value).startswith("--merge_into") and expected in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "held", "model"]


def test_a_model_that_may_be_replaced(finished, data_files, flan_t5, tmp_path):
    """All of it goes, so that nothing takes the merged model for an adapter; other people's files stay."""
    for name in ("adapter_config.json", "model-00001-of-00002.safetensors", "notes.txt"):
        (tmp_path / name).write_text("{}")
    settings = {"resume_from_checkpoint": "latest", "merge_into": str(tmp_path), "overwrite_output_dir": True}
    train(flan_t5, data_files, finished["rslora"], **VARIANTS["rslora"], **settings)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == (set(FULL_FILES) - set(RECORDS)) | {"notes.txt", "merged_from.json"}


def test_the_same_command_merges_again(flan_t5, data_files, tmp_path, monkeypatch):
    """A run that was killed after its merge, or in its middle, is resumed; another run's merged model is refused."""
    settings = {"resume_from_checkpoint": "latest", "merge_into": str(tmp_path / "merged")}
    with monkeypatch.context() as patch:
        patch.setattr(train_lora, "finish_run", lambda *arguments: sys.exit(9))
        with pytest.raises(SystemExit):
            train(flan_t5, data_files, tmp_path / "out", **settings)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    for missing in ((), ("config.json", "tokenizer.json")):  # which are moved last
        for name in missing:
            (tmp_path / "merged" / name).unlink()
        train(flan_t5, data_files, tmp_path / "out", **settings)
        (tmp_path / "merged" / "README.md").unlink()  # the last to be written
        assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == whole
    with pytest.raises(UserError, match="--merge_into .* holds a run or a model already"):
        train(flan_t5, data_files, tmp_path / "other", **settings)


def test_four_bits_are_refused_where_they_cannot_be(monkeypatch):
    on_gpu = {"device": torch.device("cuda"), "distributed_type": DistributedType.NO}
    with pytest.raises(UserError, match="^--load_in_4bit needs a GPU, and there is none; leave it out$"):
        check_4bit(SimpleNamespace(**on_gpu | {"device": torch.device("cpu")}), LoraTrainingConfig())
    monkeypatch.setattr(utils.modeling.lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="bitsandbytes is not installed; pip install -r requirements-4bit.txt"):
        check_4bit(SimpleNamespace(**on_gpu), LoraTrainingConfig())
    for strategy in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        with pytest.raises(UserError, match=f"{strategy.value} cannot shard 4-bit weights"):
            check_4bit(SimpleNamespace(**on_gpu | {"distributed_type": strategy}), LoraTrainingConfig())
    with pytest.raises(UserError, match="--load_in_4bit computes in bf16: leave --mixed_precision at bf16"):
        LoraTrainingConfig(load_in_4bit=True, mixed_precision="no")
    with pytest.raises(UserError, match="--loraplus_lr_ratio must be at least 1, got 0.5"):
        LoraTrainingConfig(loraplus_lr_ratio=0.5)


def test_rouge_while_training_in_bf16(data_files, tmp_path):
    """Summaries are made outside the forward that Accelerate puts under autocast."""
    model = write_flan_t5(tmp_path / "model")
    settings = {"max_train_steps": 1, "mixed_precision": "bf16", "metric_for_best_model": "rouge1"}
    metrics = train(model, data_files, tmp_path / "out", **settings)
    assert metrics["validation"][-1]["rouge1"] >= 0


def test_four_bits(data_files, tmp_path, monkeypatch):
    """All but the GPU: bitsandbytes computes on a CPU too, in multiples of 64."""
    pytest.importorskip("bitsandbytes", reason="the optional package of requirements-4bit.txt is not installed")
    model = write_flan_t5(tmp_path / "model", d_model=64, d_kv=16, d_ff=128)
    monkeypatch.setattr(utils.modeling.lora, "check_4bit", lambda accelerator, config: None)
    # Without validation: on a CPU a pass without gradients packs the weights for good, and none flow from then on.
    settings = {"load_in_4bit": True, "validation_file": None}
    metrics = train(model, data_files, tmp_path / "out", **settings, merge_into=str(tmp_path / "merged"))
    assert metrics["train"][-1]["loss"] < metrics["train"][0]["loss"] and metrics["train"][0]["grad_norm"] > 0
    manifest = json.loads((tmp_path / "out" / "run_manifest.json").read_text())
    num_base = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert manifest["num_parameters"] - manifest["num_trainable_parameters"] == num_base  # not of packed bytes

    settings |= {"model_name_or_path": str(model)}
    packed, shapes = (
        load_frozen_base(Accelerator(cpu=True), LoraTrainingConfig(**settings, preflight=preflight))
        for preflight in (False, True)
    )
    scales = sum(p.quant_state.absmax.nbytes for p in packed.parameters() if getattr(p, "quant_state", None))
    assert count_bytes(packed)[0] + scales == count_bytes(shapes)[0] - count_saved_by_4bit(shapes)

    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "out" / "checkpoints" / "step_000002", resumed / "checkpoints" / "step_000002")
    train(model, data_files, resumed, **settings, resume_from_checkpoint="latest")
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "out", resumed)]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def without_dropout(data_files, tmp_path_factory) -> tuple[list, Path]:
    """Words of a run that the strategies share, and the folder of what it left on one process."""
    folder = tmp_path_factory.mktemp("strategies")
    model = write_flan_t5(folder / "model", dropout_rate=0.0)
    words = [
        "train_lora.py", "--model_name_or_path", model, "--train_file", data_files["train"], "--learning_rate", 1e-3,
        "--total_train_batch_size", 8, "--per_device_train_batch_size", 2, "--max_train_steps", 2, "--mixed_precision",
        "no", "--lora_dropout", 0, "--use_rslora", "--use_dora", "--loraplus_lr_ratio", 4,
    ]  # fmt: skip
    for name, script in (("out", words), ("rounded", ["tests/rounded_gradient.py", *words])):
        run = launch("one process", *script, "--output_dir", folder / name, "--merge_into", folder / f"{name}_merged")
        assert run.returncode == 0, run.stderr
    return words, folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero3", "fsdp2"])
def test_all_variants_on_two_processes(without_dropout, tmp_path, strategy):
    """As near to one process' run as that is to itself with gradients that are rounded once more: 0.005 to 0.3 of what
    that does was measured."""
    words, folder = without_dropout
    run = launch(strategy, *words, "--output_dir", tmp_path / "out", "--merge_into", tmp_path / "out_merged")
    assert run.returncode == 0, run.stderr
    for path in ("out/adapter_model.safetensors", "out_merged/model.safetensors"):
        rounded = load_file(folder / path.replace("out", "rounded"))
        check_near(load_file(tmp_path / path), rounded, load_file(folder / path))
