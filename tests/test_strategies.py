"""One training under every strategy: each of accelerate_configs/ on two CPU processes against a plain PyTorch loop."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    keep_checkpoint,
    launch,
    make_rows,
    read_jsonl,
    relative_difference,
    write_flan_t5,
    write_rows,
)  # fmt: skip
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from utils.data.batching import select_examples
from utils.prompting import build_prompt

pytestmark = pytest.mark.slow
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 4, 12, 1e-3
NAMES = {
    "one process": "NO",
    "ddp": "MULTI_CPU",
    "deepspeed_zero1": "DEEPSPEED_ZERO1",
    "deepspeed_zero2": "DEEPSPEED_ZERO2",
    "deepspeed_zero3": "DEEPSPEED_ZERO3",
    "deepspeed_zero3_offload": "DEEPSPEED_ZERO3",
    "fsdp2": "FSDP",
}
STRATEGIES = tuple(NAMES)[1:]
# An adapter once for each way to shard a model.
TRAININGS = [(strategy, "full") for strategy in STRATEGIES]
TRAININGS += [(strategy, "lora") for strategy in ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")]
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def inputs(make_once) -> dict[str, Path]:
    def fill(folder: Path):
        # Of an odd width: two processes have shares of unequal size.
        write_flan_t5(folder / "model", dropout_rate=0.0, d_model=33)
        write_rows(folder / "train.jsonl", make_rows(48))
        write_rows(folder / "validation.jsonl", make_rows(7, seed=1))

    folder = make_once("strategy_inputs", fill)
    return {"model": folder / "model", "train": folder / "train.jsonl", "validation": folder / "validation.jsonl"}


def words(kind: str, inputs: dict[str, Path], output_dir: Path, *more: str) -> list:
    lora = ["--lora_dropout", "0"] if kind == "lora" else []
    return [
        f"train_{kind}.py", "--model_name_or_path", inputs["model"], "--train_file", inputs["train"],
        "--validation_file", inputs["validation"], "--total_train_batch_size", BATCH_SIZE, "--logging_steps", 1,
        "--per_device_train_batch_size", 3, "--learning_rate", LEARNING_RATE, "--mixed_precision", "no",
        "--eval_steps", 4, "--checkpointing_steps", 2, "--output_dir", output_dir, *lora, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference(inputs) -> dict[str, dict]:
    """Of each kind the losses, the gradients' norms and the weights after four updates, each of one padded batch, with
    transformers' own loss."""
    rows, tokenizer = make_rows(48), AutoTokenizer.from_pretrained(inputs["model"])
    found = {}
    for kind in WEIGHTS:
        model = AutoModelForSeq2SeqLM.from_pretrained(inputs["model"])
        if kind == "lora":
            torch.manual_seed(42)
            adapter = LoraConfig(task_type="SEQ_2_SEQ_LM", r=32, lora_alpha=32, target_modules=["q", "v"])
            model = get_peft_model(model, adapter)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name.replace(".default", ""): p.detach().clone() for name, p in trainable.items()}
        groups = [{"params": [p], "weight_decay": 0.01 if p.ndim >= 2 else 0} for p in trainable.values()]
        optimizer = torch.optim.AdamW(groups)
        losses, norms = [], []
        for step in range(NUM_STEPS):
            batch = [rows[index] for index in select_examples(len(rows), BATCH_SIZE, 42, step)]
            prompts = tokenizer([build_prompt(row["dialogue"]) for row in batch], padding=True, return_tensors="pt")
            labels = tokenizer([row["summary"] for row in batch], padding=True, return_tensors="pt").input_ids
            labels[labels == tokenizer.pad_token_id] = -100
            loss = model(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, labels=labels).loss
            loss.backward()
            losses.append(loss.item())
            norms.append(float(torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - step / NUM_STEPS)
            optimizer.step()
            optimizer.zero_grad()
        after = {name.replace(".default", ""): p.detach() for name, p in trainable.items()}
        found[kind] = {"losses": losses, "norms": norms, "before": before, "after": after}
    return found


@pytest.fixture(scope="module")
def runs(inputs, make_once):
    """A function that returns the output folder of a finished run, once for each strategy, kind and precision."""

    def run(strategy: str, kind: str, precision: str = "no") -> Path:
        def fill(folder: Path):
            finished = launch(strategy, *words(kind, inputs, folder / "out", "--mixed_precision", precision))
            assert finished.returncode == 0, finished.stderr

        return make_once(f"{strategy.replace(' ', '_')}_{kind}_{precision}", fill) / "out"

    return run


def read_losses(output_dir: Path) -> tuple[list[float], list[float]]:
    lines = [line for line in read_jsonl(output_dir / "metrics.jsonl") if line["split"] == "train"]
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


def without_times(output_dir: Path) -> list[dict]:
    measured = ("samples_per_second", "target_tokens_per_second", "model_flops_per_second", "data_wait_share",
                "peak_memory_mib")  # fmt: skip
    return [
        {key: value for key, value in line.items() if key not in measured}
        for line in read_jsonl(output_dir / "metrics.jsonl")
    ]


@pytest.mark.parametrize(("strategy", "kind"), [("one process", "full"), ("one process", "lora"), *TRAININGS])
def test_the_same_training(inputs, reference, runs, strategy, kind):
    """Rounding alone: sums in another order. AdamW divides a gradient by its size, so what is near 0 shows."""
    output_dir, expected = runs(strategy, kind), reference[kind]
    manifest = json.loads((output_dir / "run_manifest.json").read_text())
    assert manifest["num_processes"] == (1 if strategy == "one process" else 2)
    assert manifest["strategy"] == NAMES[strategy]
    losses, norms = read_losses(output_dir)
    assert losses == pytest.approx(expected["losses"], rel=2e-6)
    assert norms == pytest.approx(expected["norms"], rel=2e-5)
    exported = load_file(output_dir / WEIGHTS[kind])
    assert exported.keys() == expected["after"].keys()
    moved, should = (
        {name: end[name] - expected["before"][name] for name in end} for end in (exported, expected["after"])
    )
    assert relative_difference(moved, should) < 5e-5


@pytest.mark.parametrize(("strategy", "kind"), TRAININGS)
def test_the_same_export(inputs, runs, strategy, kind):
    """Files, names, shapes and dtypes of a one-process run, and its logits through stock from_pretrained."""
    ours, alone = runs(strategy, kind), runs("one process", kind)
    assert {path.name for path in ours.iterdir()} == {path.name for path in alone.iterdir()}
    tensors, expected = (load_file(folder / WEIGHTS[kind]) for folder in (ours, alone))
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    for name in ("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json"):
        if (alone / name).exists():
            settings, expected = (json.loads((folder / name).read_text()) for folder in (ours, alone))
            for one in (settings, expected):
                one["target_modules"] = sorted(one.get("target_modules", []))  # PEFT writes a set
            assert settings == expected, name
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = (
            AutoModelForSeq2SeqLM.from_pretrained(folder).eval()(input_ids=ids, decoder_input_ids=ids).logits
            for folder in (ours, alone)
        )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [(strategy, "full") for strategy in STRATEGIES]
    + [(strategy, "lora") for strategy in ("ddp", "deepspeed_zero3", "fsdp2")],
)
def test_resumed_is_uninterrupted(inputs, runs, tmp_path, strategy, kind):
    """From the checkpoint of step 2, bit-identical."""
    finished = runs(strategy, kind)
    resumed = keep_checkpoint(finished, tmp_path / "out")
    run = launch(strategy, *words(kind, inputs, resumed, "--resume_from_checkpoint", "latest"))
    assert run.returncode == 0, run.stderr
    assert "resuming from" in run.stderr and "to rounding" not in run.stderr
    assert without_times(resumed) == without_times(finished)
    ours, expected = (load_file(folder / WEIGHTS[kind]) for folder in (resumed, finished))
    assert [name for name in expected if not ours[name].equal(expected[name])] == []


