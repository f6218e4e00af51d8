"""--preflight says what the run then is, writes nothing, and its estimates of memory are near what is measured."""

import dataclasses
import json
import os
import re
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import make_rows, read_jsonl, run_script, write_flan_t5, write_rows
from helpers import estimate_and_measure_peak, read_bytes, write_bart
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

import train_full
import train_lora
from utils.config import LoraTrainingConfig, TrainingConfig, UserError, parse_memory


def words(kind: str, model: Path, files: dict[str, Path], output_dir: Path, *more: object) -> list:
    return [
        f"train_{kind}.py", "--model_name_or_path", model, "--train_file", files["train"], "--validation_file",
        files["validation"], "--output_dir", output_dir, *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_processes"), [("full", 1), ("lora", 1), ("full", 2)])
def test_preflight_predicts_the_run(flan_t5, data_files, tmp_path, kind, num_processes):
    sizes = ("--total_train_batch_size", 16, "--per_device_train_batch_size", 3, "--max_source_length", 40)
    command = words(kind, flan_t5, data_files, tmp_path / "out", *sizes, "--logging_steps", 2, "--num_train_epochs", 2)
    started = time.perf_counter()
    preflight = run_script(*command, "--preflight", num_processes=num_processes)
    seconds = time.perf_counter() - started
    assert preflight.returncode == 0, preflight.stderr
    assert seconds < 60, "about 6 on an idle machine"
    screen = preflight.stdout
    assert len(screen.splitlines()) <= 40 and max(map(len, screen.splitlines())) <= 119
    assert screen.count("parameters  ") == 2, "said once, in all and as a part of memory"
    assert screen.endswith("\n\nverdict     it can start\n")
    assert os.listdir(tmp_path) == []

    run = run_script(*command, num_processes=num_processes)
    assert run.returncode == 0, run.stderr
    manifest = json.loads((tmp_path / "out" / "run_manifest.json").read_text())
    counts = f"{manifest['num_parameters']:,}, of which {manifest['num_trainable_parameters']:,} are trained"
    assert f"parameters  {counts}" in screen
    strategy = f"{manifest['strategy']}, " if num_processes > 1 else ""
    assert f"{manifest['num_processes']} on 1 machine, {strategy}cpu, --mixed_precision bf16" in screen
    assert f"steps       {manifest['num_train_steps']} updates of 16 examples" in screen
    lines = [line for line in read_jsonl(tmp_path / "out" / "metrics.jsonl") if line["split"] == "train"]
    turns = [line["micro_batches_per_update"] for line in lines]  # an interval has as many updates as the next
    assert f"plan        {sum(turns) / len(turns):.1f} micro-batches per update and process" in screen
    num_tokens = re.search(r"^ +([\d.]+) of the computed tokens", screen, flags=re.MULTILINE)
    told = [1 / line["padding_efficiency"] for line in lines]
    assert min(told) <= 1 / float(num_tokens[1]) + 1e-3 and 1 / float(num_tokens[1]) - 1e-3 <= max(told)
    longest = max(len(row["dialogue"].split()) for row in make_rows(40))
    source = next(line.split() for line in screen.splitlines() if line.startswith("train: train.jsonl"))
    assert source[2] == "40" and int(source[6]) > longest and int(source[7]) > 0 and source[-1] == "40"
    truncated = re.search(r"train: 40 examples, .* truncated: (\d+) sources at 40", preflight.stderr)
    assert source[7] == truncated[1]


@pytest.fixture
def start(flan_t5, data_files, tmp_path):
    """A function that starts a preflight of train_full.py in this process, with some settings changed."""

    def start_preflight(**settings: object):
        AcceleratorState._reset_state(True)
        files = {f"{split}_file": str(data_files[split]) for split in ("train", "validation")}
        given = {"model_name_or_path": str(flan_t5), "output_dir": str(tmp_path / "out"), "mixed_precision": "no"}
        train_full.main(TrainingConfig(**(given | files | settings), preflight=True))

    return start_preflight


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("train_file", "missing.jsonl", "missing.jsonl: no such file"),
        ("train_file", "broken.jsonl", "broken.jsonl, line 1, column 2: broken JSON"),
        ("model_name_or_path", "./no/model", "--model_name_or_path ./no/model: no such folder"),
        ("model_name_or_path", "no/model", "--model_name_or_path no/model: not in the cache"),
        (
            "model_name_or_path",
            "without_weights",
            "--model_name_or_path .* cannot be loaded .*no file named",
        ),
        ("model_name_or_path", "cut_off", "--model_name_or_path .* cannot be loaded as a model: "),
        ("model_name_or_path", "lacking", "--model_name_or_path .*: its weights lack encoder.final_layer_norm.weight"),
        ("output_dir", "held", "--output_dir .*held holds a run already .metrics.jsonl."),
        ("resume_from_checkpoint", "out/checkpoints/step_000001", "no such folder"),
        ("max_source_length", 2, "--max_source_length must be over "),
    ],
)
def test_preflight_refuses_what_the_run_would(start, flan_t5, tmp_path, capsys, setting, value, text):
    (tmp_path / "broken.jsonl").write_text("{broken\n")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "metrics.jsonl").write_text("{}\n")
    weights = (flan_t5 / "model.safetensors").read_bytes()
    for name, content in (("without_weights", b""), ("cut_off", weights[:-1000]), ("lacking", weights)):
        (tmp_path / name).mkdir()
        for path in flan_t5.glob("*.json"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        if content:
            renamed = (
                content.replace(b"encoder.final_layer_norm", b"encoder.other_layer_norm")
                if name == "lacking"
                else content
            )
            (tmp_path / name / "model.safetensors").write_bytes(renamed)
    before = sorted(tmp_path.rglob("*"))
    is_path = (tmp_path / str(value)).exists() or str(value).endswith(".jsonl")
    with pytest.raises(UserError, match=text):
        start(**{setting: str(tmp_path / value) if is_path else value})
    assert sorted(tmp_path.rglob("*")) == before
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_code_2(flan_t5, data_files, tmp_path):
    files = data_files | {"train": tmp_path / "missing.csv"}
    run = run_script(*words("full", flan_t5, files, tmp_path / "out", "--preflight"), num_processes=1)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.splitlines()[-1] == f"train_full.py: error: {tmp_path / 'missing.csv'}: no such file"


def test_a_disk_too_small(start, tmp_path, small_disk, capsys):
    """12 bytes of each parameter for each of two checkpoints, 4 for each of two best models and the export."""
    output_dir = small_disk(700) / "out"
    text = "--output_dir .*out: checkpoints 2, best models 2, the export: [0-9.]+ MB needed, [01] MB free; lower "
    with pytest.raises(UserError, match=text):
        start(output_dir=str(output_dir), max_train_steps=20)
    screen = capsys.readouterr().out
    assert "\ndisk  " in screen, "it is printed all the same"
    assert screen.endswith("\n\nverdict     it cannot start: see the error\n")
    assert read_bytes(screen, "a checkpoint being written") == 1e6, "three times 0.4 MB"
    assert not output_dir.exists()


@pytest.mark.slow
def test_a_disk_too_small_for_the_merged_model(flan_t5, data_files, tmp_path, small_disk, capsys):
    """60 kB of checkpoints and adapter fit, or the merged model, and not both."""
    size = sum(tensor.nbytes for tensor in load_file(flan_t5 / "model.safetensors").values())
    disk = small_disk(size // 1024 + 30)

    def start_preflight(output_dir: Path, merge_into: Path):
        AcceleratorState._reset_state(True)
        files = {f"{split}_file": str(data_files[split]) for split in ("train", "validation")}
        folders = {"output_dir": str(output_dir), "merge_into": str(merge_into), "model_name_or_path": str(flan_t5)}
        train_lora.main(LoraTrainingConfig(**files, **folders, lora_r=4, preflight=True))
        return capsys.readouterr().out

    screen = start_preflight(disk / "out", tmp_path / "merged")
    assert f"disk        {size / 1e6:.0f} MB: the merged model; " in screen
    text = "out: checkpoints 1, best models 1, the export, the merged model: [0-9.]+ MB needed, [01] MB free"
    with pytest.raises(UserError, match=f"--output_dir .*{text}"):
        start_preflight(disk / "out", disk / "merged")
    (disk / "full").write_bytes(bytes(200_000))
    with pytest.raises(UserError, match="--merge_into .*merged: the merged model: .* free; take another disk"):
        start_preflight(tmp_path / "out", disk / "merged")
    assert [path.name for path in disk.iterdir()] == ["full"]


def test_memory_too_small(start, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "utils.training.resources.preflight.measure_free_memory", lambda accelerator, config: 1_000_000
    )
    with pytest.raises(UserError, match="out of memory: .* need .* MB, and 1 MB are free .*--gradient_checkpointing"):
        start()
    assert os.listdir(tmp_path) == []


def test_an_assumed_gpu(start, tmp_path, capsys):
    start(assume_memory="16GB")
    screen = capsys.readouterr().out
    assert "1 on 1 machine, a GPU of 16GB, assumed, --mixed_precision no\n" in screen
    assert "15.40 GB" == screen.split("free ")[1].split("\n")[0].strip(), "without what CUDA itself takes"
    assert "of at most the tokens of 40 examples" in screen, "auto: all 40 fit; on a CPU it is 16"
    assert "the export  " not in screen, "a GPU holds nothing more for it"
    with pytest.raises(UserError, match="out of memory: a process is estimated to need .* MB, and 1 MB are free"):
        start(assume_memory="0.601GB", per_device_train_batch_size=1)
    assert os.listdir(tmp_path) == []


def test_an_assumed_memory_is_a_size():
    sizes = {"16GB": 16 * 10**9, "0.5 gb": 5 * 10**8, "80GiB": 80 * 2**30}
    assert {text: parse_memory(text) for text in sizes} == sizes
    for text in ("16", "GB", "0GB", "-1GB", "16GBs", "1e3GB", "16MB", ""):
        with pytest.raises(UserError, match="--assume_memory must be a size such as 16GB, got "):
            TrainingConfig(preflight=True, assume_memory=text)
    with pytest.raises(UserError, match="--assume_memory 16GB needs --preflight"):
        TrainingConfig(assume_memory="16GB")


@pytest.mark.slow
def test_four_bits_on_an_assumed_gpu(data_files, tmp_path, capsys):
    """Neither a GPU nor bitsandbytes is needed."""
    AcceleratorState._reset_state(True)
    model = write_flan_t5(tmp_path / "model", d_model=512, d_kv=64, d_ff=1024)
    parameters = []
    for load_in_4bit in (False, True):
        config = LoraTrainingConfig(
            model_name_or_path=str(model), train_file=str(data_files["train"]), output_dir=str(tmp_path / "out"),
            preflight=True, assume_memory="8GB", load_in_4bit=load_in_4bit, lora_r=1,
        )  # fmt: skip
        train_lora.main(config)
        parameters.append(read_bytes(capsys.readouterr().out, "parameters"))
    # Of 2 layers of an encoder and a decoder; wo stays as it is.
    num_packed = 2 * (3 * 4 * 512 * 4 * 64 + 2 * 2 * 512 * 1024)
    assert parameters[0] - parameters[1] == pytest.approx(num_packed * (2 - 9 / 16), abs=1e6), "rounded to 1 MB each"
    with pytest.raises(UserError, match="--load_in_4bit needs a GPU"):
        train_lora.main(dataclasses.replace(config, assume_memory=None))


@pytest.mark.slow
def test_a_run_that_can_go_on(flan_t5, data_files, tmp_path, capsys, start):
    run = run_script(*words("full", flan_t5, data_files, tmp_path / "out", "--mixed_precision=no"))
    assert run.returncode == 0, run.stderr
    manifest = tmp_path / "out" / "run_manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished"', '"unfinished"'))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    start(resume_from_checkpoint="latest")
    assert "out: the run resumes from step_000001, of 1 updates" in capsys.readouterr().out
    start(overwrite_output_dir=True)
    assert "out: holds a run, which will be replaced" in capsys.readouterr().out
    with pytest.raises(UserError, match="it is of another run: learning_rate was 0.001 and is 0.1"):
        start(resume_from_checkpoint="latest", learning_rate=0.1)
    (tmp_path / "out" / "checkpoints" / "step_000001" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="step_000001: state.json has 2 bytes of "):
        start(resume_from_checkpoint="latest")
    del before[tmp_path / "out" / "checkpoints" / "step_000001" / "state.json"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_bart(start, tmp_path, capsys):
    """Its head is the embedding, and has a bias that is no parameter."""
    write_bart(tmp_path / "bart")
    start(model_name_or_path=str(tmp_path / "bart"), max_source_length=64, max_target_length=64)
    num_parameters = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "bart").num_parameters()
    assert f"parameters  {num_parameters:,}, of which {num_parameters:,} are trained" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision", "strategy", "size"),
    [
        ("full", "no", "one process", 4),
        ("full", "no", "ddp", 4),
        ("full", "no", "deepspeed_zero3", 4),
        # Where the activations are most of it (the first), and where what comes after the training is.
        ("lora", "no", "one process", 16),
        ("merge", "bf16", "one process", 1),
        ("lora", "bf16", "fsdp2", 1),
    ],
)
def test_estimates_are_near_the_measured_peak(tmp_path, monkeypatch, kind, precision, strategy, size):
    """Most of the model is embedding and head, as in Flan-T5, and rows are of equal length. tests/real_sizes.py tries
    the other strategies, and a model of real size."""
    # 11 million parameters where all are trained; 19 for the others, where Python's own memory would weigh too much.
    shape = {"d_model": 256, "d_kv": 64, "num_heads": 4, "d_ff": 768, "num_layers": 3}
    model = write_flan_t5(tmp_path / "model", vocab_size=16064 if kind == "full" else 32128, **shape)
    rows = [
        {"id": str(number), "dialogue": f"{number % 10} " + "you can lend " * 40, "summary": "I can meet you " * 6}
        for number in range(32)
    ]
    files = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("train", "validation")}
    # For the bf16 units of some CPUs oneDNN copies weights into scratch memory and keeps it, 20 MB and more here. That
    # is left out of the estimate: it is little beside a model of real size.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    # Two micro-batches an update, so that there is a gradient beside the second's activations; bf16 is slow on a CPU.
    total = size * 2 * (1 if strategy == "one process" else 2)
    batches = ("--per_device_train_batch_size", size, "--total_train_batch_size", total)
    batches += ("--max_train_steps", 2 if kind == "full" else 1)  # an adapter has hardly any moments
    command = words(
        "full" if kind == "full" else "lora", model, files, tmp_path / "out", "--mixed_precision", precision, *batches,
        "--max_eval_samples", 4, *(["--merge_into", tmp_path / "merged"] if kind == "merge" else []),
    )  # fmt: skip
    estimate, measured = estimate_and_measure_peak(strategy, command, tmp_path)
    assert estimate == pytest.approx(measured, rel=0.25)
