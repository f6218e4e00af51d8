"""What a run reports: the console, metrics.jsonl, run_manifest.json and a tracker."""

import dataclasses
import io
import json
import logging
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from utils.config import LoraTrainingConfig, TrainingConfig
from utils.data.prefetch import Step
from utils.execution.strategies import name_strategy
from utils.files import append_line, hash_value, write_file, write_json
from utils.launch.output_dir import MANIFEST, clear_output_dir, describe_models, is_in
from utils.launch.script import describe_software
from utils.launch.times import describe_times
from utils.modeling.families import log_attention
from utils.modeling.model_card import write_model_card
from utils.modeling.shapes import count_flops_per_token, count_parameters
from utils.training.optimization import num_train_steps

logger = logging.getLogger(__name__)
FEW_STEPS = 20


class UnwrittenLineError(Exception):
    """A line of metrics.jsonl could not be written; raised on every process."""


@dataclass
class Interval:
    """The updates since the last train line of metrics.jsonl. A checkpoint holds it."""

    loss_sums: torch.Tensor | float = 0.0  # this process's, on the device; see compute_training_losses
    num_computed_tokens: int = 0  # this process's, padding included
    num_updates: int = 0
    num_micro_batches: int = 0  # every process has as many
    num_examples: int = 0  # over all processes, as are the two token counts below
    num_source_tokens: int = 0
    num_target_tokens: int = 0
    seconds_waited: float = 0.0  # this process's, waiting for data
    seconds: float = 0.0  # this process's
    learning_rate: float = 0.0  # the last update's
    grad_norm: float = 0.0  # the last update's, before clipping

    def add(self, step: Step, loss_sums: torch.Tensor, learning_rate: float, grad_norm: float, seconds: float):
        self.loss_sums = self.loss_sums + loss_sums
        self.num_updates += 1
        self.num_micro_batches += len(step.micro_batches)
        for batch in step.micro_batches:
            self.num_computed_tokens += batch["input_ids"].numel() + batch["decoder_input_ids"].numel()
        self.num_examples += step.num_examples
        self.num_source_tokens += step.num_source_tokens
        self.num_target_tokens += step.num_target_tokens
        self.seconds_waited += step.seconds_waited
        self.seconds += step.seconds_waited + seconds
        self.learning_rate, self.grad_norm = learning_rate, grad_norm

    def clear(self):
        vars(self).update(vars(Interval()))

    def gather_sums(self) -> list[list[float]]:
        """Each process's [*loss_sums, num_computed_tokens]; every process must call it."""
        loss_sums = self.loss_sums.tolist() if torch.is_tensor(self.loss_sums) else [0.0, 0.0]
        return gather_object([[*loss_sums, self.num_computed_tokens]])

    def summarize(self, accelerator: Accelerator, model: torch.nn.Module, config: TrainingConfig) -> dict[str, float]:
        """The train line: its losses are means over target tokens; every process must call it."""
        flops_per_source_token, flops_per_target_token = count_flops_per_token(model)
        flops = flops_per_source_token * self.num_source_tokens + flops_per_target_token * self.num_target_tokens
        loss_sum, plain_sum, num_computed_tokens = map(sum, zip(*self.gather_sums(), strict=True))
        plain = {"plain_loss": plain_sum / self.num_target_tokens} if config.label_smoothing_factor else {}
        return {
            "loss": loss_sum / self.num_target_tokens,
            **plain,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "num_examples": self.num_examples,
            "num_target_tokens": self.num_target_tokens,
            "micro_batches_per_update": self.num_micro_batches / self.num_updates,
            "samples_per_second": self.num_examples / self.seconds,
            "target_tokens_per_second": self.num_target_tokens / self.seconds,
            "model_flops_per_second": flops / self.seconds,
            "padding_efficiency": (self.num_source_tokens + self.num_target_tokens) / num_computed_tokens,
            "data_wait_share": self.seconds_waited / self.seconds,
            "peak_memory_mib": measure_peak_memory(accelerator),
        }

    def gather_state(self) -> dict[str, Any]:
        """The interval as JSON values, with each process's own sums so that a resumed run rounds alike. Every process
        must call it."""
        return vars(self) | {"loss_sums": None, "num_computed_tokens": None, "sums": self.gather_sums()}

    @classmethod
    def restore(cls, accelerator: Accelerator, saved: dict[str, Any]) -> "Interval":
        """A checkpoint's interval. If the number of processes has changed, the main process takes the totals."""
        sums = saved["sums"]
        if len(sums) != accelerator.num_processes:
            totals = [sum(column) for column in zip(*sums, strict=True)]
            sums = [totals] + [[0.0, 0.0, 0]] * (accelerator.num_processes - 1)
        *loss_sums, num_computed_tokens = sums[accelerator.process_index]
        loss_sums = torch.tensor(loss_sums, device=accelerator.device)
        values = {name: value for name, value in saved.items() if name != "sums"}
        return cls(**values | {"loss_sums": loss_sums, "num_computed_tokens": num_computed_tokens})


