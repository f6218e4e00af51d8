"""Summarise a file's rows in one way and print time, shares and texts: a process of compare_generation.py.

    python tests/benchmarks/run_generation.py MODEL TEST_FILE {ours,trainer,notebook} BEAMS ROWS [DTYPE [TOKENS]]

ROWS is all, distinct, or N for every Nth row. DTYPE is for ours, fp32 by default; every text has TOKENS tokens, or at
most 128 if none are given. Timed from rows to texts, after one row to warm up; neither loading nor, for the Trainer,
tokenising is counted; the Trainer gets no labels, with which it would compute a loss as well.
"""

import csv
import json
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from transformers import DataCollatorWithPadding, Seq2SeqTrainer, Seq2SeqTrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.config import EvaluationConfig
from utils.data.tokens import tokenize_prompts
from utils.generation.summaries import generate_summaries
from utils.launch.script import configure_gpus, start_logging
from utils.modeling.loading import load_model, load_tokenizer
from utils.training.tracking import measure_peak_memory


class Counter:
    """What the model computes: padded source tokens and rows x steps of the decoder."""

    def __init__(self, model: torch.nn.Module):
        self.source_tokens = self.real_source_tokens = self.decoder_tokens = 0
        model.get_encoder().register_forward_pre_hook(self.count_source, with_kwargs=True)
        model.get_decoder().register_forward_pre_hook(self.count_decoder, with_kwargs=True)

    def count_source(self, module, arguments, inputs):
        mask = inputs.get("attention_mask")  # none where nothing is padded
        self.source_tokens += inputs["input_ids"].numel()
        self.real_source_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def count_decoder(self, module, arguments, inputs):
        self.decoder_tokens += inputs["input_ids"].numel()


def prepare_ours(model, tokenizer, dialogues, num_beams, dtype, max_new_tokens):
    config = EvaluationConfig(
        max_new_tokens=max_new_tokens, num_beams=num_beams, dtype=dtype, output_dir=tempfile.mkdtemp()
    )
    accelerator = Accelerator()

    def summarize():
        summaries = generate_summaries(accelerator, model, tokenizer, dialogues, config, "ours", {}, "")
        return [summaries[dialogue].text for dialogue in dialogues]

    return summarize


def prepare_notebook(model, tokenizer, dialogues, num_beams, dtype, max_new_tokens):
    model.to(Accelerator().device)

    def summarize():
        texts = []
        for dialogue in dialogues:
            inputs = torch.tensor(tokenize_prompts([dialogue], tokenizer, 1024)[0], device=model.device)
            ids = model.generate(inputs, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False)
            texts.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
        return texts

    return summarize


def prepare_trainer(model, tokenizer, dialogues, num_beams, dtype, max_new_tokens):
    prompt_ids, _ = tokenize_prompts(dialogues, tokenizer, 1024)
    data = datasets.Dataset.from_list([{"input_ids": ids} for ids in prompt_ids])
    arguments = Seq2SeqTrainingArguments(
        tempfile.mkdtemp(), per_device_eval_batch_size=16, predict_with_generate=True, report_to="none",
        generation_max_length=max_new_tokens + 1, generation_num_beams=num_beams, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model, arguments, DataCollatorWithPadding(tokenizer))

    def summarize():
        predictions = trainer.predict(data).predictions.clip(min=0)  # it pads with -100
        return [text.strip() for text in tokenizer.batch_decode(predictions, skip_special_tokens=True)]

    return summarize


def main(path: str, test_file: str, way: str, num_beams: str, rows: str, dtype: str = "fp32", text_length: str = ""):
    start_logging()
    with open(test_file, newline="", encoding="utf-8") as file:
        dialogues = [row["dialogue"] for row in csv.DictReader(file)]
    if rows == "distinct":
        dialogues = list(dict.fromkeys(dialogues))
    elif rows != "all":
        dialogues = dialogues[:: int(rows)]
    if way == "ours":
        configure_gpus(None)
    model, tokenizer = load_model(path, "sdpa", torch.float32).eval(), load_tokenizer(path)
    if text_length:
        model.generation_config.min_new_tokens = int(text_length)
    settings = (int(num_beams), dtype, int(text_length or 128))
    prepare = {"ours": prepare_ours, "trainer": prepare_trainer, "notebook": prepare_notebook}[way]
    prepare(model, tokenizer, dialogues[:1], *settings)()
    summarize = prepare(model, tokenizer, dialogues, *settings)
    counter = Counter(model)
    start, cpu_start = time.perf_counter(), time.process_time()
    with torch.no_grad():
        texts = summarize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    # The tokens of the texts, as tokenised again: ours decodes each distinct dialogue once.
    by_dialogue = dict(zip(dialogues, texts, strict=True))
    decoded = list(by_dialogue.values()) if way == "ours" else texts
    num_tokens = sum(map(len, tokenizer(decoded).input_ids)) * int(num_beams)
    figures = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads; says more where other programs run as well
        "rows_per_second": len(texts) / seconds,
        "peak_memory_mib": measure_peak_memory(Accelerator()),
        "mean_text_tokens": num_tokens / len(decoded) / int(num_beams),
        "padding_share": 1 - counter.real_source_tokens / counter.source_tokens,
        "ended_share": 1 - num_tokens / counter.decoder_tokens,
    }
    sys.stdout.write("\n" + json.dumps({"figures": figures, "texts": by_dialogue}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
