"""Checkpoints that are there whole or not at all, and a resume that knows whose they are.

    checkpoints/step_000010/       model.safetensors       what is trained: all weights, or the adapter alone
                                   optimizer.safetensors   AdamW's moments, PARAMETER.exp_avg and so on
                                   state.json              the step, the schedule, the open interval, whose run it is
                                   metrics.jsonl           the record up to this step
                                   manifest.json           size and SHA-256 of each file
    checkpoints/best_step_000010/  the same without the optimizer, for the best validation so far

A checkpoint is taken before the evaluation of its step, which a resumed run repeats. Randomness needs no state: it is
reseeded in each step.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.config import TrainingConfig, UserError
from utils.stopping import EXIT_STOPPED, StopRequest

logger = logging.getLogger(__name__)
UNFINISHED = ".unfinished"
SUMS_OF_A_PROCESS = ("loss_sum", "num_computed_tokens")  # of an open interval; of the others, the main one's count
# Settings that make a run what it is; with others it would not go on but be another one.
IDENTITY_SETTINGS = (
    "total_train_batch_size", "seed", "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_ratio",
    "max_grad_norm", "max_source_length", "max_target_length", "mixed_precision", "metric_for_best_model",
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
)  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint is not what was written; the text says which file and why."""


def describe_run(config: TrainingConfig, model: torch.nn.Module) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that goes on from it, beside its data and its number of steps."""
    settings = {name: getattr(config, name) for name in IDENTITY_SETTINGS if hasattr(config, name)}
    return {**settings, "model_fingerprint": fingerprint_model(model)}


def fingerprint_model(model: torch.nn.Module) -> str:
    """Of the weights that training starts from, without a LoRA adapter's: names, shapes and sums of their bits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            bits = parameter.detach().contiguous().view(torch.int16 if parameter.element_size() == 2 else torch.int32)
            digest.update(f"{name} {tuple(parameter.shape)} {bits.sum(dtype=torch.int64).item()}\n".encode())
    return digest.hexdigest()[:16]


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])


