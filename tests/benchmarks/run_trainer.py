"""Fine-tune with transformers' Seq2SeqTrainer, as its users do, and print speed and memory: compare_trainer.py's other
side.

    python tests/benchmarks/run_trainer.py MODEL TRAIN_FILE {full,lora,lora_bf16_base} SAMPLING UPDATES PRECISION
        [SIZE TOTAL [compile]]
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.prompting import build_prompt


class Stopwatch(TrainerCallback):
    """When each update ended, and how much of what the model was given is no padding."""

    def __init__(self):
        self.ends, self.num_real, self.num_computed = [], 0, 0

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())

    def count(self, inputs):
        for real in (inputs["attention_mask"].bool(), inputs["labels"] != -100):
            self.num_real += int(real.sum())
            self.num_computed += real.numel()


def main(
    model_path: str,
    train_file: str,
    mode: str,
    sampling: str,
    num_updates: str,
    precision: str,
    size: str = "16",
    total: str = "128",
    compiled: str = "",
):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    dtype = torch.bfloat16 if mode == "lora_bf16_base" else torch.float32
    model = AutoModelForSeq2SeqLM.from_pretrained(model_path, dtype=dtype)
    if mode != "full":
        lora = LoraConfig(r=32, lora_alpha=32, lora_dropout=0.1, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(model, lora)

    def tokenize(rows):
        prompts = [build_prompt(dialogue) for dialogue in rows["dialogue"]]
        inputs = tokenizer(prompts, max_length=1024, truncation=True)
        return inputs | {"labels": tokenizer(rows["summary"], max_length=128, truncation=True).input_ids}

    kind = "csv" if train_file.endswith(".csv") else "json"
    data = datasets.load_dataset(kind, data_files=train_file, split="train")
    data = data.map(tokenize, batched=True, remove_columns=data.column_names)
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            folder, per_device_train_batch_size=int(size), gradient_accumulation_steps=int(total) // int(size),
            max_steps=int(num_updates), torch_compile=compiled == "compile",
            bf16=precision == "bf16", learning_rate=1e-3, weight_decay=0.01, max_grad_norm=1.0,
            train_sampling_strategy=sampling, save_strategy="no", logging_steps=1, report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(tokenizer, model=model)

        def collate(rows):
            inputs = collator(rows)
            stopwatch.count(inputs)
            return inputs

        trainer = Seq2SeqTrainer(model, arguments, collate, data, callbacks=[stopwatch])
        trainer.train()
    figures = {
        "samples_per_second": int(total) * (len(stopwatch.ends) - 1) / (stopwatch.ends[-1] - stopwatch.ends[0]),
        "padding_efficiency": stopwatch.num_real / stopwatch.num_computed,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }
    if torch.cuda.is_available():
        figures["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
