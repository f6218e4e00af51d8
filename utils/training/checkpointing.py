"""Save and resume a run. The folders are those of checkpoint_files.py.

A checkpoint is taken before the evaluation of its step, which a resumed run repeats. Randomness needs no state: it is
reseeded in each step.
"""

import contextlib
import logging
import shutil
import sys
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

from utils.config import TrainingConfig, UserError
from utils.execution.passes import unwrap
from utils.execution.sharding import gather_moments, gather_tensor, set_moments, set_parameter
from utils.execution.strategies import name_strategy
from utils.files import write_file
from utils.launch.locks import lock_output_dir
from utils.launch.output_dir import UNFINISHED, find_checkpoints, has_checkpoint
from utils.launch.processes import call_on_main
from utils.launch.stopping import EXIT_STOPPED, StopRequest
from utils.launch.times import timed
from utils.training.checkpoint_files import (
    CheckpointWriter,
    choose_checkpoint,
    find_best,
    fingerprint_model,
    identity_settings,
    is_finished,
    remove_checkpoint,
)
from utils.training.tracking import Interval, finish_trackers

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores one run. Every process has one; only the main one writes."""

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, model: torch.nn.Module, run: dict[str, Any]):
        """Find the checkpoint to resume from, on all processes alike: `folder` is None for a new run. SystemExit if
        this run has finished already.

        Args:
            model: with the weights that training starts from.
            run: what tracking.describe_run says of it.
        """
        self.accelerator, self.config = accelerator, config
        self.output_dir, self.checkpoints_dir = Path(config.output_dir), Path(config.output_dir) / "checkpoints"
        fingerprint = fingerprint_model(model, with_adapter=getattr(config, "adapter_name_or_path", None) is not None)
        self.run = run = {**identity_settings(config), "model_fingerprint": fingerprint, **run}
        locks = lock_output_dir(accelerator, config)
        weakref.finalize(self, locks.close)
        if call_on_main(accelerator, lambda: is_finished(config, run)):
            if accelerator.is_main_process:
                logger.info(
                    "the run in %s has finished already; --overwrite_output_dir starts it over", self.output_dir
                )
            sys.exit()
        # The best may be of a later step than the checkpoint: the resumed run reaches that step again. It is
        # {"step": , "value": }, the lower the better.
        self.folder, self.state, self.best_folder, self.best = call_on_main(accelerator, self.find_checkpoint)
        self.last_step = self.state["step"] if self.state else 0
        is_here = self.folder and self.folder.parent.resolve() == self.checkpoints_dir.resolve()
        self.last_saved = self.last_step if is_here else 0  # into output_dir
        same = self.state and self.state["num_processes"] == accelerator.num_processes
        self.batch_size = self.state["per_device_train_batch_size"] if same else None  # None if it is free to choose
        self.writer = CheckpointWriter(self.output_dir, config.checkpoints_total_limit)

    def find_checkpoint(self) -> tuple[Path | None, dict[str, Any] | None, Path | None, dict[str, Any] | None]:
        """(folder, state) of the checkpoint to resume from, and of the best model beside it."""
        if not self.config.resume_from_checkpoint:
            return None, None, None, None
        folder, state = choose_checkpoint(self.config, self.run) or (None, None)
        return folder, state, *(find_best(folder.parent) if folder else (None, None))

    def restore(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        batch_size: int,
    ) -> Interval:
        """Set everything to the checkpoint's values, and metrics.jsonl too; returns the open interval. `save` will
        read from the same objects."""
        self.model, self.optimizer, self.lr_scheduler, self.batch_size = model, optimizer, lr_scheduler, batch_size
        self.interval = Interval.restore(self.accelerator, self.state["interval"]) if self.state else Interval()
        if self.accelerator.is_main_process:
            (self.output_dir / "STOP").unlink(missing_ok=True)  # it was meant for an earlier start
            for path in self.checkpoints_dir.glob(f"*{UNFINISHED}"):
                shutil.rmtree(path, ignore_errors=True)
        if self.folder is None:
            return self.interval
        if self.accelerator.is_main_process:
            # A kill may have prevented this cleanup.
            self.writer.remove_older(self.last_step)
            for path in find_checkpoints(self.output_dir, "best_step") if self.best_folder else ():
                if path.name != self.best_folder.name:
                    remove_checkpoint(path)
        if not self.folder.is_dir():  # the main process has verified it
            raise UserError(f"{self.folder} cannot be seen by every process: --output_dir must be on a shared disk")
        self.load_weights(self.folder)
        parameters = trainable_parameters(model)
        set_moments(self.accelerator, optimizer, parameters, load_file(self.folder / "optimizer.safetensors"))
        lr_scheduler.load_state_dict(self.state["lr_scheduler"])
        for group, learning_rate in zip(optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        if self.accelerator.is_main_process:
            metrics = (self.folder / "metrics.jsonl").read_bytes()
            write_file(self.output_dir / "metrics.jsonl", metrics)
            logger.info("resuming from %s", self.folder)
            text = "it was written with %s %s, here it is %s: the same training to rounding, not to the bit"
            for name, here in self.describe_processes().items():
                if self.state[name] != here:
                    logger.info(text, name, self.state[name], here)
        self.accelerator.wait_for_everyone()
        return self.interval

    def load_weights(self, folder: Path):
        weights = load_file(folder / "model.safetensors")
        for name, parameter in trainable_parameters(self.model).items():
            set_parameter(parameter, weights[name])

    @timed("checkpoints")
    def save(self, step: int):
        """Save the state after `step` updates, unless that is done. Training waits for the copy of the tensors, not
        for the disk."""
        if step == self.last_saved:
            return
        started = time.perf_counter()
        interval = self.interval.gather_state()
        self.last_step = self.last_saved = step
        self.writer.wait()  # before there is a second copy in memory
        self.accelerator.wait_for_everyone()  # DeepSpeed's own process group waits for ten minutes only
        parameters = trainable_parameters(self.model)
        tensors = {
            "model": self.copy((name, gather_tensor(parameter)) for name, parameter in parameters.items()),
            "optimizer": self.copy(gather_moments(self.accelerator, self.optimizer, parameters)),
        }
        if not self.accelerator.is_main_process:
            return
        resume_state = {"lr_scheduler": self.lr_scheduler.state_dict(), "interval": interval}
        self.writer.write(self.checkpoints_dir / f"step_{step:06d}", tensors, self.describe_state(step) | resume_state)
        logger.info("step %d checkpoint, training waited %.2f s", step, time.perf_counter() - started)

    @timed("checkpoints")
    def save_if_best(self, step: int, value: float):
        """Keep these weights if no earlier validation gave a lower `value`."""
        if self.best and self.best["value"] <= value:
            return
        self.best, self.best_folder = {"step": step, "value": value}, self.checkpoints_dir / f"best_step_{step:06d}"
        self.writer.wait()
        self.accelerator.wait_for_everyone()
        parameters = trainable_parameters(self.model)
        copies = self.copy((name, gather_tensor(parameter)) for name, parameter in parameters.items())
        if self.accelerator.is_main_process:
            self.writer.write(self.best_folder, {"model": copies}, self.describe_state(step))

    def stop(self, request: StopRequest, error: str | None = None) -> NoReturn:
        """Leave the run to be resumed: SystemExit with EXIT_STOPPED, or UserError if it is an error that ends it or if
        nothing could be written."""
        failure = self.writer.wait()
        written = self.last_step == 0 or has_checkpoint(self.output_dir, self.last_step)
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):
                request.file.unlink(missing_ok=True)  # it has been heard
        failure, written = broadcast_object_list([failure, written])
        if not written:
            text = f"stopped after step {self.last_step}, but its checkpoint could not be written: {failure}"
            raise UserError(f"{error}; {text}" if error else text)
        if self.accelerator.is_main_process and not error:
            logger.info("stopped after step %d; resume with --resume_from_checkpoint latest", self.last_step)
        self.accelerator.wait_for_everyone()
        finish_trackers(self.accelerator)
        if error and self.last_step == 0:
            raise UserError(f"{error}; no update has been done")
        if error:
            raise UserError(f"{error}; step {self.last_step} is saved, resume with --resume_from_checkpoint latest")
        sys.exit(EXIT_STOPPED)

    @timed("checkpoints")
    def finish(self):
        """Wait for what is being written, take the best weights if that is asked for, and let go of the model."""
        self.writer.wait()
        if self.config.load_best_model_at_end:
            self.load_best()
        del self.model, self.optimizer, self.lr_scheduler  # a merge needs their memory

    def load_best(self):
        """Load the best weights; if they are lost, warn and keep what there is."""
        if self.accelerator.is_main_process:
            kept = find_best(self.best_folder.parent) if self.best_folder else (None, None)
            if kept[1] != self.best:
                logger.warning("the best model, of step %d, could not be kept", self.best["step"])
            self.best_folder, self.best = kept
        self.best_folder, self.best = broadcast_object_list([self.best_folder, self.best])
        if self.best:
            self.load_weights(self.best_folder)
        if self.accelerator.is_main_process:
            logger.info("the model is that of step %d", self.best["step"] if self.best else self.last_step)

    def copy(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """CPU copies of `tensors` on the main process. Every process must call it, to gather sharded ones."""
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors
            if self.accelerator.is_main_process
        }

    def describe_state(self, step: int) -> dict[str, Any]:
        return {"step": step, "run": self.run, "best": self.best, **self.describe_processes()}

    def describe_processes(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be bit-identical; otherwise it is the same to rounding."""
        return {
            "num_processes": self.accelerator.num_processes,
            "strategy": name_strategy(self.accelerator),
            "per_device_train_batch_size": self.batch_size,
        }


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}
