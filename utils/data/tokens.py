"""Prompts and summaries to tokens, made once and cached on the disk."""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from utils.config import UserError
from utils.data.unknown import describe_unknown
from utils.files import DISK_ERRORS, describe_file, hash_value, make_folder, write_json
from utils.launch.times import timed
from utils.prompting import DEFAULT_PROMPT, Prompt, build_prompt

logger = logging.getLogger(__name__)


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All that decides which tokens it makes, but for what a call leaves behind in it."""
    if not tokenizer.is_fast:
        return [repr(tokenizer), tokenizer.get_vocab()]
    return json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}


def tokenize_prompts(
    dialogues: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, prompt: Prompt = DEFAULT_PROMPT
) -> tuple[list, list]:
    """(input_ids, lengths before truncation) of each dialogue's prompt; truncation cuts the dialogue's end, never
    the words after it that ask for the summary."""
    suffix_ids = tokenizer(prompt.source_suffix).input_ids
    if suffix_ids[0] == tokenizer.bos_token_id:  # BART's, which starts a text
        suffix_ids = suffix_ids[1:]
    shortest = len(tokenizer(build_prompt("", prompt)).input_ids)
    if max_length <= shortest:
        raise UserError(
            f"--max_source_length must be over {shortest}, the prompt without a dialogue; got {max_length}"
        )
    prompt_ids = tokenizer([build_prompt(dialogue, prompt) for dialogue in dialogues]).input_ids
    cut = [ids if len(ids) <= max_length else ids[: max_length - len(suffix_ids)] + suffix_ids for ids in prompt_ids]
    return cut, [len(ids) for ids in prompt_ids]


@contextlib.contextmanager
def explain_cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        # The writer of datasets, closing a file that it could not write, hides the disk's error behind its own.
        cause = error
        while cause and getattr(cause, "errno", None) not in (*DISK_ERRORS, errno.ENOLCK):
            cause = cause.__context__
        if cause is None:
            raise
        text = f"the cache {folder}: {os.strerror(cause.errno)}; HF_HOME or HF_DATASETS_CACHE can name another folder"
        raise UserError(text) from error


def is_whole(cache_file: Path) -> bool:
    """Nobody looks at tokens before training: a cached file must be, bit for bit, what was written."""
    try:
        return json.loads(cache_file.with_suffix(".json").read_bytes()) == describe_file(cache_file)
    except (OSError, ValueError):
        return False


@timed("data")
def tokenize_rows(
    accelerator: Accelerator, rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, config: Any, split: str
) -> datasets.Dataset | None:
    """The rows, if there are any, as `id`, `input_ids` (at most max_source_length) and `labels` (at most
    max_target_length), in their order, with `uncut_source_length` and `uncut_target_length`, in tokens. The main
    process tokenises and writes them to the cache of `datasets`; the others read them there."""
    if not rows:
        return None

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        input_ids, source_lengths = tokenize_prompts(
            batch["dialogue"], tokenizer, config.max_source_length, config.prompt
        )
        full = tokenizer(text_target=batch["summary"]).input_ids
        limit = config.max_target_length
        # By hand, since truncation=True stays set in the tokenizer and would change the cache's key. The end is kept.
        cut = [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in full]
        return {
            "input_ids": input_ids, "labels": cut,
            "uncut_source_length": source_lengths, "uncut_target_length": [len(ids) for ids in full],
        }  # fmt: skip

    limits = [config.max_source_length, config.max_target_length]
    content = hash_value([rows, config.prompt, describe_tokenizer(tokenizer), *limits])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dialogue_tokens" / content
    cache_file = folder / "tokens.arrow"

    with accelerator.main_process_first(), explain_cache_errors(folder.parent):
        if not is_whole(cache_file):  # one that is may be in a cache that can only be read
            make_folder(folder.parent)
            with FileLock(f"{folder}.lock"):
                if not is_whole(cache_file):
                    shutil.rmtree(folder, ignore_errors=True)  # damaged, or what a kill left
                    make_folder(folder)
                    datasets.Dataset.from_list(rows).map(
                        tokenize, batched=True, remove_columns=["dialogue", "summary"],
                        cache_file_name=str(cache_file), desc=split,
                    )  # fmt: skip
                    write_json(cache_file.with_suffix(".json"), describe_file(cache_file))
        tokens = datasets.Dataset.from_file(str(cache_file))
    source_lengths, target_lengths = np.array(tokens["uncut_source_length"]), np.array(tokens["uncut_target_length"])
    if accelerator.is_main_process:
        logger.info(
            "%s: %d examples, source tokens mean %.0f longest %d, target tokens mean %.0f longest %d, "
            "truncated: %d sources at %d, %d targets at %d",
            split, len(tokens), source_lengths.mean(), source_lengths.max(),
            target_lengths.mean(), target_lengths.max(),
            (source_lengths > config.max_source_length).sum(), config.max_source_length,
            (target_lengths > config.max_target_length).sum(), config.max_target_length,
        )  # fmt: skip
        texts = ([row[column] for row in rows] for column in ("dialogue", "summary"))
        if unknown := describe_unknown(tokenizer, *texts):
            logger.warning("%s: %s", split, "; ".join(unknown))
    return tokens