def describe_run(
    config: TrainingConfig, model: torch.nn.Module, train_rows: list[dict], validation_rows: list[dict]
) -> dict[str, Any]:
    """The counts and fingerprints that a run is known by."""
    log_attention(model, config.attn_implementation)
    num_parameters, num_trainable_parameters = count_parameters(model)
    return {
        "num_parameters": num_parameters,
        "num_trainable_parameters": num_trainable_parameters,
        "num_train_examples": len(train_rows),
        "num_train_steps": num_train_steps(config, len(train_rows)),
        "data_fingerprint": hash_value([train_rows, validation_rows]),
    }


def start_run(accelerator: Accelerator, config: TrainingConfig, checkpoint: Path | None, run: dict[str, Any]):
    """Open the run's folder and its tracker, and write run_manifest.json: the settings, the versions and `run`.
    What the folder holds stays there if the run resumes from a checkpoint in it."""
    if checkpoint is None or not is_in(checkpoint, config.output_dir):
        clear_output_dir(accelerator, config)
    settings = dataclasses.asdict(config)
    if accelerator.is_main_process:
        manifest = {
            **run, "num_processes": accelerator.num_processes, "strategy": name_strategy(accelerator),
            "device": accelerator.device.type, "settings": settings, **describe_software(),
        }  # fmt: skip
        write_json(Path(config.output_dir) / MANIFEST, manifest)
        logger.info(", ".join(f"{name} {value:,}" for name, value in run.items() if isinstance(value, int)))
        if run["num_train_steps"] < FEW_STEPS and config.max_train_steps is None:
            text = "only %d update%s; more with --num_train_epochs, or a lower --total_train_batch_size"
            logger.warning(text, run["num_train_steps"], "s" * (run["num_train_steps"] != 1))
        on_cpu = accelerator.device.type == "cpu"
        if on_cpu and config.mixed_precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            logger.warning("this CPU has no instructions for bf16: --mixed_precision no is faster")
    if config.report_to != "none":
        plain = (int, float, str)
        flat = {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}
        project, named = config.project_name, {}
        if config.run_name and config.report_to == "tensorboard":
            project = f"{project}/{config.run_name}"  # the folder's name is the run's
        elif config.run_name:
            named = {"run_name" if config.report_to == "mlflow" else "name": config.run_name}
        accelerator.init_trackers(project, flat, init_kwargs={config.report_to: named})


def log_metrics(accelerator: Accelerator, config: TrainingConfig, step: int, split: str, metrics: dict[str, float]):
    """Append one line to metrics.jsonl, and tell the tracker. UnwrittenLineError if the line cannot be written."""
    error = None
    if accelerator.is_main_process:
        path = Path(config.output_dir) / "metrics.jsonl"
        try:
            append_line(path, json.dumps({"step": step, "split": split, **metrics}))
        except OSError as disk_error:
            error = f"{path}: {disk_error.strerror}"
        logger.info("step %d %s loss %.4f", step, split, metrics["loss"])
    error = broadcast_object_list([error])[0]
    if error:
        raise UnwrittenLineError(error)
    accelerator.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)


def log_samples(accelerator: Accelerator, config: TrainingConfig, step: int, samples: list[tuple[str, str]]):
    """Tell the tracker some (reference, summary), if it takes texts."""
    if samples and config.report_to in ("tensorboard", "wandb", "trackio"):
        text = "\n\n".join(f"reference: {reference}\nsummary: {summary}" for reference, summary in samples)
        accelerator.log({"validation/samples": text}, step=step)


def finish_run(accelerator: Accelerator, config: TrainingConfig, run: dict[str, Any]):
    """Plot the losses, write the model cards, and note in run_manifest.json that this is finished, by which the same
    command repeated knows it. No process may end before the main one, since the launcher would then end all.

    Args:
        run: the identity that checkpoints have.
    """
    if accelerator.is_main_process:
        plot_loss_curve(config.output_dir)
        write_model_card(config, run, Path(config.output_dir), is_adapter=isinstance(config, LoraTrainingConfig))
        if merge_into := getattr(config, "merge_into", None):
            write_model_card(config, run, Path(merge_into), is_adapter=False)
        path = Path(config.output_dir) / MANIFEST
        manifest = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, manifest | {"finished": {"run": run, "models": describe_models(config)}})
        logger.info(describe_times())
    accelerator.wait_for_everyone()


def plot_loss_curve(output_dir: str | Path):
    """Draw the losses in output_dir/metrics.jsonl as output_dir/loss_curve.png."""
    from matplotlib.figure import Figure  # here, for the main process alone: it takes half a second

    lines = (Path(output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    figure = Figure(figsize=(7, 4))  # not pyplot's, which looks for a display
    axes = figure.subplots(gridspec_kw={"left": 0.1, "right": 0.98, "bottom": 0.13, "top": 0.92})
    for split, style in (("train", "-"), ("validation", "o-")):
        points = [(line["step"], line.get("plain_loss", line["loss"])) for line in metrics if line["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=split)
    axes.set(xlabel="optimizer updates", ylabel="loss per target token (nats)", title=Path(output_dir).name)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    write_file(Path(output_dir) / "loss_curve.png", picture.getvalue())


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
