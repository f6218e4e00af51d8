"""What the launchers do without a word is refused, by the real `accelerate launch`; and what they can do works."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, accelerate_launch, read_jsonl, run_command, run_script

import utils.launch.launcher
import utils.launch.script
from utils.config import EvaluationConfig, LoraTrainingConfig, TrainingConfig, UserError
from utils.launch.launcher import check_launcher, config_environment

no_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="how it is where there is no GPU")
MULTI_CPU = {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}
ZERO2 = {"distributed_type": "DEEPSPEED", "num_processes": 1, "use_cpu": False}
FSDP2 = {"distributed_type": "FSDP", "num_processes": 2, "use_cpu": False}


def write_config(path: Path, settings: dict) -> Path:
    """A config file of `accelerate launch`; JSON is YAML too."""
    whole = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0} | settings
    path.write_text(json.dumps(whole))
    return path


@pytest.fixture
def launch(flan_t5, data_files, tmp_path):
    """Train one update, launched with these words."""

    def run(*words: str | Path, **environment: str):
        script = (
            "train_lora.py", "--model_name_or_path", flan_t5, "--train_file", data_files["train"],
            "--total_train_batch_size", "4", "--max_train_steps", "1", "--output_dir", tmp_path / "out",
        )  # fmt: skip
        return accelerate_launch("--main_process_port", "0", *words, script=script, **environment)

    return run


def read_refusal(run: subprocess.CompletedProcess, output_dir: Path) -> str:
    """The script's one line, after which there is nothing but the launcher's own words."""
    assert run.returncode == 1, run.stderr
    assert "exit status 2" in run.stderr or "exitcode  : 2" in run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("train_lora.py: error: ")]
    assert len(lines) == 1, run.stderr
    assert not output_dir.exists()
    return lines[0].removeprefix("train_lora.py: error: ")


@pytest.mark.parametrize("setting", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
@pytest.mark.parametrize("script", ["train_full.py", "train_lora.py", "evaluate_rouge.py"])
def test_a_script_starts_with_settings_for_gpus(monkeypatch, script, setting):
    """Before its main is called, and so before CUDA starts; what the user has set stays."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    if setting:
        monkeypatch.setenv(setting, "max_split_size_mb:64")
    torch.backends.cuda.enable_cudnn_sdp(True)
    seen = []

    def main(config):
        seen.append({name: os.environ[name] for name in os.environ if name.endswith("_ALLOC_CONF")})
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())

    monkeypatch.setattr(sys, "argv", [script])
    config_class = {"train_full.py": TrainingConfig, "train_lora.py": LoraTrainingConfig}.get(script, EvaluationConfig)
    monkeypatch.setattr(utils.launch.script, "leave_process_group", lambda: None)
    utils.launch.script.run_script(main, config_class, f"{Path(script).stem}.yaml")
    expected = {setting: "max_split_size_mb:64"} if setting else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert seen == [expected, False]


@pytest.mark.slow
def test_what_started_a_script_is_found(tmp_path):
    """The launcher as a module, and with more words than its own."""
    script = tmp_path / "script.py"
    script.write_text("from utils.launch.launcher import find_launch_words\nprint(find_launch_words())\n")
    words = ["--cpu", "--num_processes=2", str(script), "--test_file", "a.jsonl"]
    run = run_command(sys.executable, "-m", "accelerate.commands.launch", *words, PYTHONPATH=str(REPOSITORY))
    assert run.stdout == f"{words}\n", run.stderr


def test_settings_on_the_launcher_s_command_line(monkeypatch, tmp_path):
    """And in its file."""
    by_file = ["--config_file", str(write_config(tmp_path / "a.yaml", MULTI_CPU)), "train_lora.py"]
    instead = (
        "^num_processes is 2 and accelerate launch has started 1; take --num_processes 1, or start 2 with: "
        "ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 "
    )
    for words, config, message in (
        (by_file, TrainingConfig(), instead),
        (by_file, EvaluationConfig(), instead),
        (["--cpu", "--num_processes", "2", "train_lora.py"], LoraTrainingConfig(), instead),
        (
            ["--gradient_accumulation_steps", "4", "train_lora.py"],
            TrainingConfig(),
            "the launcher sets gradient_accumulation_steps to 4",
        ),
    ):
        monkeypatch.setattr(utils.launch.launcher, "find_launch_words", lambda words=words: words)
        with pytest.raises(UserError, match=message):
            check_launcher(config)


