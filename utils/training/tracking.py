"""What a run reports: the console, metrics.jsonl, run_manifest.json and a tracker."""

import dataclasses
import json
import logging
import re
import resource
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from utils.config import TrainingConfig
from utils.files import append_line, hash_value, write_json
from utils.launch.output_dir import clear_output_dir, is_in
from utils.launch.script import describe_software
from utils.modeling.loading import count_parameters
from utils.modeling.strategies import name_strategy
from utils.prompting import build_prompt
from utils.scoring.report import plot_loss_curve
from utils.training.optimization import num_train_steps

logger = logging.getLogger(__name__)
FEW_STEPS = 20
unwritten = []  # lines of metrics.jsonl that the disk has not taken yet


def describe_run(
    config: TrainingConfig, model: torch.nn.Module, train_rows: list[dict], validation_rows: list[dict]
) -> dict[str, Any]:
    """The counts and fingerprints that a run is known by."""
    num_parameters, num_trainable_parameters = count_parameters(model)
    return {
        "num_parameters": num_parameters,
        "num_trainable_parameters": num_trainable_parameters,
        "num_train_examples": len(train_rows),
        "num_train_steps": num_train_steps(config, len(train_rows)),
        "data_fingerprint": hash_value([train_rows, validation_rows]),
        "prompt": build_prompt("{dialogue}"),
    }


def start_run(accelerator: Accelerator, config: TrainingConfig, checkpoint: Path | None, run: dict[str, Any]):
    """Open the run's folder and its tracker, and write run_manifest.json: the settings, the versions and `run`.
    What the folder holds stays there if the run resumes from a checkpoint in it."""
    if checkpoint is None or not is_in(checkpoint, config.output_dir):
        clear_output_dir(accelerator, config)
    settings = dataclasses.asdict(config)
    unwritten.clear()
    if accelerator.is_main_process:
        manifest = {
            **run,
            "num_processes": accelerator.num_processes,
            "strategy": name_strategy(accelerator),
            "device": accelerator.device.type,
            "settings": settings,
            **describe_software(),
        }
        write_json(Path(config.output_dir) / "run_manifest.json", manifest)
        logger.info(", ".join(f"{name} {value:,}" for name, value in run.items() if isinstance(value, int)))
        if run["num_train_steps"] < FEW_STEPS and config.max_train_steps is None:
            logger.warning("only %d updates; more with --num_train_epochs, or a lower --total_train_batch_size",
                           run["num_train_steps"])  # fmt: skip
    if config.report_to != "none":
        flat = {
            name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()
        }
        accelerator.init_trackers("dialogsum", flat)


def log_metrics(accelerator: Accelerator, config: TrainingConfig, step: int, split: str, metrics: dict[str, float]):
    """Append one line to metrics.jsonl, after those that the disk did not take before, and tell the tracker."""
    if accelerator.is_main_process:
        unwritten.append(json.dumps({"step": step, "split": split, **metrics}))
        if append_line(Path(config.output_dir) / "metrics.jsonl", "\n".join(unwritten)):
            unwritten.clear()
        logger.info("step %d %s loss %.4f", step, split, metrics["loss"])
    accelerator.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)


def finish_run(accelerator: Accelerator, config: TrainingConfig):
    """Plot the losses, and let no process end before the main one, since the launcher would then end all."""
    if accelerator.is_main_process:
        plot_loss_curve(config.output_dir)
    accelerator.wait_for_everyone()


def finish_trackers(accelerator: Accelerator):
    """Not by accelerator.end_training(), which also leaves the process group: see processes.leave_process_group."""
    for tracker in accelerator.trackers:
        tracker.finish()


def measure_peak_memory(accelerator: Accelerator) -> float:
    """Most memory that this process has held, in MiB: on a GPU what PyTorch allocated there, else resident memory."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # where getrusage would give what the parent held, if that was more
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
