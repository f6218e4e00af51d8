"""A checkpoint's folder: written atomically in a thread, verified before it is used, and chosen by whose run it is.

    checkpoints/step_000010/       model.safetensors       what is trained: all weights, or the adapter alone
                                   optimizer.safetensors   AdamW's moments, PARAMETER.exp_avg and so on
                                   state.json              the step, the schedule, the open interval, whose run it is
                                   metrics.jsonl           the record up to this step
                                   manifest.json           size and SHA-256 of each file
    checkpoints/best_step_000010/  the same without the optimizer, for the best validation so far

Weights are safetensors and the rest is JSON: nothing that is loaded can run code.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from utils.config import TrainingConfig, UserError
from utils.execution.sharding import gather_tensor
from utils.files import describe_file, flush_to_disk, hash_value, hash_weights, raise_disk_errors
from utils.launch.output_dir import UNFINISHED, describe_models, find_checkpoints, read_finished, step_of

logger = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint is not what was written; the text says which file and why."""


def write_checkpoint(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict, metrics: bytes):
    """Write `folder` atomically: beside it, flushed to disk, then renamed."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for name, weights in tensors.items():
            with raise_disk_errors(unfinished / f"{name}.safetensors"):
                save_file(weights, unfinished / f"{name}.safetensors")
        (unfinished / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        (unfinished / "metrics.jsonl").write_bytes(metrics)
        for path in unfinished.glob("*.safetensors"):
            shutil.copymode(unfinished / "state.json", path)  # safetensors lets nobody else read them
        files = {path.name: describe_file(path) for path in sorted(unfinished.iterdir())}
        manifest = {"files": files, "sha256": hash_value(files)}
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            flush_to_disk(path)
        replaced = folder.with_name(f"{folder.name}.replaced{UNFINISHED}")
        if folder.exists():  # the run was resumed from before it, or it is damaged
            folder.rename(replaced)
        unfinished.rename(folder)
        for path in (folder.parent, folder.parent.parent):
            flush_to_disk(path)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, and then removes those that they replace. For one process alone."""

    def __init__(self, output_dir: Path, total_limit: int):
        self.output_dir, self.total_limit = output_dir, total_limit
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing: Future | None = None

    def write(self, folder: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]):
        """Hand the writing to the thread; `wait` reports whether it worked."""
        path = self.output_dir / "metrics.jsonl"
        metrics = path.read_bytes() if path.exists() else b""
        self.writing = self.thread.submit(self.write_and_rotate, folder, tensors, state, metrics)

    def wait(self) -> str | None:
        """Wait until the thread has written what it was given; returns the disk's error if that failed."""
        if self.writing is None:
            return None
        writing, self.writing = self.writing, None
        try:
            return writing.result()
        except OSError as error:
            kept = find_checkpoints(self.output_dir)
            text = f"{error.strerror or error}; the newest checkpoint is {kept[0].name if kept else 'none'}"
            logger.warning("a checkpoint could not be written: %s", text)
            return text

    def write_and_rotate(self, folder: Path, tensors: dict, state: dict, metrics: bytes):
        write_checkpoint(folder, tensors, state, metrics)
        # Only now that it is there.
        if folder.name.startswith("best"):
            for path in find_checkpoints(self.output_dir, "best_step"):
                if path != folder:
                    remove_checkpoint(path)
        else:
            self.remove_older(state["step"])

    def remove_older(self, step: int):
        """Keep the newest total_limit up to `step`. Newer ones stay: the run resumed from before them."""
        older = [path for path in find_checkpoints(self.output_dir) if step_of(path) < step]
        for path in older[self.total_limit - 1 :]:
            remove_checkpoint(path)


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint's state. CheckpointError unless every file is, byte for byte, what was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["sha256"] != hash_value(manifest["files"]):
            raise CheckpointError(f"{folder}: manifest.json was changed")
        for name, expected in manifest["files"].items():
            if (size := (folder / name).stat().st_size) != expected["size"]:
                raise CheckpointError(f"{folder}: {name} has {size} bytes of {expected['size']}")
            if describe_file(folder / name) != expected:
                raise CheckpointError(f"{folder}: {name} is not what was written (its SHA-256 differs)")
        return json.loads((folder / "state.json").read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: manifest.json cannot be read ({type(error).__name__})") from error


def choose_checkpoint(
    config: TrainingConfig, run: dict[str, Any], unknown: tuple[str, ...] = ()
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `--resume_from_checkpoint` means, and its state; None for `latest` where there is none yet.
    UserError if it is damaged or of another run, in anything that is not `unknown` yet."""
    if config.resume_from_checkpoint != "latest":
        candidates = [Path(config.resume_from_checkpoint)]
        if not os.path.isdir(candidates[0]):
            raise UserError(f"--resume_from_checkpoint {candidates[0]}: no such folder")
        if not re.fullmatch(r"step_\d+", candidates[0].name):
            raise UserError(f"--resume_from_checkpoint {candidates[0]}: not the name of a checkpoint, step_...")
    else:
        candidates = find_checkpoints(config.output_dir)
        if not candidates:
            logger.warning("no checkpoint in %s yet: the run begins from its start", Path(config.output_dir))
            return None
    damage = []
    for folder in candidates:
        try:
            state = verify_checkpoint(folder)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        for text in damage:
            logger.warning("%s: resuming from %s", text, folder.name)
        if may_change_length(config, state, run):
            unknown = (*unknown, "num_train_steps")
        if differences := describe_differences(state["run"], run, unknown):
            reason = ""
            if "num_train_steps" in differences and config.lr_scheduler_type != "constant":
                reason = f"; the {config.lr_scheduler_type} schedule depends on it, constant does not"
            raise UserError(f"--resume_from_checkpoint {folder}: it is of another run: {differences}{reason}")
        return folder, state
    raise UserError(f"--resume_from_checkpoint {config.resume_from_checkpoint}: {'; '.join(damage)}")


def may_change_length(config: TrainingConfig, state: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether the number of updates may differ from the checkpoint's: a constant schedule does not depend on it."""
    return config.lr_scheduler_type == "constant" and run["num_train_steps"] >= state["step"]


def describe_differences(before: dict[str, Any], now: dict[str, Any], unknown: tuple[str, ...] = ()) -> str:
    """Between two runs, in anything that is not `unknown` yet; empty if they are the same."""
    return "; ".join(
        f"{name} was {there} and is {here}"
        for name in dict.fromkeys([*now, *before])
        if name not in unknown and (here := now.get(name)) != (there := before.get(name))
    )


def is_finished(config: TrainingConfig, run: dict[str, Any], unknown: tuple[str, ...] = ()) -> bool:
    """Whether output_dir holds this very run, finished, with every bit of its models. UserError if it holds another
    run of the same settings, or this one damaged, unless it is to be resumed or overwritten."""
    record = read_finished(config)
    if record is None or config.overwrite_output_dir or config.resume_from_checkpoint not in (None, "latest"):
        return False
    finished = record["finished"]
    problem = describe_differences(finished["run"], run, unknown)
    if not problem and describe_models(config) != finished["models"]:
        problem = "its model is not what was written; --resume_from_checkpoint latest exports it again"
    if problem and config.resume_from_checkpoint is None:
        raise UserError(
            f"--output_dir {config.output_dir} holds a finished run of the same settings: {problem}; take another "
            "folder, or --overwrite_output_dir"
        )
    return not problem


def find_best(folder: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The best model that lies, undamaged, in a folder of checkpoints, and {"step": , "value": } of it."""
    found = []
    for path in find_checkpoints(folder.parent, "best_step"):
        try:
            found.append((path, verify_checkpoint(path)["best"]))
        except CheckpointError as error:
            logger.warning("%s", error)
    return min(found, key=lambda pair: pair[1]["value"], default=(None, None))


def remove_checkpoint(folder: Path):
    """By another name first, so that a kill in the middle leaves nothing that looks like a checkpoint."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    try:
        folder.rename(unfinished)
        shutil.rmtree(unfinished)
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error.strerror)


# Settings that may change when a run is resumed. With another value of any other it would be another run; so would it
# be of a new setting, until it is named here. Of model, data and length the fingerprints and counts tell.
FREE_SETTINGS = {
    "model_name_or_path", "dataset_name", "dataset_config_name", "dataset_revision", "validation_split",
    "train_file", "validation_file", "test_file", "dialogue_column", "summary_column", "max_train_samples",
    "max_eval_samples", "num_train_epochs", "max_train_steps", "demo",
    "per_device_train_batch_size", "per_device_eval_batch_size", "attn_implementation", "gradient_checkpointing",
    "adapter_name_or_path", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
    "load_best_model_at_end", "merge_into", "logging_steps", "eval_steps", "checkpointing_steps",
    "checkpoints_total_limit", "project_name", "run_name", "max_time", "preflight", "assume_memory", "report_to",
    "deterministic", "compile",
}  # fmt: skip


def identity_settings(config: TrainingConfig) -> dict[str, Any]:
    """What a run must agree on with a checkpoint that it resumes from, beside its model, data and number of steps."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_SETTINGS}


def fingerprint_model(model: torch.nn.Module, with_adapter: bool) -> str:
    """Of the weights that training starts from; every process must call it.

    Args:
        with_adapter: whether to include the LoRA adapter's weights; a new adapter's follow from the seed.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if with_adapter or ".lora_" not in name]
    weights = ((name, gather_tensor(p)) for name, p in parameters)
    return hash_weights(weights)[:16]
