"""`--preflight`: one screen about a run before it starts, without its weights and without touching its folder.

What the scripts do before training has been done by then, on a model without weights: the mistakes it finds are found.
"""

import math
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from utils.config import TrainingConfig, UserError
from utils.data.batching import measure_lengths, plan_pass, plan_steps, round_up
from utils.data.micro_batches import launch_cost_on
from utils.execution.strategies import name_strategy
from utils.launch.output_dir import find_existing, find_run_files
from utils.launch.processes import call_on_main
from utils.modeling.shapes import count_parameters, is_at_hand
from utils.training.checkpoint_files import choose_checkpoint, identity_settings, is_finished
from utils.training.resources.assumed_gpu import assumed_free_memory, estimated_device
from utils.training.resources.batch_size import estimate_batch_size
from utils.training.resources.memory_estimate import MicroBatch, count_bytes, estimate_memory

NUM_STEPS_PLANNED = 50
FINISHED = "this run has finished already: the same command changes nothing"


def report_preflight(
    accelerator: Accelerator,
    config: TrainingConfig,
    model: torch.nn.Module,
    train_data: datasets.Dataset,
    validation_data: datasets.Dataset | None,
    run: dict[str, Any],
):
    """Print the screen once; UserError, on every process, if the run cannot start."""
    lengths = measure_lengths(train_data)
    free = min(gather_object([measure_free_memory(accelerator, config)]))
    if config.per_device_train_batch_size == "auto":
        config = estimate_batch_size(accelerator, model, lengths, config, free)
    micro_batches = plan_first_steps(accelerator, config, lengths, run["num_train_steps"])

    def report():
        num_examples, num_steps = min(config.total_train_batch_size, len(train_data)), run["num_train_steps"]
        place = describe_output_dir(config, run)
        lines = describe_start(accelerator, config, model, place)
        lines += describe_data(config, {"train": train_data, "validation": validation_data})
        lines += describe_plan(config, micro_batches, num_examples, num_steps)
        memory_lines, needed = describe_memory(
            accelerator, config, model, micro_batches, validation_data, num_steps, free
        )
        disk_lines, problem = describe_disk(config, model, validation_data, num_steps)
        if needed > free:
            problem = (
                f"out of memory: a process is estimated to need {format_bytes(needed)}, and {format_bytes(free)} are "
                "free for each; lower --per_device_train_batch_size, set --gradient_checkpointing, or see "
                "accelerate_configs/ for sharding"
            )
        verdict = "it cannot start: see the error" if problem else FINISHED if place == FINISHED else "it can start"
        lines += [*memory_lines, *disk_lines, "", f"verdict     {verdict}"]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        if problem:
            raise UserError(problem)

    call_on_main(accelerator, report)
    accelerator.wait_for_everyone()  # the launcher ends all when one process fails on its way out


def plan_first_steps(
    accelerator: Accelerator, config: TrainingConfig, lengths: np.ndarray, num_steps: int
) -> list[list[MicroBatch]]:
    """Of each process its micro-batches of the run's first steps."""
    size = config.per_device_train_batch_size
    steps = range(min(num_steps, NUM_STEPS_PLANNED))
    rank, world = accelerator.process_index, accelerator.num_processes
    launch_cost = launch_cost_on(estimated_device(accelerator, config))
    padded = round_up(lengths, config.length_multiple)
    plan = plan_steps(padded, config.total_train_batch_size, size, config.seed, rank, world, launch_cost, steps)
    shapes = [measure_micro_batch_shape(lengths[indices], config.length_multiple) for step in plan for indices in step]
    return gather_object([shapes])


def measure_micro_batch_shape(lengths: np.ndarray, multiple: int = 1) -> MicroBatch:
    """An empty one is one row of padding."""
    source, target = round_up(lengths.max(axis=0, initial=1), multiple).tolist()
    return MicroBatch(max(1, len(lengths)), source, target, *lengths.sum(axis=0).tolist())


