"""Summaries on one or several processes, for tests: python generation_worker.py MODEL OUTPUT_FOLDER"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import REPOSITORY, read_jsonl

from utils.config import EvaluationConfig
from utils.generation.summaries import generate_summaries
from utils.launch.processes import leave_process_group
from utils.modeling.loading import load_model, load_tokenizer

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "length_penalty": 2.0},
}


def load_dialogues() -> list[str]:
    """Twenty, longest last."""
    dialogues = list(dict.fromkeys(row["dialogue"] for row in read_jsonl(REPOSITORY / "demo" / "test.jsonl")))
    return sorted(dialogues[:20], key=len)


def write_unsure_model(folder: Path) -> Path:
    """The demo's model with its head made smaller: texts end, and beams differ from the greedy ones."""
    model = load_model(str(REPOSITORY / "demo" / "model"), "sdpa", torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 0.3
    model.save_pretrained(folder)
    load_tokenizer(str(REPOSITORY / "demo" / "model")).save_pretrained(folder)
    return folder


def main(model_path: str, folder: str):
    accelerator = Accelerator()
    dialogues = load_dialogues()
    results = {"num_processes": accelerator.num_processes}
    for mode, settings in MODES.items():
        # 12 new tokens: some texts end before, some are cut. Small batches, of unequal numbers of prompts.
        config = EvaluationConfig(
            max_new_tokens=12, per_device_eval_batch_size=3, dtype="fp32", output_dir=f"{folder}/{mode}", **settings
        )
        model, tokenizer = load_model(model_path, "sdpa", torch.float32), load_tokenizer(model_path)
        summaries = generate_summaries(accelerator, model, tokenizer, dialogues, config, "model", {}, "")
        results[mode] = [summaries[dialogue] for dialogue in dialogues]
    if accelerator.is_main_process:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    accelerator.wait_for_everyone()
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
