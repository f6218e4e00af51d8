"""Summaries of dialogues, generated once per distinct dialogue and shared out over the processes."""

import logging

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.batching import deal
from utils.config import EvaluationConfig
from utils.data import tokenize_prompts
from utils.modeling import check_folder, load_model, load_tokenizer

logger = logging.getLogger(__name__)


def summarize_with_models(
    accelerator: Accelerator, texts: list[str], config: EvaluationConfig
) -> dict[str, list[str]]:
    """`summaries[model]`, a text for each of `texts`; one model after the other is in memory."""
    models = dict(model.split("=", maxsplit=1) for model in config.models)
    for name, path in models.items():
        script = "train_lora.py" if "lora" in f"{name} {path}" else "train_full.py"
        flags = " --demo" if config.demo else ""
        check_folder(path, f"models {name}", f"; make it with: accelerate launch {script}{flags} --output_dir {path}")
    tokenizers = {name: load_tokenizer(path, f"models {name}") for name, path in models.items()}
    summaries = {}
    for name, path in models.items():
        # Not bound to a name here, so that it is gone before the next one is loaded.
        summaries[name] = generate_summaries(
            accelerator,
            load_model(path, config.attn_implementation, torch.float32, f"models {name}"),
            tokenizers[name],
            texts,
            config,
            name,
        )
    return summaries


def generate_summaries(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: list[str],
    config: EvaluationConfig,
    name: str,
) -> list[str]:
    """A summary of each dialogue, on every process.

    The batches do not depend on the number of processes, only who computes them does: so the texts do not either.
    """
    distinct = list(dict.fromkeys(dialogues))
    prompt_ids, lengths = tokenize_prompts(distinct, tokenizer, config.max_source_length)
    num_cut = sum(length > config.max_source_length for length in lengths)
    if accelerator.is_main_process:
        logger.info(
            "%s: %d prompts, %d truncated at %d tokens", name, len(prompt_ids), num_cut, config.max_source_length
        )
    model.to(accelerator.device).eval()
    texts = generate_texts(
        accelerator, model, tokenizer, prompt_ids, config.per_device_eval_batch_size, config.max_new_tokens,
        config.num_beams, name,
    )  # fmt: skip
    summaries = dict(zip(distinct, texts, strict=True))
    return [summaries[dialogue] for dialogue in dialogues]


@torch.no_grad()
def generate_texts(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    name: str | None = None,
) -> list[str]:
    """A text for each prompt, on every process; with a name, progress is shown."""
    longest_first = sorted(range(len(prompt_ids)), key=lambda index: (-len(prompt_ids[index]), index))
    batches = [longest_first[start : start + batch_size] for start in range(0, len(longest_first), batch_size)]
    mine = deal(batches, accelerator.process_index, accelerator.num_processes)
    texts = []
    for batch in tqdm(mine, desc=name, unit="batch", disable=not (name and accelerator.is_main_process)):
        input_ids = [torch.tensor(prompt_ids[index]) for index in batch]
        padded = pad_sequence(input_ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True)
        output_ids = model.generate(
            input_ids=padded.to(accelerator.device),
            attention_mask=mask.to(accelerator.device),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
        )
        texts += zip(batch, tokenizer.batch_decode(output_ids, skip_special_tokens=True), strict=True)
    # By index and not by order of arrival: processes may have had unequal numbers of batches.
    by_index = dict(gather_object(texts))
    return [by_index[index].strip() for index in range(len(prompt_ids))]