def find_largest(micro_batches: Iterable[MicroBatch]) -> MicroBatch:
    return max(micro_batches, key=lambda micro_batch: micro_batch.num_computed_tokens)


def measure_free_memory(accelerator: Accelerator, config: TrainingConfig) -> int:
    """Bytes for this process: of its GPU, real or assumed, or its share of the machine's memory."""
    if config.assume_memory:
        return assumed_free_memory(config)
    if accelerator.device.type == "cuda":
        return torch.cuda.mem_get_info(accelerator.device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def describe_start(
    accelerator: Accelerator, config: TrainingConfig, model: torch.nn.Module, output_dir: str
) -> list[str]:
    num_parameters, num_trained = count_parameters(model)
    place = "in the hub's cache" if is_at_hand(config.model_name_or_path) else "to be downloaded from the hub"
    if Path(config.model_name_or_path).is_dir():
        place = "a folder"
    device = f"a GPU of {config.assume_memory}, assumed" if config.assume_memory else accelerator.device.type
    machines = int(os.environ.get("WORLD_SIZE", 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    strategy = name_strategy(accelerator)
    strategy = f"{strategy}, " if strategy != "NO" else ""
    return [
        f"processes   {accelerator.num_processes} on {machines} machine{'s' * (machines > 1)}, {strategy}{device}, "
        f"--mixed_precision {config.mixed_precision}",
        f"model       {config.model_name_or_path}, {model.config.model_type}, {place}",
        f"parameters  {num_parameters:,}, of which {num_trained:,} are trained ({num_trained / num_parameters:.2%})",
        f"output_dir  {config.output_dir}: {output_dir}",
    ]


def describe_output_dir(config: TrainingConfig, run: dict[str, Any]) -> str:
    """UserError for a checkpoint that is damaged or of another run, but for the weights that it started from."""
    if is_finished(config, identity_settings(config) | run, unknown=("model_fingerprint",)):
        return FINISHED
    if config.resume_from_checkpoint:
        found = choose_checkpoint(config, identity_settings(config) | run, unknown=("model_fingerprint",))
        if found:
            return f"the run resumes from {found[0].name}, of {run['num_train_steps']} updates"
    folder = Path(config.output_dir)
    if find_run_files(folder):
        return "holds a run, which will be replaced"
    return "is there, and holds no run" if folder.is_dir() else "is made when the run starts"


def describe_data(config: TrainingConfig, data: dict[str, datasets.Dataset | None]) -> list[str]:
    lines = ["", f"{'data':26}{'rows':>8}  tokens  {'mean':>6} {'95 %':>6} {'longest':>8}  truncated"]
    for split, dataset in data.items():
        file = getattr(config, f"{split}_file")
        name = Path(file).name if file else config.dataset_name
        if dataset is None:
            lines.append(f"{split}: none; there is no validation loss")
            continue
        for column, kind in (("uncut_source_length", "source"), ("uncut_target_length", "target")):
            lengths, limit = np.array(dataset[column]), getattr(config, f"max_{kind}_length")
            head = f"{split}: {name}"[:26] if kind == "source" else ""
            rows = f"{len(dataset):,}" if kind == "source" else ""
            lines.append(
                f"{head:26}{rows:>8}  {kind:6}  {lengths.mean():6.0f} {np.percentile(lengths, 95):6.0f} "
                f"{lengths.max():8,}  {(lengths > limit).sum():,} at {limit:,}"
            )
    return lines


def describe_plan(
    config: TrainingConfig, micro_batches: list[list[MicroBatch]], num_examples: int, num_steps: int
) -> list[str]:
    everywhere = [micro_batch for share in micro_batches for micro_batch in share]
    num_planned = min(num_steps, NUM_STEPS_PLANNED)
    per_update = len(micro_batches[0]) / num_planned
    efficiency = sum(m.num_tokens for m in everywhere) / sum(m.num_computed_tokens for m in everywhere)
    largest = find_largest(everywhere)
    return [
        "",
        f"steps       {num_steps:,} updates of {num_examples:,} examples; validation every "
        f"{config.eval_steps:,}, a checkpoint every {config.checkpointing_steps:,}",
        f"plan        {per_update:.1f} micro-batches per update and process, of at most the tokens of "
        f"{config.per_device_train_batch_size} examples of full length",
        f"            {efficiency:.3f} of the computed tokens are no padding, in the first {num_planned} updates",
        f"            largest micro-batch: {largest.num_examples} examples of up to {largest.source_length:,} source "
        f"and {largest.target_length:,} target tokens",
    ]


def describe_memory(
    accelerator: Accelerator,
    config: TrainingConfig,
    model: torch.nn.Module,
    micro_batches: list[list[MicroBatch]],
    validation_data: datasets.Dataset | None,
    num_steps: int,
    free: int,
) -> tuple[list[str], int]:
    """Lines, and the bytes that a process needs."""
    device = estimated_device(accelerator, config)
    largest, validation = find_largest(m for share in micro_batches for m in share), None
    if validation_data:
        lengths = measure_lengths(validation_data)
        plan = plan_pass(
            lengths,
            config.eval_batch_size,
            0,
            accelerator.num_processes,
            launch_cost_on(device),
        )
        validation = find_largest(measure_micro_batch_shape(lengths[indices]) for indices in plan)
    parts, moments = estimate_memory(accelerator, model, config, largest, validation, len(micro_batches[0]) > 1)
    if device.type == "cpu" and num_steps > config.checkpointing_steps:
        parts["a checkpoint being written"] = 3 * count_bytes(model)[1]  # its copy, while training continues
    moments = {"a gradient being computed, the sum": sum(parts.values())} | moments
    lines = ["", "memory of a process, estimated"]
    lines += [f"  {name:44}{format_bytes(size):>10}" for name, size in parts.items() if size]
    lines += [f"  {name:44}{format_bytes(size):>10}" for name, size in moments.items()]
    return [*lines, f"  {'free':44}{format_bytes(free):>10}"], max(moments.values())


def describe_disk(
    config: TrainingConfig, model: torch.nn.Module, validation_data: datasets.Dataset | None, num_steps: int
) -> tuple[list[str], str | None]:
    """Lines, and what is wrong if a disk is too small. What an earlier run left in output_dir is replaced."""
    _, trained = count_bytes(model)
    # One more than are kept: the oldest goes when the newest is there. Weights and two moments each.
    num_checkpoints = min(math.ceil(num_steps / config.checkpointing_steps), config.checkpoints_total_limit + 1)
    num_best = min(math.ceil(num_steps / config.eval_steps), 2) if validation_data else 0
    folder = Path(config.output_dir)
    held = [path for found in find_run_files(folder) for path in (found, *found.rglob("*")) if path.is_file()]
    disk = find_existing(folder)
    free = shutil.disk_usage(disk).free + sum(path.stat().st_size for path in held)
    content = f"checkpoints {num_checkpoints}, best models {num_best}, the export"
    disks = [[f"--output_dir {folder}", content, (3 * num_checkpoints + num_best + 1) * trained, free]]
    if merge_into := getattr(config, "merge_into", None):
        merge_disk, size = find_existing(Path(merge_into)), 4 * sum(p.numel() for p in model.parameters())
        if merge_disk.stat().st_dev == disk.stat().st_dev:
            disks[0][1] += ", the merged model"
            disks[0][2] += size
        else:
            free = shutil.disk_usage(merge_disk).free
            disks.append([f"--merge_into {merge_into}", "the merged model", size, free])
    lines, problem = [""], None
    for setting, content, needed, free in disks:
        lines.append(f"disk        {format_bytes(needed)}: {content}; {format_bytes(free)} free")
        if needed > free and not problem:
            problem = f"{setting}: {content}: {format_bytes(needed)} needed, {format_bytes(free)} free"
            problem += "; lower --checkpoints_total_limit" * setting.startswith("--output_dir") + "; take another disk"
    return lines, problem


def format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
