"""Summarise a split with several models and score them with ROUGE.

accelerate launch evaluate_rouge.py                                   # original, full and LoRA on the test split
accelerate launch evaluate_rouge.py --demo                            # the demo's, after both demo trainings
accelerate launch evaluate_rouge.py --max_eval_samples 10             # a quick look
accelerate launch evaluate_rouge.py --models lora=out base=google/flan-t5-base --test_file my.csv
python evaluate_rouge.py --predictions_file a=a.jsonl b=b.jsonl       # compare texts written elsewhere
python evaluate_rouge.py --report_only                                # the report again, from what was scored
python evaluate_rouge.py --help                                       # every setting
"""

from utils.config import EvaluationConfig
from utils.launch.command_line import show_help_if_asked

if __name__ == "__main__":
    show_help_if_asked(EvaluationConfig, "evaluate_rouge.yaml", __doc__)  # before the imports, which take seconds

from pathlib import Path

from accelerate import Accelerator

from demo.facts import guess_summaries, read_facts, score_facts
from utils.data.rows import group_by_dialogue, load_rows
from utils.files import hash_value
from utils.generation.partial_texts import mark_unfinished, remove_batches
from utils.generation.summaries import choose_dtype, summarize_with_models
from utils.launch.locks import lock_folder, lock_output_dir
from utils.launch.output_dir import check_output_dir
from utils.launch.processes import call_on_main, start_evaluation
from utils.launch.script import run_script
from utils.scoring.metrics.bertscore import describe_encoder
from utils.scoring.predictions import hash_predictions, load_predictions
from utils.scoring.report import add_to_cards, show_report
from utils.scoring.results import is_finished, write_results


def main(config: EvaluationConfig):
    if config.report_only:
        if start_evaluation().is_main_process:
            with lock_folder(Path(config.output_dir), "output_dir"):
                report(config)
        return
    check_output_dir(config)
    rows = load_rows(config, config.split)
    accelerator = start_evaluation()
    config = choose_dtype(accelerator, config)
    with lock_output_dir(accelerator, config):
        if not is_finished(accelerator, config, rows):
            evaluate(accelerator, config, rows)
        if accelerator.is_main_process:
            report(config)
            remove_batches(config.partial_texts)
        accelerator.wait_for_everyone()  # the launcher ends all when one process fails on its way out


def evaluate(accelerator: Accelerator, config: EvaluationConfig, rows: list[dict[str, str]]):
    """Make or read the texts, score them, and write predictions.jsonl and results.json."""
    dialogues = group_by_dialogue(rows[: config.max_eval_samples])
    example = {"split": config.split, "index": min(config.example_index, len(rows) - 1)}
    example |= rows[example["index"]]
    facts = read_facts(config, dialogues) if config.demo else []
    encoder = call_on_main(accelerator, lambda: describe_encoder(config))  # its mistakes are told before hours of work
    # Of each model, by dialogue: `summaries[name][dialogue]`.
    if config.predictions_file:
        summaries = load_predictions(config, dialogues, known_ids={row["id"] for row in rows})
        hashes, unknown = hash_predictions(config), {}
    else:
        texts = [*(dialogue["dialogue"] for dialogue in dialogues), example["dialogue"]]
        references = [text for dialogue in dialogues for text in dialogue["references"]]
        summaries, hashes, unknown = summarize_with_models(accelerator, texts, references, config)
    example["texts"] = {
        name: by_dialogue[example["dialogue"]].text if example["dialogue"] in by_dialogue else "(not scored)"
        for name, by_dialogue in summaries.items()
    }
    if config.demo:
        # Whoever knows the task and reads no dialogue: what a score must beat before it means anything.
        summaries["random"] = guess_summaries(load_rows(config, "train"), dialogues, config.seed)
    if accelerator.is_main_process:
        results = {"example": example, "data_fingerprint": hash_value(rows), "hashes": hashes, "unknown": unknown}
        results["bertscore"] = encoder
        if facts:
            results["facts"] = score_facts(summaries, dialogues, facts)
        mark_unfinished(config.partial_texts)
        write_results(config, dialogues, summaries, results)


def report(config: EvaluationConfig):
    show_report(config)
    if config.add_to_card:
        add_to_cards(config)


if __name__ == "__main__":
    run_script(main, EvaluationConfig, "evaluate_rouge.yaml")