def find_checkpoints(output_dir: str | Path, kind: str = "step") -> list[Path]:
    """Finished checkpoints, the newest first. `kind` is step or best_step."""
    folder = Path(output_dir) / "checkpoints"
    found = [path for path in folder.glob(f"{kind}_*") if re.fullmatch(rf"{kind}_\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def find_checkpoint(output_dir: str | Path, step: int) -> bool:
    return any(step_of(path) == step for path in find_checkpoints(output_dir))


def write_checkpoint(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict, metrics: bytes):
    """Write `folder` whole or not at all: beside it, flushed to disk, then renamed."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for name, of_file in tensors.items():
            write_tensors(unfinished / f"{name}.safetensors", of_file)
        (unfinished / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        (unfinished / "metrics.jsonl").write_bytes(metrics)
        files = {path.name: describe_file(path) for path in sorted(unfinished.iterdir())}
        manifest = {"files": files, "sha256": hash_json(files)}
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            flush_to_disk(path)
        if folder.exists():  # the run has gone on from before it, or it is damaged
            remove_checkpoint(folder, ".replaced")
        unfinished.rename(folder)
        for path in (folder.parent, folder.parent.parent):
            flush_to_disk(path)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]):
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        raise OSError(f"{path.name}: {error}") from error  # a full disk, which safetensors does not raise as one


def describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flush_to_disk(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint's state. CheckpointError unless every file is, byte for byte, what was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["sha256"] != hash_json(manifest["files"]):
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


def choose_checkpoint(config: TrainingConfig, run: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `--resume_from_checkpoint` means, and its state; None for `latest` where there is none yet.
    UserError if it is damaged or of another run."""
    if config.resume_from_checkpoint != "latest":
        candidates = [Path(config.resume_from_checkpoint)]
        if not os.path.isdir(candidates[0]):
            raise UserError(f"--resume_from_checkpoint {candidates[0]}: no such folder")
        if not re.fullmatch(r"step_\d+", candidates[0].name):
            raise UserError(
                f"--resume_from_checkpoint {candidates[0]}: its name is not that of a checkpoint, step_..."
            )
    else:
        candidates = find_checkpoints(config.output_dir)
        if not candidates:
            return None
    damage = []
    for folder in candidates:
        try:
            state = verify_checkpoint(folder)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        for text in damage:
            logger.warning("%s: going on from %s", text, folder.name)
        for name in dict.fromkeys([*run, *state["run"]]):
            if (here := run.get(name)) != (there := state["run"].get(name)):
                raise UserError(
                    f"--resume_from_checkpoint {folder}: it is of another run: {name} was {there} and is {here}"
                )
        return folder, state
    raise UserError(f"--resume_from_checkpoint {config.resume_from_checkpoint}: {'; '.join(damage)}")


def find_best(folder: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The best model that lies, undamaged, in a folder of checkpoints, and {"step": , "value": } of it."""
    found = []
    for path in find_checkpoints(folder.parent, "best_step"):
        try:
            found.append((path, verify_checkpoint(path)["best"]))
        except CheckpointError as error:
            logger.warning("%s", error)
    return min(found, key=lambda pair: pair[1]["value"], default=(None, None))


class Checkpointer:
    """Saves and restores one run. Every process has one; only the main one writes, in a thread of its own."""

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, run: dict[str, Any]):
        """Find where to go on, on all processes alike: `folder` is None for a run from the beginning."""
        self.accelerator, self.config, self.run = accelerator, config, run
        self.folder, self.state, error = None, None, None
        # What lies there may be of a later step than the checkpoint: the run will come by it again.
        self.best_folder, self.best = None, None  # {"step": , "value": }, the lower the better
        if config.resume_from_checkpoint and accelerator.is_main_process:
            try:
                self.folder, self.state = choose_checkpoint(config, run) or (None, None)
                if self.folder:
                    self.best_folder, self.best = find_best(self.folder.parent)
            except UserError as user_error:
                error = str(user_error)
        found = [self.folder, self.state, self.best_folder, self.best, error]
        self.folder, self.state, self.best_folder, self.best, error = broadcast_object_list(found)
        if error:
            raise UserError(error)
        self.last_step = self.state["step"] if self.state else 0
        same = self.state and self.state["num_processes"] == accelerator.num_processes
        self.batch_size = self.state["per_device_train_batch_size"] if same else None  # what `auto` found
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing: Future | None = None

    @property
    def parent(self) -> Path:
        return Path(self.config.output_dir) / "checkpoints"

    def restore(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ) -> Counter:
        """Set everything to the checkpoint's values, and metrics.jsonl too; returns the open interval."""
        if self.accelerator.is_main_process:
            (Path(self.config.output_dir) / "STOP").unlink(missing_ok=True)  # it was meant for an earlier start
            for path in self.parent.glob(f"*{UNFINISHED}"):
                shutil.rmtree(path, ignore_errors=True)
        if self.folder is None:
            return Counter()
        if self.accelerator.is_main_process:
            # Which a kill may have prevented.
            self.remove_older(self.last_step)
            for path in find_checkpoints(self.config.output_dir, "best_step") if self.best_folder else ():
                if path.name != self.best_folder.name:
                    remove_checkpoint(path)
        if not self.folder.is_dir():  # the main process has verified it
            raise UserError(f"{self.folder} cannot be seen by every process: --output_dir must be on a shared disk")
        self.load_weights(model, self.folder)
        moments = load_file(self.folder / "optimizer.safetensors")
        for name, parameter in trainable_parameters(self.accelerator, model).items():
            of_parameter = {key: moments[f"{name}.{key}"] for key in self.state["optimizer_keys"]}
            # Fused AdamW wants its step counter beside the weights.
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in of_parameter.items()}
        lr_scheduler.load_state_dict(self.state["lr_scheduler"])
        for group, learning_rate in zip(optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        interval = self.restore_interval()
        if self.accelerator.is_main_process:
            metrics = Path(self.config.output_dir) / "metrics.jsonl"
            unfinished = metrics.with_name(metrics.name + ".part")
            unfinished.write_bytes((self.folder / "metrics.jsonl").read_bytes())
            unfinished.replace(metrics)
            logger.info("going on from %s", self.folder)
            if self.state["num_processes"] != self.accelerator.num_processes:
                logger.info(
                    "it was written by %d processes, here are %d: the same training to rounding, not to the bit",
                    self.state["num_processes"], self.accelerator.num_processes,
                )  # fmt: skip
        self.accelerator.wait_for_everyone()
        return interval

    def restore_interval(self) -> Counter:
        """Each process its own sums, for their sum to be rounded as ever; of other processes, the main one all."""
        interval = Counter(self.state["interval"])
        for name in SUMS_OF_A_PROCESS if interval else ():
            of_each, index = interval[name], self.accelerator.process_index
            if len(of_each) == self.accelerator.num_processes:
                interval[name] = of_each[index]
            else:
                interval[name] = sum(of_each) if index == 0 else 0.0
        return interval

    @torch.no_grad()
    def load_weights(self, model: torch.nn.Module, folder: Path):
        weights = load_file(folder / "model.safetensors")
        for name, parameter in trainable_parameters(self.accelerator, model).items():
            parameter.copy_(weights[name])

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        interval: Counter,
        batch_size: int,
    ):
        """Take the state after `step` updates. Training waits for the copy of the tensors, not for the disk."""
        started = time.perf_counter()
        sums = dict(interval)
        if interval:
            parts = [torch.as_tensor(sums[name], dtype=torch.float32) for name in SUMS_OF_A_PROCESS]
            parts = torch.stack([part.to(self.accelerator.device) for part in parts])
            for name, of_each in zip(SUMS_OF_A_PROCESS, self.accelerator.gather(parts[None]).T.tolist(), strict=True):
                sums[name] = of_each
        self.last_step = step
        if not self.accelerator.is_main_process:
            return
        self.wait()  # before there is a second copy in memory
        parameters = trainable_parameters(self.accelerator, model)
        moments = {
            f"{name}.{key}": copy_to_cpu(value)
            for name, parameter in parameters.items()
            for key, value in optimizer.state[parameter].items()
        }
        state = self.describe_state(step) | {
            "optimizer_keys": list(next(iter(optimizer.state.values()))),
            "lr_scheduler": lr_scheduler.state_dict(),
            "interval": sums,
            "per_device_train_batch_size": batch_size,
        }
        tensors = {"model": {name: copy_to_cpu(p) for name, p in parameters.items()}, "optimizer": moments}
        self.write(self.parent / f"step_{step:06d}", tensors, state)
        logger.info("step %d checkpoint, training waited %.2f s", step, time.perf_counter() - started)

    def save_if_best(self, step: int, model: torch.nn.Module, value: float):
        """Keep these weights if no earlier validation gave a lower `value`."""
        if self.best and self.best["value"] <= value:
            return
        self.best, self.best_folder = {"step": step, "value": value}, self.parent / f"best_step_{step:06d}"
        if self.accelerator.is_main_process:
            self.wait()
            parameters = trainable_parameters(self.accelerator, model)
            tensors = {"model": {name: copy_to_cpu(parameter) for name, parameter in parameters.items()}}
            self.write(self.best_folder, tensors, self.describe_state(step))

    def stop(self, request: StopRequest) -> NoReturn:
        """Leave the run to be gone on with: SystemExit with EXIT_STOPPED, or UserError if nothing could be written."""
        failure = self.wait()
        written = self.last_step == 0 or find_checkpoint(self.config.output_dir, self.last_step)
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):
                request.file.unlink(missing_ok=True)  # it has been heard
        failure, written = broadcast_object_list([failure, written])
        if not written:
            raise UserError(f"stopped after step {self.last_step}, but its checkpoint could not be written: {failure}")
        if self.accelerator.is_main_process:
            logger.info("stopped after step %d; go on with --resume_from_checkpoint latest", self.last_step)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        sys.exit(EXIT_STOPPED)

    def finish(self, model: torch.nn.Module):
        """Wait for what is being written, and take the best weights if that is asked for. If they are lost, the last
        ones are better than none."""
        self.wait()
        if not self.config.load_best_model_at_end:
            return
        if self.accelerator.is_main_process:
            kept = find_best(self.best_folder.parent) if self.best_folder else (None, None)
            if kept[1] != self.best:
                logger.warning("the best model, of step %d, could not be kept", self.best["step"])
            self.best_folder, self.best = kept
        self.best_folder, self.best = broadcast_object_list([self.best_folder, self.best])
        if self.best:
            self.load_weights(model, self.best_folder)
        if self.accelerator.is_main_process:
            logger.info("the model is that of step %d", self.best["step"] if self.best else self.last_step)

    def describe_state(self, step: int) -> dict[str, Any]:
        num_processes = self.accelerator.num_processes
        return {"step": step, "run": self.run, "best": self.best, "num_processes": num_processes}

    def write(self, folder: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]):
        """Hand over to the thread; what becomes of it is said by `wait`."""
        path = Path(self.config.output_dir) / "metrics.jsonl"
        metrics = path.read_bytes() if path.exists() else b""
        self.writing = self.thread.submit(self.write_and_rotate, folder, tensors, state, metrics)

    def wait(self) -> str | None:
        """Until the thread has written what it was given. What the disk said if that failed; training can go on."""
        if self.writing is None:
            return None
        writing, self.writing = self.writing, None
        try:
            return writing.result()
        except OSError as error:
            kept = find_checkpoints(self.config.output_dir)
            text = f"{error.strerror or error}; the newest checkpoint is {kept[0].name if kept else 'none'}"
            logger.warning("a checkpoint could not be written: %s", text)
            return text

    def write_and_rotate(self, folder: Path, tensors: dict, state: dict, metrics: bytes):
        write_checkpoint(folder, tensors, state, metrics)
        # Only now that it is there.
        if folder.name.startswith("best"):
            for path in find_checkpoints(self.config.output_dir, "best_step"):
                if path != folder:
                    remove_checkpoint(path)
        else:
            self.remove_older(state["step"])

    def remove_older(self, step: int):
        """Keep checkpoints_total_limit with that of `step`, and any newer, left by a run gone on with from before."""
        older = [path for path in find_checkpoints(self.config.output_dir) if step_of(path) < step]
        for path in older[self.config.checkpoints_total_limit - 1 :]:
            remove_checkpoint(path)


def remove_checkpoint(folder: Path, suffix: str = ""):
    """By another name first, so that a kill in the middle leaves nothing that looks like a checkpoint."""
    unfinished = folder.with_name(folder.name + suffix + UNFINISHED)
    try:
        folder.rename(unfinished)
        shutil.rmtree(unfinished)
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error.strerror)


def copy_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def trainable_parameters(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
