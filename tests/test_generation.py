"""The same summaries and scores on any number of processes and in any batches; each dialogue generated once."""

import json

import pytest
import torch
from accelerate import Accelerator
from conftest import make_rows, read_jsonl, run_script
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from utils.config import EvaluationConfig
from utils.generation import generate_summaries
from utils.modeling import load_model, load_tokenizer
from utils.prompting import build_prompt


def generate(flan_t5, dialogues, **settings):
    config = EvaluationConfig(max_new_tokens=12, **settings)
    model = load_model(str(flan_t5), "sdpa", torch.float32)
    return generate_summaries(Accelerator(), model, load_tokenizer(str(flan_t5)), dialogues, config, "model")


@pytest.mark.parametrize("num_beams", [1, 3])
def test_summaries_are_those_of_one_prompt_at_a_time(flan_t5, num_beams):
    dialogues = [row["dialogue"] for row in make_rows(7)]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(flan_t5), AutoTokenizer.from_pretrained(flan_t5)
    expected = []
    for dialogue in dialogues:
        inputs = tokenizer(build_prompt(dialogue), return_tensors="pt").input_ids
        output = model.generate(inputs, max_new_tokens=12, num_beams=num_beams, do_sample=False)
        expected.append(tokenizer.decode(output[0], skip_special_tokens=True).strip())
    assert len(set(expected)) > 3
    for size in (1, 3, 32):
        assert generate(flan_t5, dialogues, num_beams=num_beams, per_device_eval_batch_size=size) == expected


def test_a_repeated_dialogue_is_generated_once(flan_t5, monkeypatch):
    dialogues = [row["dialogue"] for row in make_rows(5)]
    num_prompts = []
    original = T5ForConditionalGeneration.generate

    def count(model, **inputs):
        num_prompts.append(len(inputs["input_ids"]))
        return original(model, **inputs)

    monkeypatch.setattr(T5ForConditionalGeneration, "generate", count)
    assert generate(flan_t5, dialogues * 3) == generate(flan_t5, dialogues) * 3
    assert num_prompts == [5, 5]


def test_one_and_two_processes_write_the_same(flan_t5, data_files, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for num_processes, folder in enumerate(folders, start=1):
        run = run_script(
            "evaluate_rouge.py", "--models", f"a={flan_t5}", f"b={flan_t5}", "--test_file", data_files["test"],
            "--per_device_eval_batch_size", 1, "--max_new_tokens", 12, "--output_dir", folder,
            num_processes=num_processes,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    one, two = ((folder / "predictions.jsonl").read_text() for folder in folders)
    assert one == two
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [result["num_processes"] for result in results] == [1, 2]
    assert results[0]["models"] == results[1]["models"] and results[0]["comparisons"] == results[1]["comparisons"]
    predictions = read_jsonl(folders[0] / "predictions.jsonl")
    assert [(row["id"], row["model"], len(row["references"])) for row in predictions] == [
        (f"test_{index}_1", model, 3) for model in ("a", "b") for index in range(4)
    ]
    assert results[0]["comparisons"]["a_vs_b"]["max"]["rougeL"] == {
        "difference": 0,
        "low": 0,
        "high": 0,
        "p_value": 1,
    }
