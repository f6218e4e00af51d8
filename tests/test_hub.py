"""The literal default commands, against a stand-in of the hub: a Flan-T5-shaped model under its real name and as many
dialogues as DialogSum has. Then again from the cache, with no hub at all."""

import contextlib
import csv
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hub_standin
import pytest
from conftest import REPOSITORY, WORDS, read_jsonl, warm_launch, write_flan_t5
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
MODELS = ["original", "full", "lora"]


def write_split(path: Path, ids: list[str], dialogues: list[str]):
    """A split as the hub's csv files have it: quoted line ends, and a topic that is not used. The first summary is
    longer than the others."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "dialogue", "summary", "topic"])
        for number, (row_id, dialogue) in enumerate(zip(ids, dialogues, strict=True)):
            summary = f"meet at the {WORDS[number % len(WORDS)]}." * (1 if number else 6)
            writer.writerow([row_id, dialogue, summary, "small talk"])


def make_dialogues(num_dialogues: int, seed: int) -> list[str]:
    """The first is six times as long as the others, as some in DialogSum are, so micro-batches hold more of these."""
    rng = random.Random(seed)
    return [
        "\n".join(f"you: {rng.choice(WORDS)}\nI: {rng.choice(WORDS)}" for _ in range(1 if index else 6))
        for index in range(num_dialogues)
    ]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_flan_t5(root / "models" / "google" / "flan-t5-base", d_model=16, d_kv=4, d_ff=32, num_layers=1)
    data = root / "datasets" / "knkarthick" / "dialogsum"
    data.mkdir(parents=True)
    write_split(data / "train.csv", [f"train_{number}" for number in range(12_460)], make_dialogues(12_460, seed=0))
    write_split(data / "validation.csv", [f"dev_{number}" for number in range(500)], make_dialogues(500, seed=1))
    test_ids = [f"test_{dialogue}_{number}" for dialogue in range(3) for number in (1, 2, 3)]
    write_split(data / "test.csv", test_ids, [text for text in make_dialogues(3, seed=2) for _ in range(3)])
    with hub_standin.serve(root) as server:
        yield server


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory) -> dict[str, str]:
    """The environment of a machine that reaches the hub, with a cache that is empty at first."""
    home = tmp_path_factory.mktemp("hf")
    return {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    }  # fmt: skip


def launch(
    folder: Path, environment: dict[str, str], script: str, *words: str, cold: bool = False
) -> subprocess.CompletedProcess:
    """`accelerate launch SCRIPT WORDS` from `folder`; whatever happens, no process of it stays. `cold` as for
    warm_launch."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ACCELERATE_"))}
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NO_PROXY": "127.0.0.1"} | environment
    command, warm = warm_launch(REPOSITORY / script, cold, **({} if cold else environment))
    command, environment = [*command, *words], environment | warm
    with subprocess.Popen(
        command,
        cwd=folder,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            written, log = process.communicate(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, written, log)


def check_training(run: subprocess.CompletedProcess, folder: Path, num_trainable_parameters: int):
    assert run.returncode == 0, run.stderr
    assert "48/48" in run.stderr  # the bar counts updates
    manifest = json.loads((folder / "run_manifest.json").read_text())
    expected = {"num_train_examples": 12_460, "num_train_steps": 48, "num_processes": 1}
    assert {name: manifest[name] for name in expected} == expected
    assert manifest["num_trainable_parameters"] == num_trainable_parameters
    settings = manifest["settings"]
    assert (settings["total_train_batch_size"], settings["per_device_train_batch_size"]) == (256, 16)
    assert (settings["learning_rate"], settings["mixed_precision"]) == (1e-3, "bf16")
    metrics = read_jsonl(folder / "metrics.jsonl")
    for split, steps in (("train", [10, 20, 30, 40, 48]), ("validation", [0, 10, 20, 30, 40, 48])):
        of_split = [line for line in metrics if line["split"] == split]
        assert [line["step"] for line in of_split] == steps
        assert of_split[-1]["loss"] < of_split[0]["loss"]
    assert sum(line.get("num_examples", 0) for line in metrics if line["split"] == "train") == 48 * 256


def count_weights(root: Path) -> int:
    with safe_open(root / "models" / "google" / "flan-t5-base" / "model.safetensors", "pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys())


def test_default_commands(hub, online, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()

    full = launch(folder, online, "train_full.py")
    assert (
        f"asking {hub.endpoint} for model google/flan-t5-base (HF_HUB_OFFLINE=1 uses the cache alone)" in full.stderr
    )
    check_training(full, folder / "flan-t5-base-dialogsum-checkpoint", count_weights(hub.root))
    lora = launch(folder, online, "train_lora.py")
    check_training(lora, folder / "flan-t5-base-dialogsum-lora", 32 * (16 + 16) * 2 * 3)  # q and v of 3 attentions
    evaluation = launch(folder, online, "evaluate_rouge.py")
    assert evaluation.returncode == 0, evaluation.stderr
    check_evaluation(folder / "rouge-report", evaluation.stdout)
    assert hub.unanswered == []
    names = ["flan-t5-base-dialogsum-checkpoint", "flan-t5-base-dialogsum-lora", "rouge-report"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_readme_for_a_machine_without_a_network(hub, online, tmp_path):
    """utils/README.md's lines fill a cache where there is a hub; a training then starts where there is none, and
    nobody waits for a network."""
    online = online | {"HF_HOME": str(tmp_path / "hf")}
    readme = (REPOSITORY / "utils" / "README.md").read_text()
    lines = [line for line in readme.splitlines() if line.startswith("python -c")]
    assert len(lines) == 2
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    for line in lines:
        words = [sys.executable, *shlex.split(line)[1:]]
        subprocess.run(words, env=inherited | online, check=True, capture_output=True, timeout=120)
    offline = online | {"HF_HUB_OFFLINE": "1"}  # the hub would answer, and is not asked
    num_requests = len(hub.requests)
    run = launch(tmp_path, offline, "train_lora.py", "--max_train_samples=512", cold=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "flan-t5-base-dialogsum-lora" / "adapter_model.safetensors").is_file()
    assert len(hub.requests) == num_requests


def check_evaluation(folder: Path, printed: str):
    results = json.loads((folder / "results.json").read_text())
    assert list(results["models"]) == MODELS
    assert list(results["comparisons"]) == ["original_vs_full", "original_vs_lora", "full_vs_lora"]
    assert (results["num_dialogues"], results["num_rows"]) == (3, 9)
    predictions = read_jsonl(folder / "predictions.jsonl")
    assert [(line["id"], line["model"]) for line in predictions] == [
        (f"test_{dialogue}_1", model) for model in MODELS for dialogue in range(3)
    ]
    assert [len(line["references"]) for line in predictions] == [3] * 9
    for model in MODELS:
        assert f"--- {model}\n" in printed
    for pair in ("original minus full", "original minus lora", "full minus lora"):
        assert pair in printed


def test_a_preflight_downloads_no_weights(hub, online, flan_t5, data_files, tmp_path):
    """They lie on the hub as safetensors, or not."""
    words = [f"--train_file={data_files['train']}", f"--output_dir={tmp_path / 'out'}", "--preflight"]
    model = shutil.copytree(flan_t5, hub.root / "models" / "org" / "model")
    here, missing = (
        launch(tmp_path, online, "train_full.py", f"--model_name_or_path=org/{name}", *words)
        for name in ("model", "other")
    )
    (model / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    without_safetensors = launch(tmp_path, online, "train_full.py", "--model_name_or_path=org/model", *words)
    assert here.returncode == 0, here.stderr
    assert "model       org/model, t5, to be downloaded from the hub\n" in here.stdout
    # The head is its own, whatever transformers makes of config.json.
    num_parameters = sum(tensor.numel() for tensor in load_file(flan_t5 / "model.safetensors").values())
    assert f"parameters  {num_parameters:,}, of which" in here.stdout
    assert without_safetensors.returncode == 0, without_safetensors.stderr
    cache = Path(online["HF_HOME"]) / "hub" / "models--org--model"
    assert list(cache.rglob("config.json")) and not list(cache.rglob("*.safetensors"))
    assert missing.returncode == 1 and "--model_name_or_path org/other: no such model at" in missing.stderr


def test_names_that_the_hub_does_not_have(hub, online, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    for words, kind in (
        (["--dataset_name=my/dialogues"], "data set"),
        (["--model_name_or_path=my/flan"], "model"),
    ):
        run = launch(folder, online, "train_lora.py", *words)
        setting, name = words[0].split("=")
        expected = f"no such {kind} at {hub.endpoint}, or a private one (hf auth login); a folder must exist"
        assert f"train_lora.py: error: {setting} {name}: {expected}\n" in run.stderr
        assert run.returncode != 0
        assert list(folder.iterdir()) == []


def test_a_data_set_of_other_splits_and_configurations(hub, online, tmp_path):
    """One without a validation split is as good as files without one."""
    data = hub.root / "datasets" / "my" / "chats"
    data.mkdir(parents=True)
    for name, num_rows in (("short_train", 6), ("long_train", 9), ("long_held_out", 5)):
        ids = [f"{name}_{row}" for row in range(num_rows)]
        write_split(data / f"{name}.csv", ids, make_dialogues(num_rows, seed=0))
    splits = {"short": {"train": "short_train"}, "long": {"train": "long_train", "held_out": "long_held_out"}}
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{file}.csv"} for split, file in files.items()]}
        for name, files in splits.items()
    ]
    (data / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")

    def train(name: str, *words: str):
        common = ["--dataset_name=my/chats", "--dataset_revision=main", f"--dataset_config_name={name}"]
        settings = ["--max_train_steps=1", "--mixed_precision=no", f"--output_dir={name}"]
        return launch(tmp_path, online, "train_lora.py", *common, *settings, *words)

    for name, words, num_trained, num_validated in (
        ("short", [], 6, []),
        ("long", ["--validation_split=held_out"], 9, [5, 5]),
    ):
        run = train(name, *words)
        assert run.returncode == 0, run.stderr
        lines = read_jsonl(tmp_path / name / "metrics.jsonl")
        assert [line["num_examples"] for line in lines if line["split"] == "validation"] == num_validated
        assert [line["num_examples"] for line in lines if line["split"] == "train"] == [num_trained]
    for word in ("--load_best_model_at_end", "--validation_split=dev"):
        run = train("short", word, "--overwrite_output_dir")
        split = word.partition("split=")[2] or "validation"
        assert f'error: --dataset_name my/chats: Unknown split "{split}". Should be one of' in run.stderr