@pytest.mark.parametrize(
    "first, second, kind",
    [
        ("one process", "deepspeed_zero2", "lora"),
        ("deepspeed_zero2", "deepspeed_zero3", "full"),
        ("deepspeed_zero3", "fsdp2", "full"),
        ("fsdp2", "one process", "full"),
    ],
)
def test_resumes_under_another_strategy(inputs, runs, tmp_path, first, second, kind):
    """A checkpoint is the same file under each; the end agrees to rounding."""
    finished = runs(first, kind)
    resumed = keep_checkpoint(finished, tmp_path / "out")
    run = launch(second, *words(kind, inputs, resumed, "--resume_from_checkpoint", "latest"))
    assert run.returncode == 0, run.stderr
    assert "the same training to rounding, not to the bit" in run.stderr
    ours, expected = (load_file(folder / WEIGHTS[kind]) for folder in (resumed, finished))
    assert relative_difference(ours, expected) < 5e-6


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("one process", "ddp"),
        ("ddp", "deepspeed_zero2"),
        ("deepspeed_zero2", "deepspeed_zero3"),
        ("deepspeed_zero3", "fsdp2"),
        ("fsdp2", "one process"),
    ],
)
def test_lora_in_bf16_resumes_under_another_strategy(inputs, runs, tmp_path, first, second):
    """Each strategy freezes the same bf16 weights: a run's first loss, before any update, is equal but for the order
    of a sum, and so is the first one after resuming; the end differs by less than fp32 weights would make it."""
    alone, in_fp32, finished = (
        runs("one process", "lora", "bf16"),
        runs("one process", "lora"),
        runs(first, "lora", "bf16"),
    )
    resumed = keep_checkpoint(finished, tmp_path / "out")
    more = ("--mixed_precision", "bf16", "--resume_from_checkpoint", "latest")
    run = launch(second, *words("lora", inputs, resumed, *more))
    assert run.returncode == 0, run.stderr
    assert "the same training to rounding, not to the bit" in run.stderr
    losses = {folder: read_losses(folder)[0] for folder in (alone, in_fp32, finished, resumed)}
    assert losses[finished][0] == pytest.approx(losses[alone][0], rel=2e-6)
    assert losses[resumed][2] == pytest.approx(losses[finished][2], rel=2e-6)
    assert abs(losses[in_fp32][0] / losses[alone][0] - 1) > 1e-5, "the test would not see fp32 weights"
    adapters = {folder: load_file(folder / WEIGHTS["lora"]) for folder in losses}
    rounding = relative_difference(adapters[in_fp32], adapters[alone])
    for folder in (finished, resumed):
        assert relative_difference(adapters[folder], adapters[alone]) < rounding


