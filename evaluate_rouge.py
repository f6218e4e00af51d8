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

from accelerate import Accelerator, PartialState

from demo.facts import random_training_summaries, score_facts
from utils.config import EvaluationConfig, UserError
from utils.data import fingerprint, group_by_dialogue, load_predictions, load_rows, read_file
from utils.files import write_json, write_jsonl
from utils.generation import summarize_with_models
from utils.launching import run_script
from utils.report import format_example, format_facts, format_scores
from utils.rouge import compare_models
from utils.tracking import check_output_dir, clear_output_dir, describe_software


def main(config: EvaluationConfig):
    check_output_dir(config)
    rows = load_rows(config, config.split)
    dialogues = group_by_dialogue(rows[: config.max_eval_samples])
    texts = [dialogue["dialogue"] for dialogue in dialogues]
    example_index = min(config.example_index, len(rows) - 1)
    facts = read_demo_facts(config, dialogues) if config.demo else []
    accelerator = Accelerator()

    if config.predictions_file:
        predictions = load_predictions(Path(config.predictions_file), dialogues)
        by_dialogue = {name: dict(zip(texts, of_model, strict=True)) for name, of_model in predictions.items()}
        dialogue = rows[example_index]["dialogue"]
        shown = {name: of_model.get(dialogue, "(not among the rows)") for name, of_model in by_dialogue.items()}
    else:
        summaries = summarize_with_models(accelerator, [*texts, rows[example_index]["dialogue"]], config)
        predictions = {name: of_model[:-1] for name, of_model in summaries.items()}
        shown = {name: of_model[-1] for name, of_model in summaries.items()}
    if config.demo:
        # Whoever knows the task and reads no dialogue: what a score must beat before it means anything.
        predictions["random"] = random_training_summaries(load_rows(config, "train"), texts, config.seed)

    clear_output_dir(accelerator, config, "predictions.jsonl", "results.json")
    if accelerator.is_main_process:
        example = f"Row {example_index} of the {config.split} split\n\n{format_example(rows[example_index], shown)}"
        write_report(config, rows, dialogues, predictions, facts, example)
    accelerator.wait_for_everyone()  # the launcher ends all when one process fails on its way out
    accelerator.end_training()


def read_demo_facts(config: EvaluationConfig, dialogues: list[dict]) -> list[dict[str, str]]:
    """The facts of each dialogue, which the demo's files hold beside its summary."""
    path = Path(getattr(config, f"{config.split}_file"))
    facts = {row.get("id"): row.get("facts") for _, row in read_file(path)}
    if not all(facts.get(dialogue["id"]) for dialogue in dialogues):
        raise UserError(f"--{config.split}_file {path}: rows without an id or facts, which --demo scores")
    return [facts[dialogue["id"]] for dialogue in dialogues]


def write_report(config: EvaluationConfig, rows: list, dialogues: list, predictions: dict, facts: list, example: str):
    """Write predictions.jsonl, score, write results.json, and print what a person wants to see."""
    output_dir = Path(config.output_dir)
    write_jsonl(
        output_dir / "predictions.jsonl",
        [
            {"id": dialogue["id"], "model": name, "prediction": text, "references": dialogue["references"]}
            for name, texts in predictions.items()
            for dialogue, text in zip(dialogues, texts, strict=True)
        ],
    )
    references = [dialogue["references"] for dialogue in dialogues]
    models, comparisons = compare_models(predictions, references, config.use_stemmer, config.seed)
    results = {
        "models": models,
        "comparisons": comparisons,
        "num_dialogues": len(dialogues),
        "num_rows": sum(map(len, references)),
        "num_processes": PartialState().num_processes,
        "data_fingerprint": fingerprint(rows),
        "settings": dataclasses.asdict(config),
        **describe_software(),
    }
    parts = [example, format_scores(results)]
    if facts:
        results["facts"] = {name: score_facts(texts, facts) for name, texts in predictions.items()}
        parts.append(format_facts(results["facts"]))
    write_json(output_dir / "results.json", results)
    sys.stdout.write("\n\n".join([*parts, f"written: {output_dir}"]) + "\n")


if __name__ == "__main__":
    run_script(main, EvaluationConfig, "evaluate_rouge.yaml")