@pytest.mark.slow
@no_gpu
def test_several_gpus_where_there_is_none(launch, tmp_path):
    """Each process thought that it was the only one, and both wrote into one folder."""
    run = launch("--multi_gpu", "--num_processes", "2")
    assert run.returncode == 0, run.stderr
    manifest = json.loads((tmp_path / "out" / "run_manifest.json").read_text())
    assert (manifest["num_processes"], manifest["strategy"]) == (2, "MULTI_CPU")
    assert [line["step"] for line in read_jsonl(tmp_path / "out" / "metrics.jsonl") if line["split"] == "train"] == [1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, message",
    [
        (
            ZERO2 | {"deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": "auto"}},
            "the launcher sets gradient_accumulation_steps to auto; remove it: it follows from",
        ),
        (
            ZERO2 | {"deepspeed_config": {"zero_stage": 2, "gradient_clipping": 0.5}},
            "the launcher sets gradient_clipping to 0.5; remove it: it is --max_grad_norm",
        ),
        (ZERO2 | {"deepspeed_config": {"zero_stage": 0}}, "the launcher's zero_stage is 0, which shards nothing"),
        pytest.param(
            FSDP2 | {"fsdp_config": {"fsdp_version": 2}},
            "ACCELERATE_USE_FSDP is set, but what runs is MULTI_CPU: it needs GPUs",
            marks=no_gpu,
        ),
    ],
)
def test_settings_that_contradict_the_scripts(launch, tmp_path, settings, message):
    run = launch("--config_file", write_config(tmp_path / "a.yaml", settings), DS_ACCELERATOR="cpu")
    assert read_refusal(run, tmp_path / "out").startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, message",
    [
        (None, "--deepspeed_config_file {path}: Expected a string path to an existing deepspeed config"),
        ('{"zero_optimization": {', "--deepspeed_config_file {path}: Expecting property name"),
        (
            '{"zero_optimization": {"stage": 7}}',
            "the DeepSpeed config's zero_optimization.stage is 7: Input should be",
        ),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {}}', "the DeepSpeed config has a section 'optimizer'"),
        (
            '{"zero_optimization": {"stage": 2}, "train_batch_size": 64}',
            "the DeepSpeed config's train_batch_size is 64; remove it: it is --total_train_batch_size",
        ),
    ],
)
def test_deepspeed_files(launch, tmp_path, text, message):
    path = tmp_path / "deepspeed.json"
    if text is not None:
        path.write_text(text)
    run = launch("--use_deepspeed", "--num_processes", "1", "--deepspeed_config_file", path, DS_ACCELERATOR="cpu")
    assert read_refusal(run, tmp_path / "out").startswith(message.format(path=path))


@pytest.mark.slow
def test_a_deepspeed_file_that_leaves_all_to_the_script(launch, tmp_path):
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    sections = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "bf16": {"enabled": "auto"}}
    (tmp_path / "auto.json").write_text(json.dumps(dict.fromkeys(names, "auto") | sections))
    words = ("--use_deepspeed", "--num_processes", "1", "--deepspeed_config_file", tmp_path / "auto.json")
    run = launch(*words, DS_ACCELERATOR="cpu")
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "out" / "run_manifest.json").read_text())["strategy"] == "DEEPSPEED_ZERO2"


@pytest.mark.slow
def test_deepspeed_asked_for_and_not_there(flan_t5, data_files, tmp_path):
    words = ("--model_name_or_path", flan_t5, "--train_file", data_files["train"], "--output_dir", tmp_path / "out")
    for num_processes, message in (
        (1, "ACCELERATE_USE_DEEPSPEED is set: start the script with accelerate launch or torchrun"),
        (2, "ACCELERATE_USE_DEEPSPEED is set, but what runs is MULTI_CPU: unset ACCELERATE_USE_CPU"),
    ):
        variables = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
        run = run_script("train_lora.py", *words, num_processes=num_processes, **variables)
        assert [line for line in run.stderr.splitlines() if "error: " in line] == [f"train_lora.py: error: {message}"]
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "the launcher sets mixed_precision to fp8; remove it: precision is"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "2.0"}, "the launcher sets gradient_clipping to 2.0; remove it: it is"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            "the launcher sets dynamo_backend to inductor; remove it: it is --compile",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "the launcher sets use_megatron_lm to true; remove it: only DDP"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "the launcher sets use_parallelism_config to true; remove"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "the launcher sets fsdp_activation_checkpointing; remove it: it is --gradient_checkpointing",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "2"},
            "srun has started 2 tasks that know nothing of each other; take sbatch slurm/",
        ),
    ],
)
def test_variables_that_are_set_by_hand(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        check_launcher(TrainingConfig())
    assert str(error.value).startswith(message)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name, value in {"LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the launcher has started 3 processes on this machine, which has 2 GPUs"):
        check_launcher(TrainingConfig())
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_launcher(TrainingConfig())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    check_launcher(TrainingConfig())


def test_variables_that_change_nothing(monkeypatch):
    for name, value in {
        "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_CLIPPING": "1.0", "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "false",
        "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    check_launcher(TrainingConfig())


@pytest.mark.slow
def test_a_shell_that_ends_takes_no_training_along(flan_t5, data_files, tmp_path):
    """A process stops when its `accelerate launch` is gone, whatever variables of it somebody has exported."""
    words = [
        "python", "train_lora.py", "--model_name_or_path", flan_t5, "--train_file", data_files["train"],
        "--total_train_batch_size", "4", "--logging_steps", "1", "--max_train_steps", "40", "--output_dir", tmp_path,
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    command = f"{shlex.join(map(str, words))} & wait"
    with subprocess.Popen(
        ["bash", "-c", command], cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL
    ) as shell:
        wait_until((tmp_path / "metrics.jsonl").exists)
        shell.kill()
    wait_until((tmp_path / "adapter_model.safetensors").exists)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 40


def wait_until(condition: Callable[[], bool]):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed_zero3_offload", "fsdp2", "cpu"])
def test_what_slurm_gets_is_what_the_launcher_sets(tmp_path, name):
    """Of each of its variables the same value, by the real launcher's hand on a script that prints them."""
    script = tmp_path / "print_environment.py"
    script.write_text("import json, os\nif os.environ.get('RANK', '0') == '0': print(json.dumps(dict(os.environ)))\n")
    config_file = f"accelerate_configs/{name}.yaml"
    words = ("--config_file", config_file, "--num_machines", "1", "--num_processes", "1", "--main_process_port", "0")
    run = accelerate_launch(*words, script=[script])
    assert run.returncode == 0, run.stderr
    set_by_launcher = json.loads(run.stdout.splitlines()[-1])
    found = config_environment(config_file)
    named = ("ACCELERATE_", "FSDP_")
    assert {key: value for key, value in found.items() if key.startswith(named)} == {
        key: value for key, value in set_by_launcher.items() if key.startswith(named)
    }
    assert found.items() <= set_by_launcher.items()
