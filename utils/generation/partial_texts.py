"""Texts that are generated already, kept beside the output until it is written, so that an evaluation, or
summarize.py, resumes when it was stopped.

Each process appends a line for each finished batch to a file of its own, PREFIX-0.jsonl and so on. A line's key says
all that the texts follow from, so that they are taken up only where the same would come out.
"""

import json
import logging
import re
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.data.tokens import describe_tokenizer
from utils.files import append_line, hash_value, hash_weights, make_folder

logger = logging.getLogger(__name__)


class Summary(NamedTuple):
    text: str
    truncated: bool | None  # cut at max_new_tokens; None where nobody knows
    source_truncated: bool = False  # the prompt was cut at max_source_length


def find_partial_files(prefix: Path) -> list[Path]:
    if not prefix.parent.is_dir():
        return []
    pattern = re.compile(rf"{re.escape(prefix.name)}-\d+\.jsonl")
    return sorted(path for path in prefix.parent.iterdir() if pattern.fullmatch(path.name))


def read_batches(accelerator: Accelerator, prefix: Path) -> dict[str, list[Summary]]:
    """The summaries of each batch in the files, by the batch's key; the same on every process."""
    batches = {}
    if accelerator.is_main_process:
        for path in find_partial_files(prefix):
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    entry = json.loads(line)
                    if entry["sha256"] == hash_value(entry["summaries"]):
                        batches[entry["key"]] = [Summary(*summary) for summary in entry["summaries"]]
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue  # empty, or torn when the process was killed, as is one with a wrong hash
    return broadcast_object_list([batches])[0]


def append_batch(accelerator: Accelerator, prefix: Path, key: str, summaries: list[Summary]):
    make_folder(prefix.parent)
    path = Path(f"{prefix}-{accelerator.process_index}.jsonl")
    line = {"key": key, "summaries": summaries, "sha256": hash_value(summaries)}
    try:
        # A line break before it as well: the line before may be torn.
        append_line(path, "\n" + json.dumps(line, ensure_ascii=False))
    except OSError as error:  # only a stopped evaluation would need it
        logger.warning("%s lacks a batch: %s", path, error.strerror)


def mark_unfinished(prefix: Path):
    """Call before results are written, so that an evaluation that ends before the last file is resumed, even one that
    generates nothing."""
    append_line(Path(f"{prefix}-0.jsonl"), "")  # and not touch(), which a power loss may undo


def remove_batches(prefix: Path):
    """To be called once all else is written."""
    for path in find_partial_files(prefix):
        path.unlink()


def hash_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the model's settings, but for where it came from, of its weights and of its tokenizer."""
    settings = model.config.to_dict() | {"generation": model.generation_config.to_dict()}
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
        settings["generation"].pop(name, None)
    described = json.dumps(settings, sort_keys=True, default=str)
    return hash_value([described, hash_weights(model.state_dict().items()), describe_tokenizer(tokenizer)])
