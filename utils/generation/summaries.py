"""Summaries of dialogues, generated once per distinct dialogue and shared out over the processes."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version as find_version

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.config import EvaluationConfig, SummaryConfig
from utils.data.micro_batches import deal, micro_batch_cost
from utils.data.tokens import tokenize_prompts
from utils.data.unknown import describe_unknown
from utils.files import hash_value
from utils.generation.beams import beams_share
from utils.generation.decoding import count_cached_tokens, decode_batch
from utils.generation.partial_texts import Summary, append_batch, hash_model, read_batches
from utils.modeling.families import log_attention
from utils.modeling.loading import check_folder, check_sizes, load_model, load_tokenizer
from utils.prompting import DEFAULT_PROMPT, find_prompt

logger = logging.getLogger(__name__)
NUM_BATCHES = 16
# Fewest prompts of a batch, memory permitting. A GPU decodes hundreds of texts in about the time of a few: each new
# token takes some five hundred kernel launches, however many texts there are.
MIN_PROMPTS = {"cpu": 16, "cuda": 512}
# What the texts follow from, beside model, prompt and versions.
DECODING_SETTINGS = (
    "attn_implementation", "max_new_tokens", "min_new_tokens", "no_repeat_ngram_size", "num_beams", "length_penalty",
    "dtype",
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def choose_dtype(
    accelerator: Accelerator, config: EvaluationConfig | SummaryConfig
) -> EvaluationConfig | SummaryConfig:
    """The config with a dtype in place of `auto`."""
    if config.dtype != "auto":
        return config
    is_fast = accelerator.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dataclasses.replace(config, dtype="bf16" if is_fast else "fp32")


def summarize_with_models(
    accelerator: Accelerator, texts: list[str], references: list[str], config: EvaluationConfig
) -> tuple[dict[str, dict[str, Summary]], dict[str, str], dict[str, list[str]]]:
    """(`summaries[model][text]` of each of `texts`, `hashes[model]`, `unknown[model]`: sentences on what its tokenizer
    does not know of texts and references)."""
    kept = read_batches(accelerator, config.partial_texts)
    summaries, hashes, unknown = {}, {}, {}
    for name, model, tokenizer, model_hash in load_models(config):
        summaries[name] = generate_summaries(accelerator, model, tokenizer, texts, config, name, kept, model_hash)
        hashes[name] = model_hash
        unknown[name] = log_unknown(accelerator, name, tokenizer, texts, references)
        del model  # before the next one is loaded
    return summaries, hashes, unknown


def load_models(config: EvaluationConfig) -> Iterator[tuple[str, PreTrainedModel, PreTrainedTokenizerBase, str]]:
    """(name, model, tokenizer, hash of both) of each of --models, one after the other."""
    models = dict(model.split("=", maxsplit=1) for model in config.models)
    for name, path in models.items():
        script = "train_lora.py" if "lora" in f"{name} {path}" else "train_full.py"
        flags = " --demo" if config.demo else ""
        check_folder(path, f"models {name}", f"; make it with: accelerate launch {script}{flags} --output_dir {path}")
    for name, path in models.items():  # what one lacks is told before the first model generates
        load_tokenizer(path, f"models {name}")
    for name, path in models.items():
        yield name, *load_with_hash(path, f"models {name}", config)


def load_summarizer(
    accelerator: Accelerator, config: SummaryConfig
) -> tuple[Callable[[list[str]], dict[str, Summary]], str]:
    """A function of dialogues that gives each one's summary, on every process; and the model's hash."""
    flags = " --demo" if config.demo else ""
    advice = f"; make it with: accelerate launch train_lora.py{flags} --output_dir {config.model}"
    check_folder(config.model, "model", advice)
    model, tokenizer, model_hash = load_with_hash(config.model, "model", config)
    kept = read_batches(accelerator, config.partial_texts) if config.partial_texts else {}

    def summarize(dialogues: list[str]) -> dict[str, Summary]:
        log_unknown(accelerator, "dialogues", tokenizer, dialogues, [])
        return generate_summaries(accelerator, model, tokenizer, dialogues, config, "summaries", kept, model_hash)

    return summarize, model_hash


def log_unknown(
    accelerator: Accelerator, name: str, tokenizer: PreTrainedTokenizerBase, texts: list[str], references: list[str]
) -> list[str]:
    unknown = describe_unknown(tokenizer, texts, references)
    if unknown and accelerator.is_main_process:
        logger.warning("%s: %s", name, "; ".join(unknown))
    return unknown


def load_with_hash(
    path: str, setting: str, config: EvaluationConfig | SummaryConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """(model, tokenizer, hash of both)."""
    tokenizer = load_tokenizer(path, setting)
    base = config.base_model_name_or_path
    model = load_model(path, config.attn_implementation, torch.float32, setting, base_model=base)
    return model, tokenizer, hash_model(model, tokenizer)


def generate_summaries(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: list[str],
    config: EvaluationConfig | SummaryConfig,
    name: str,
    kept: dict[str, list[Summary]],
    model_hash: str,
) -> dict[str, Summary]:
    """The summary of each dialogue, on every process; `kept` are the batches that an earlier run has left."""
    check_sizes(model, tokenizer, config)
    distinct = list(dict.fromkeys(dialogues))
    prompt = find_prompt(model.generation_config)
    prompt_ids, lengths = tokenize_prompts(distinct, tokenizer, config.max_source_length, prompt)
    num_cut = sum(length > config.max_source_length for length in lengths)
    if accelerator.is_main_process:
        logger.info(
            "%s: %d prompts, %d truncated at %d tokens", name, len(prompt_ids), num_cut, config.max_source_length
        )
        log_attention(model, config.attn_implementation)
        if model.unused_settings:
            logger.info("%s: not used of its own generation settings: %s", name, ", ".join(model.unused_settings))
        if prompt != DEFAULT_PROMPT:
            logger.info("%s: the prompt is the model's own, %r and %r around the dialogue", name, *prompt)
    settings = {setting: getattr(config, setting) for setting in DECODING_SETTINGS}
    versions = [(library, find_version(library)) for library in ("torch", "transformers", "tokenizers")]
    origin = None
    if config.partial_texts:
        origin = hash_value([model_hash, settings, versions, accelerator.device.type])
    model = model.to(accelerator.device, DTYPES[config.dtype]).eval()
    token_limits = gather_object([count_cached_tokens(model, config)])
    token_limit = None if None in token_limits else min(token_limits)
    shared = beams_share(model)
    batches = cut_batches(list(map(len, prompt_ids)), config, accelerator.device, token_limit, shared)
    decode = partial(decode_batch, model, config=config)
    summaries = generate_texts(accelerator, decode, tokenizer, prompt_ids, batches, config, name, origin, kept)
    cut = (
        summary._replace(source_truncated=length > config.max_source_length)
        for summary, length in zip(summaries, lengths, strict=True)
    )
    return dict(zip(distinct, cut, strict=True))


def generate_texts(
    accelerator: Accelerator,
    decode: Callable[[list[list[int]]], list[tuple[list[int], bool]]],
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    batches: list[list[int]],
    config: EvaluationConfig,
    name: str | None = None,
    origin: str | None = None,
    kept: dict[str, list[Summary]] | None = None,
) -> list[Summary]:
    """One for each prompt, on every process; with a name, progress is shown.

    Args:
        batches: of indices of the prompts, see cut_batches.
        decode: from a batch of prompts to each one's new tokens and whether they were cut at max_new_tokens.
        origin: a fingerprint of all that the texts follow from, beside the prompts. With it, the batches that are
            `kept` are not decoded again, and those that are decoded go to a file as they end.
    """
    keys = [hash_value([origin, [prompt_ids[index] for index in batch]]) for batch in batches]
    kept = kept or {}
    done = {key: kept[key] for key, batch in zip(keys, batches, strict=True) if len(kept.get(key, ())) == len(batch)}
    if done and accelerator.is_main_process:
        num_kept = sum(map(len, done.values()))
        logger.info("%s: %d of %d texts are there from an earlier run", name, num_kept, len(prompt_ids))
    missing = [number for number, key in enumerate(keys) if key not in done]
    costs = [estimate_cost([len(prompt_ids[index]) for index in batches[number]], config) for number in missing]
    mine = deal(missing, costs, accelerator.process_index, accelerator.num_processes)
    num_prompts, mine_done = sum(len(batches[number]) for number in mine), {}
    with tqdm(desc=name, total=num_prompts, disable=not (name and accelerator.is_main_process)) as progress:
        for number in mine:
            decoded = decode([prompt_ids[index] for index in batches[number]])
            texts = tokenizer.batch_decode([ids for ids, _ in decoded], skip_special_tokens=True)
            summaries = [Summary(text.strip(), cut) for text, (_, cut) in zip(texts, decoded, strict=True)]
            mine_done[keys[number]] = summaries
            if origin:
                append_batch(accelerator, config.partial_texts, keys[number], summaries)
            progress.update(len(summaries))
    done |= dict(gather_object(list(mine_done.items())))
    # By index: processes have had other batches, and other numbers of them.
    by_index = {
        index: summary
        for batch, key in zip(batches, keys, strict=True)
        for index, summary in zip(batch, done[key], strict=True)
    }
    return [by_index[index] for index in range(len(prompt_ids))]


def cut_batches(
    lengths: list[int],
    config: EvaluationConfig,
    device: torch.device,
    token_limit: int | None = None,
    shared: bool = False,
) -> list[list[int]]:
    """Indices of the prompts of each batch, longest first. They do not depend on the number of processes, so the texts
    do not either.

    A batch is bounded by the tokens that the model's cache may come to hold, padded sources and new ones: at most
    token_limit, or those of per_device_eval_batch_size prompts of full length. Each beam has new tokens of its own,
    and its own copy of the source's unless they are `shared`. If that allows it there are NUM_BATCHES of about equal
    cost, for several processes to share, but of no fewer than about MIN_PROMPTS.
    """
    num_copies = 1 if shared else config.num_beams
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    token_limit = token_limit or config.eval_batch_size * (lengths[longest_first[0]] + config.max_new_tokens)
    costs = {index: estimate_cost([lengths[index]], config) for index in longest_first}
    least = MIN_PROMPTS.get(device.type, MIN_PROMPTS["cuda"])
    share = sum(costs.values()) / min(NUM_BATCHES, max(1, len(lengths) // least))
    batches, cost_so_far = [[]], 0
    for index in longest_first:
        batch = batches[-1]
        tokens = num_copies * lengths[(batch or [index])[0]] + config.num_beams * config.max_new_tokens
        fits = (len(batch) + 1) * tokens <= token_limit
        if batch and (not fits or cost_so_far + costs[index] / 2 > len(batches) * share):
            batches.append([])
        batches[-1].append(index)
        cost_so_far += costs[index]
    return batches


def estimate_cost(lengths: list[int], config: EvaluationConfig) -> float:
    """Of prompts of these lengths, if their texts get as long as they may; see micro_batch_cost."""
    return sum(float(micro_batch_cost(1, length, config.max_new_tokens)) for length in lengths)
