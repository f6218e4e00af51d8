"""What started this process: `accelerate launch`, torchrun or Slurm, and the settings that come with it.

`accelerate launch` passes its settings on as ACCELERATE_... variables, some of which win over the script's own without
a word, and starts one process where it cannot start more. Its own functions read its words and its YAML here.

    python -m utils.launch.launcher accelerate_configs/deepspeed_zero2.yaml    # what slurm/launch.sh evaluates
"""

import contextlib
import functools
import logging
import os
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import psutil
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from utils.config import FP16_REFUSAL, TrainingConfig, UserError


@functools.cache
def find_launch_words() -> list[str] | None:
    """What follows `accelerate launch` in this process's parent; None if the parent is something else."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return None
    for index, word in enumerate(words[:3]):  # before it stands python, maybe with -m
        if Path(word).name in ("accelerate-launch", "accelerate.commands.launch"):
            return words[index + 1 :]
        if Path(word).name in ("accelerate", "accelerate.commands.accelerate_cli") and "launch" in words[index + 1 :]:
            return words[words.index("launch") + 1 :]
    return None


def read_launch(words: list[str]) -> tuple[Namespace, list[str]]:
    """All that `accelerate launch WORDS` is asked for, its YAML's settings included, and the names of those that its
    YAML has for DeepSpeed."""
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # it says what it took by default
    arguments, defaults, from_yaml = _validate_launch_command(launch_command_parser().parse_args(words))
    fields = list(getattr(defaults, "deepspeed_config", None) or {})
    return arguments, fields + ["mixed_precision"] * from_yaml


def config_environment(config_file: str) -> dict[str, str]:
    """The variables that `accelerate launch --config_file` would add, except how many processes there are."""
    words = ["--config_file", config_file, "--num_machines", "1", "--main_process_port", "0", "script"]
    try:
        launch, fields = read_launch(words)
        if launch.use_deepspeed:
            launch.deepspeed_fields_from_accelerate_config = ",".join(fields)
            _, environment = prepare_deepspeed_cmd_env(launch)
        elif launch.use_fsdp or launch.use_megatron_lm or launch.multi_gpu:
            environment = prepare_multi_gpu_env(launch)
        else:
            _, environment = prepare_simple_launcher_cmd_env(launch)
    except Exception as error:  # whatever the file makes Accelerate or YAML raise
        raise UserError(f"--config_file {config_file}: {error}") from error
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def check_launcher(config: object):
    """UserError where fewer processes were started than asked for, or a training is told what it does not do."""
    words, launch = find_launch_words(), None
    if words is not None:
        with contextlib.suppress(OSError):  # a config file that is gone already, as bash's <(...)
            launch, _ = read_launch(words)
    check_num_processes(launch)
    if isinstance(config, TrainingConfig):
        check_training_settings(launch, config)


def check_num_processes(launch: Namespace | None):
    asked, started = getattr(launch, "num_processes", None) or 1, int(os.environ.get("WORLD_SIZE", 1))
    script = Path(sys.argv[0]).name
    if asked > started:
        instead = f"accelerate launch --multi_gpu --num_processes {asked} {script}"
        if launch.cpu or launch.use_cpu or not torch.accelerator.is_available():
            instead = f"ACCELERATE_USE_CPU=true torchrun --nproc-per-node {asked} {script}"
        raise UserError(
            f"num_processes is {asked} and accelerate launch has started {started}; take --num_processes 1, or start "
            f"{asked} with: {instead}"
        )
    here, num_devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
    if 0 < num_devices < here and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        raise UserError(f"the launcher has started {here} processes on this machine, which has {num_devices} GPUs")
    num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if num_tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"srun has started {num_tasks} tasks that know nothing of each other; take sbatch "
            f"slurm/{script.removesuffix('.py')}.sbatch"
        )


def check_training_settings(launch: Namespace | None, config: TrainingConfig):
    """The launcher's settings that would win over the script's, or be ignored."""

    def find(name: str) -> str:
        value = os.environ.get(f"ACCELERATE_{name.upper()}", getattr(launch, name, None))
        return "" if value is None else str(value).lower()

    if find("mixed_precision") == "fp16":
        raise UserError(f"the launcher's mixed_precision is fp16: {FP16_REFUSAL}")
    clipping = find("gradient_clipping")
    with contextlib.suppress(ValueError):  # not a number: not set, or "auto"
        clipping = "auto" if float(clipping) == config.max_grad_norm else clipping
    if clipping not in ("", "auto"):
        raise UserError(f"the launcher sets gradient_clipping to {clipping}; remove it: it is --max_grad_norm")
    no = ("", "false", "no", "0")
    accumulation = (
        "it follows from --total_train_batch_size, --per_device_train_batch_size and the number of processes"
    )
    for name, allowed, why in (
        ("mixed_precision", ("", "no", config.mixed_precision), "precision is --mixed_precision"),
        ("gradient_accumulation_steps", ("", "1"), accumulation),
        ("dynamo_backend", ("", "no"), "it is --compile"),
        ("use_megatron_lm", no, "only DDP, DeepSpeed and FSDP2 are supported"),
        ("use_parallelism_config", no, "only DDP, DeepSpeed and FSDP2 are supported"),
    ):
        if find(name) not in allowed:
            raise UserError(f"the launcher sets {name} to {find(name)}; remove it: {why}")
    for name, instead in (
        ("activation_checkpointing", "it is --gradient_checkpointing"),
        ("offload_params", "accelerate_configs/deepspeed_zero3_offload.yaml does that"),
    ):
        if os.environ.get("ACCELERATE_USE_FSDP") == os.environ.get(f"FSDP_{name.upper()}") == "true":
            raise UserError(f"the launcher sets fsdp_{name}; remove it: {instead}")


if __name__ == "__main__":
    try:
        found = config_environment(sys.argv[1])
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    sys.stdout.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in found.items())