def test_zero3_loads_in_parts(tmp_path):
    """Process 1 never holds the whole model, as it does under DDP; the head, which T5 under ZeRO-3 would lose to the
    embedding, is the checkpoint's."""
    model = write_flan_t5(tmp_path / "large", d_model=512, d_kv=64, num_heads=8, d_ff=1024, num_layers=8)
    write_flan_t5(tmp_path / "large-tiny")  # which load_worker.py loads first
    weights = load_file(model / "model.safetensors")
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    whole_mib = 4 * num_parameters / 2**20
    took = {}
    for strategy in ("ddp", "deepspeed_zero3"):
        run = launch(strategy, "tests/load_worker.py", model)
        assert run.returncode == 0, run.stderr
        reports = [json.loads(line.partition("REPORT ")[2]) for line in run.stdout.splitlines() if "REPORT " in line]
        assert sorted(report["rank"] for report in reports) == [0, 1]
        for report in reports:
            assert report["num_parameters"] == num_parameters
            for name, key in (("lm_head.weight", "head"), ("shared.weight", "embedding")):
                assert report[key] == pytest.approx(float(weights[name].double().sum()), abs=1e-6)
            took[strategy, report["rank"]] = report["took_mib"]
    assert took["ddp", 1] > 0.9 * whole_mib
    assert took["deepspeed_zero3", 1] < 0.6 * whole_mib  # 0.56: a half, and the largest tensor while it is shared out


@pytest.mark.parametrize("strategy", ["deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_bf16_is_autocast_over_fp32_weights(inputs, runs, strategy):
    """As on one process: fp32 is exported, nearer to a one-process bf16 run than that is to an fp32 one."""
    before = load_file(inputs["model"] / "model.safetensors")

    def move(output_dir: Path) -> dict[str, torch.Tensor]:
        after = load_file(output_dir / "model.safetensors")
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        return {name: after[name] - before[name] for name in before}

    expected = move(runs("one process", "full", "bf16"))
    rounding = relative_difference(expected, move(runs("one process", "full")))
    assert relative_difference(move(runs(strategy, "full", "bf16")), expected) < 0.5 * rounding


@pytest.mark.parametrize("strategy", ["deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_a_loss_that_is_not_finite(inputs, tmp_path, strategy):
    """The model before it is kept, and those who could be to blame are named."""
    model = shutil.copytree(inputs["model"], tmp_path / "model")
    run = launch(
        strategy,
        *words(
            "full", inputs | {"model": model}, tmp_path / "out", "--learning_rate", "1e30", "--max_grad_norm", "1e30"
        ),
    )
    assert run.returncode != 0
    (line,) = [line for line in run.stderr.splitlines() if "train_full.py: error: " in line]
    assert "the loss is not finite in micro-batches of row_" in line or "the gradient overflows" in line
    assert "the model after " in line
    kept = load_file(tmp_path / "out" / "last_good_model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_rouge_is_refused_where_the_model_is_sharded(inputs, tmp_path):
    run = launch("fsdp2", *words("full", inputs, tmp_path / "out", "--metric_for_best_model", "rouge1"))
    assert run.returncode != 0 and "train_full.py: error: --metric_for_best_model rouge1 " in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_auto_finds_what_all_can_hold_and_changes_nothing_else(inputs, runs, tmp_path, strategy):
    """Gradients are computed to find it, and none of them is left."""
    settings = words("full", inputs, tmp_path / "out", "--per_device_train_batch_size", "auto")
    run = launch(strategy, "tests/auto_worker.py", *settings)
    assert run.returncode == 0, run.stderr
    assert "per_device_train_batch_size auto: 3 examples of full length" in run.stderr
    ours, expected = (load_file(folder / WEIGHTS["full"]) for folder in (tmp_path / "out", runs(strategy, "full")))
    assert [name for name in expected if not ours[name].equal(expected[name])] == []


def test_stopped_by_its_time_limit(inputs, runs, tmp_path):
    """Both processes stop at the same update, and the resumed run has the same result."""
    run = launch("deepspeed_zero3", *words("full", inputs, tmp_path / "out", "--max_time", "00:00:01"))
    assert "stopped after step" in run.stderr, run.stderr
    run = launch("deepspeed_zero3", *words("full", inputs, tmp_path / "out", "--resume_from_checkpoint", "latest"))
    assert run.returncode == 0, run.stderr
    finished = runs("deepspeed_zero3", "full")
    ours, expected = (load_file(folder / WEIGHTS["full"]) for folder in (tmp_path / "out", finished))
    assert [name for name in expected if not ours[name].equal(expected[name])] == []
