"""A run's folder: what earlier runs have left in it, whether this one may write to it, and what it replaces."""

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from utils.config import TrainingConfig, UserError
from utils.files import describe_file, make_folder

logger = logging.getLogger(__name__)
PARTIAL_TEXTS = "predictions.partial-*.jsonl"  # there until an evaluation has written all else
MERGED_FROM = "merged_from.json"
MODEL_FILES = (
    "config.json", "generation_config.json", "adapter_config.json",
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "spiece.model",
    "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip
CARD = "README.md"
CARD_MARK = "<!-- Written by the training script, and again by a next run unless this line is removed. -->"
MANIFEST, RESULTS = "run_manifest.json", "results.json"
RUN_FILES = (
    "metrics.jsonl", MANIFEST, "loss_curve.png", *MODEL_FILES,
    "predictions.jsonl", RESULTS, "report.html", "report.md", MERGED_FROM, CARD,
)  # fmt: skip
# Settings that say nothing of what a run leaves.
OF_A_START = (
    "overwrite_output_dir", "overwrite_output_file", "resume_from_checkpoint", "max_time", "preflight",
    "assume_memory", "report_only", "add_to_card",
)  # fmt: skip
UNFINISHED = ".unfinished"  # the end of a folder's name, until it is whole or gone
ASIDE = f"replaced{UNFINISHED}"
UNCHECKED = "export.unchecked"
RUN_FOLDERS = ("last_good_model", UNCHECKED, "tracker", "checkpoints")
# What a run that ended before its first checkpoint leaves; nothing is lost with it.
BEFORE_A_CHECKPOINT = {"metrics.jsonl", "run_manifest.json", UNCHECKED, "tracker", "checkpoints"}


def check_output_dir(config: Any):
    """UserError if a folder that the run writes to holds a run and may not be overwritten, or cannot be written.
    Writes nothing."""
    folder = Path(config.output_dir)
    if not config.output_dir:
        raise UserError("--output_dir is empty")
    check_path(folder, "output_dir")
    for setting in ("model_name_or_path", "adapter_name_or_path"):
        model = getattr(config, setting, None)
        if model and Path(model).is_dir() and Path(model).resolve() == folder.resolve():
            raise UserError(f"--output_dir {folder} is the --{setting}: take another folder")
    for name in ("STOP", *RUN_FILES):
        if (folder / name).is_dir():
            raise UserError(f"--output_dir {folder}: {name} in it is a folder: remove it, or take another")
    held = find_run_files(folder)
    for setting in (
        "model_name_or_path", "adapter_name_or_path", "train_file", "validation_file", "test_file", "predictions_file",
    ):  # fmt: skip
        value = getattr(config, setting, None) or ()
        for name in [value] if isinstance(value, str) else value:
            read = Path(name.rpartition("=")[2] if setting == "predictions_file" else name).resolve()
            if any(path.resolve() in (read, *read.parents) for path in held):
                raise UserError(f"--{setting} {name} lies in what --output_dir {folder} replaces: take another folder")
    if held and not (config.overwrite_output_dir or is_resumed(config, held) or read_finished(config)):
        ways = "take another, or --overwrite_output_dir"
        if hasattr(config, "resume_from_checkpoint") and find_checkpoints(folder):
            ways = f"resume with --resume_from_checkpoint latest, {ways}"
        raise UserError(f"--output_dir {folder} holds a run already ({held[0].name}): {ways}")
    links = [path.name for path in held if path.is_symlink() and path.is_dir()]
    if links and (config.overwrite_output_dir or not find_checkpoints(folder)):
        raise UserError(f"--output_dir {folder}: {links[0]} in it is a link: remove it, or take another folder")
    checkpoint = getattr(config, "resume_from_checkpoint", None)
    if checkpoint and checkpoint != "latest" and folder.resolve() in Path(checkpoint).absolute().parents:
        if not is_in(Path(checkpoint), config.output_dir):
            raise UserError(f"--resume_from_checkpoint {checkpoint}: checkpoints are in {folder / 'checkpoints'}")
    check_writable(folder, "output_dir")
    if getattr(config, "merge_into", None):
        check_merge_dir(config)


def check_merge_dir(config: Any):
    folder = Path(config.merge_into)
    check_path(folder, "merge_into")
    for setting in ("output_dir", "model_name_or_path", "adapter_name_or_path"):
        if not getattr(config, setting):
            continue
        other = Path(getattr(config, setting)).resolve()
        if folder.resolve() in (other, *other.parents) and (setting == "output_dir" or other.exists()):
            raise UserError(f"--merge_into {folder} is or holds the --{setting}: take another folder")
    held = [path for path in find_run_files(folder) if path.name != UNCHECKED]  # left by a kill
    if held and not config.overwrite_output_dir and not is_own_merge(config):
        raise UserError(
            f"--merge_into {folder} holds a run or a model already ({held[0].name}): take another, or "
            "--overwrite_output_dir"
        )
    check_writable(folder, "merge_into")


def is_own_merge(config: Any) -> bool:
    """Whether what --merge_into holds was merged by the run that output_dir holds, which may merge again."""
    try:
        record = json.loads((Path(config.merge_into) / MERGED_FROM).read_bytes())
    except (OSError, ValueError):
        return False
    checkpoint = config.resume_from_checkpoint
    is_resumed = checkpoint == "latest" or (checkpoint and is_in(Path(checkpoint), config.output_dir))
    return bool(is_resumed or read_finished(config)) and record == describe_merge(config)


def describe_merge(config: Any) -> dict[str, str]:
    """What merged_from.json holds."""
    return {"adapter": str(Path(config.output_dir).resolve()), "base": config.model_name_or_path}


def check_path(folder: Path, setting: str):
    try:
        if folder.is_symlink() and not folder.exists():
            raise UserError(f"--{setting} {folder}: a dangling link")
    except OSError as error:  # a name too long
        raise UserError(f"--{setting} {folder}: {error.strerror}") from error


def check_writable(folder: Path, setting: str):
    parent = find_existing(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--{setting} {folder}: cannot write to {parent}")


def find_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there already."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def is_resumed(config: Any, held: list[Path]) -> bool:
    """Whether the run that output_dir holds is the one to resume."""
    if not hasattr(config, "resume_from_checkpoint"):
        return any(Path(config.output_dir).glob(PARTIAL_TEXTS))
    checkpoint = config.resume_from_checkpoint
    if checkpoint == "latest":
        names, begun = {path.name for path in held}, Path(config.output_dir, "checkpoints").glob("*")
        is_new = "run_manifest.json" in names and names <= BEFORE_A_CHECKPOINT
        is_new = is_new and all(re.fullmatch(rf"best_step_\d+|.*{UNFINISHED}", path.name) for path in begun)
        return bool(find_checkpoints(config.output_dir)) or is_new
    return checkpoint is not None and is_in(Path(checkpoint), config.output_dir)


def is_in(checkpoint: Path, output_dir: str) -> bool:
    return checkpoint.absolute().parent.parent.resolve() == Path(output_dir).resolve()  # itself it may be a link


def read_finished(config: Any) -> dict[str, Any] | None:
    """What the same command, by its settings, left as its record when it finished; None if there is no such record."""
    is_training = isinstance(config, TrainingConfig)
    if getattr(config, "resume_from_checkpoint", None) not in (None, "latest"):
        return None
    try:
        record = json.loads((Path(config.output_dir) / (MANIFEST if is_training else RESULTS)).read_bytes())
        has_finished = "finished" in record if is_training else not any(Path(config.output_dir).glob(PARTIAL_TEXTS))
        return record if has_finished and has_settings(record, config) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def has_settings(record: dict[str, Any], config: Any) -> bool:
    """Whether a record's settings are the config's, as far as they say what a run leaves."""
    return all(
        value == "auto" or record["settings"].get(name) == value  # what auto became is in the record
        for name, value in dataclasses.asdict(config).items()
        if name not in OF_A_START
    )


def describe_models(config: Any) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of the models that a training leaves, by the setting that names their folder."""
    folders = {setting: getattr(config, setting, None) for setting in ("output_dir", "merge_into")}
    return {
        setting: {path.name: describe_file(path) for path in find_run_files(Path(folder), MODEL_FILES)}
        for setting, folder in folders.items()
        if folder
    }


def find_run_files(folder: Path, patterns: tuple[str, ...] = (*RUN_FILES, *RUN_FOLDERS)) -> list[Path]:
    """What an earlier run left in the folder; other people's files are not among it."""
    found = [(path, pattern in RUN_FOLDERS) for pattern in patterns for path in folder.glob(pattern)]
    held = [path for path, is_folder in found if path.is_dir() == is_folder]
    return [path for path in held if path.name != CARD or is_own_card(path)]


def is_own_card(path: Path) -> bool:
    return CARD_MARK in path.read_text(encoding="utf-8", errors="replace").splitlines()


def clear_output_dir(accelerator: Accelerator, config: Any):
    """Make output_dir, without what an earlier run left in it. To be called once all that can be wrong is checked."""
    accelerator.wait_for_everyone()  # so that no process still looks for an earlier run
    if accelerator.is_main_process:
        folder = Path(config.output_dir)
        make_folder(folder)
        shutil.rmtree(folder / ASIDE, ignore_errors=True)  # left by a kill
        set_aside(find_run_files(folder), folder / ASIDE)
    accelerator.wait_for_everyone()


def set_aside(paths: list[Path], aside: Path):
    """Remove the files and folders. All are first moved aside, so that one that cannot be moved is found before any is
    deleted."""
    aside.mkdir(exist_ok=True)
    moved = []
    try:
        for path in paths:
            path.rename(aside / path.name)
            moved.append(path)
    except OSError as error:
        for other in moved:
            (aside / other.name).rename(other)
        aside.rmdir()
        raise UserError(f"{path} cannot be replaced: {error.strerror}") from error
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        logger.warning("%s could not be removed whole", aside)


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])


def find_checkpoints(output_dir: str | Path, kind: str = "step") -> list[Path]:
    """Finished checkpoints, the newest first. `kind` is step or best_step."""
    folder = Path(output_dir) / "checkpoints"
    found = [path for path in folder.glob(f"{kind}_*") if re.fullmatch(rf"{kind}_\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def has_checkpoint(output_dir: str | Path, step: int) -> bool:
    return any(step_of(path) == step for path in find_checkpoints(output_dir))
