"""Summarise a split with several models and score them with ROUGE.

accelerate launch evaluate_rouge.py                                   # original, full and LoRA on the test split
accelerate launch evaluate_rouge.py --demo                            # the demo's, after both demo trainings
accelerate launch evaluate_rouge.py --max_eval_samples 10             # a quick look
accelerate launch evaluate_rouge.py --models lora=out base=google/flan-t5-base --test_file my.csv
python evaluate_rouge.py --predictions_file texts.jsonl               # score texts written elsewhere
python evaluate_rouge.py --help                                       # every setting
"""

import dataclasses
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from demo.facts import random_training_summaries, score_facts
from utils.config import EvaluationConfig
from utils.data import fingerprint, group_by_dialogue, load_predictions, load_rows, read_file
from utils.generation import generate_summaries
from utils.launching import run_script
from utils.modeling import check_folder, load_model, load_tokenizer
from utils.report import format_example, format_facts, format_scores
from utils.rouge import compare_models
from utils.tracking import check_output_dir, clear_output_dir, describe_software, write_json, write_jsonl


def main(config: EvaluationConfig):
    check_output_dir(config)
    rows = load_rows(config, config.split)
    dialogues = group_by_dialogue(rows[: config.max_eval_samples])
    texts = [dialogue["dialogue"] for dialogue in dialogues]
    example = rows[min(config.example_index, len(rows) - 1)]
    accelerator = Accelerator()

    if config.predictions_file:
        predictions = load_predictions(Path(config.predictions_file), dialogues)
        shown = {}
    else:
        summaries = summarize_with_models(accelerator, [*texts, example["dialogue"]], config)
        predictions = {name: of_model[:-1] for name, of_model in summaries.items()}
        shown = {name: of_model[-1] for name, of_model in summaries.items()}
    if config.demo:
        # Whoever knows the task and reads no dialogue: what a score must beat before it means anything.
        predictions["random"] = random_training_summaries(load_rows(config, "train"), texts, config.seed)

    clear_output_dir(accelerator, config, "predictions.jsonl", "results.json")
    if accelerator.is_main_process:
        write_report(config, rows, dialogues, predictions, format_example(example, shown))
    accelerator.end_training()


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
        model = load_model(path, config.attn_implementation, torch.float32, f"models {name}")
        summaries[name] = generate_summaries(accelerator, model, tokenizers[name], texts, config, name)
    return summaries


def write_report(config: EvaluationConfig, rows: list, dialogues: list, predictions: dict, example: str):
    """Score, write predictions.jsonl and results.json, and print what a person wants to see."""
    references = [dialogue["references"] for dialogue in dialogues]
    models, comparisons = compare_models(predictions, references, config.use_stemmer, config.seed)
    results = {
        "models": models,
        "comparisons": comparisons,
        "num_dialogues": len(dialogues),
        "num_rows": sum(map(len, references)),
        "data_fingerprint": fingerprint(rows),
        "settings": dataclasses.asdict(config),
        **describe_software(),
    }
    if config.demo:
        facts = {row["id"]: row["facts"] for _, row in read_file(Path(getattr(config, f"{config.split}_file")))}
        expected = [facts[dialogue["id"]] for dialogue in dialogues]
        results["facts"] = {name: score_facts(texts, expected) for name, texts in predictions.items()}
    output_dir = Path(config.output_dir)
    write_jsonl(
        output_dir / "predictions.jsonl",
        [
            {"id": dialogue["id"], "model": name, "prediction": text, "references": dialogue["references"]}
            for name, texts in predictions.items()
            for dialogue, text in zip(dialogues, texts, strict=True)
        ],
    )
    write_json(output_dir / "results.json", results)
    parts = [f"Row {config.example_index} of the {config.split} split", example, format_scores(results)]
    if config.demo:
        parts.append(format_facts(results["facts"]))
    sys.stdout.write("\n\n".join([*parts, f"written: {output_dir}"]) + "\n")


if __name__ == "__main__":
    run_script(main, EvaluationConfig, "evaluate_rouge.yaml")
