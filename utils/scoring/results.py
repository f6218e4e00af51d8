"""From each model's texts to predictions.jsonl and results.json, which hold all that a report shows."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from utils.config import EvaluationConfig, UserError
from utils.files import describe_file, hash_value, write_json, write_jsonl
from utils.generation.partial_texts import Summary
from utils.generation.summaries import load_models
from utils.launch.output_dir import RESULTS, read_finished
from utils.launch.processes import call_on_main
from utils.launch.script import describe_software
from utils.scoring.metrics.bertscore import describe_encoder, estimate_bertscore, load_encoder, score_with_encoder
from utils.scoring.metrics.diagnostics import describe_notes, describe_texts
from utils.scoring.metrics.rouge import compare_models, score_texts
from utils.scoring.metrics.unsupported import find_all_unsupported, find_ordinary, share_unsupported
from utils.scoring.predictions import hash_predictions
from utils.scoring.tables import describe_differences, is_current, pair_comparisons

logger = logging.getLogger(__name__)
NUM_POINTS = 200  # of a curve in a report; longer ones are thinned
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors")


def is_finished(accelerator: Accelerator, config: EvaluationConfig, rows: list[dict[str, str]]) -> bool:
    """Whether output_dir holds this very evaluation, finished. UserError, on every process, if its settings are the
    same and data, models or texts are not."""

    def check() -> bool:
        before = None if config.overwrite_output_dir else read_finished(config)
        if before is None:
            return False
        check_same(before, config, rows)
        logger.info("%s holds this evaluation, finished; --overwrite_output_dir would redo it", config.output_dir)
        return True

    return call_on_main(accelerator, check)


def check_same(before: dict[str, Any], config: EvaluationConfig, rows: list[dict[str, str]]):
    """UserError if what results.json holds was not made from these rows, models and texts, or lost its texts."""
    if config.predictions_file:
        hashes = hash_predictions(config)
    else:
        hashes = {}
        for name, model, _, model_hash in load_models(config):
            hashes[name] = model_hash
            del model  # before the next one is loaded
    predictions = Path(config.output_dir) / "predictions.jsonl"
    problems = {
        "its scores are from an earlier version": not is_current(before),
        "the data has changed": before.get("data_fingerprint") != hash_value(rows),
        "the models or texts have changed": before.get("hashes") != hashes,
        "the encoder of --bertscore has changed": before.get("bertscore") != describe_encoder(config),
        "predictions.jsonl is not what was written": not predictions.is_file()
        or describe_file(predictions)["sha256"] != before.get("predictions_sha256"),
    }
    if wrong := "; ".join(problem for problem, is_so in problems.items() if is_so):
        raise UserError(
            f"--output_dir {config.output_dir} holds a finished evaluation of the same settings: {wrong}; take "
            "another folder, or --overwrite_output_dir"
        )


def write_results(
    config: EvaluationConfig,
    dialogues: list[dict[str, Any]],
    summaries: dict[str, dict[str, Summary]],
    header: dict[str, Any],
):
    """Score `summaries[model][dialogue]` and write both files; results.json begins with `header`."""
    references = [dialogue["references"] for dialogue in dialogues]
    sources = [dialogue["dialogue"] for dialogue in dialogues]
    texts_of_people = [text for texts in references for text in texts]
    their_sources = [source for source, texts in zip(sources, references, strict=True) for _ in texts]
    in_order = {name: [by_dialogue[source] for source in sources] for name, by_dialogue in summaries.items()}
    texts = {name: [summary.text for summary in texts_of_model] for name, texts_of_model in in_order.items()}
    scores = {
        name: score_texts(
            texts[name], references, config.use_stemmer, config.rouge_newline, config.rouge_tokenizer, name
        )
        for name in texts
    }
    ordinary = find_ordinary([*sources, *texts_of_people])
    unsupported = {name: find_all_unsupported(texts[name], sources, ordinary) for name in texts}
    theirs = find_all_unsupported(texts_of_people, their_sources, ordinary)
    lines = [
        describe_line(name, dialogue, summary, {metric: scores[name][metric][index] for metric in scores[name]})
        | {"unsupported": unsupported[name][index]}
        for name, texts_of_model in in_order.items()
        for index, (dialogue, summary) in enumerate(zip(dialogues, texts_of_model, strict=True))
    ]
    models, comparisons = compare_models(scores, config.seed)
    if config.bertscore:
        for name, values in score_with_encoder(load_encoder(config), texts, references, PartialState().device).items():
            models[name]["bertscore"] = estimate_bertscore(values)
    paths = {} if config.predictions_file else dict(model.split("=", maxsplit=1) for model in config.models)
    for name, texts_of_model in in_order.items():
        truncated = [summary.truncated for summary in texts_of_model]
        models[name]["diagnostics"] = describe_texts(texts[name], sources, truncated)
        models[name]["unsupported"] = share_unsupported(unsupported[name])
        models[name]["training"] = read_training(paths[name]) if name in paths else None
    results = {
        **header,
        "models": models,
        "comparisons": comparisons,
        "references": describe_texts(texts_of_people, their_sources) | {"unsupported": share_unsupported(theirs)},
        "num_dialogues": len(dialogues),
        "num_rows": sum(map(len, references)),
        "num_processes": PartialState().num_processes,
        "settings": dataclasses.asdict(config),
        **describe_software(),
    }
    results["conclusions"] = describe_differences(pair_comparisons(results), len(dialogues))
    results["conclusions"] += describe_notes(config, texts, texts_of_people, header["unknown"])
    write_jsonl(Path(config.output_dir) / "predictions.jsonl", lines)
    # A kill in between leaves texts and scores that are not of each other, as a report will notice.
    results["predictions_sha256"] = describe_file(Path(config.output_dir) / "predictions.jsonl")["sha256"]
    write_json(Path(config.output_dir) / RESULTS, results)


def describe_line(name: str, dialogue: dict, summary: Summary, scores: dict[str, list[float]]) -> dict[str, Any]:
    """A line of predictions.jsonl; `scores[metric]` has an F1 for each reference."""
    line = {"id": dialogue["id"], "model": name, "prediction": summary.text}
    if summary.truncated is not None:
        line["truncated"] = summary.truncated
    return line | {"references": dialogue["references"], "dialogue": dialogue["dialogue"], "scores": scores}


def read_training(folder: str | Path) -> dict[str, Any] | None:
    """Size, time and losses of the run whose model lies in the folder; None where none of these scripts trained it.

    `seconds` are those of the optimizer updates, without validation and saving; `curves[split]` are [step, loss].
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "run_manifest.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        train = [line for line in metrics if line["split"] == "train"]
        points = {
            split: [
                [number_in(line, "step"), number_in(line, "plain_loss" if "plain_loss" in line else "loss")]
                for line in metrics
                if line["split"] == split
            ]
            for split in ("train", "validation")
        }
        names = ("num_parameters", "num_trainable_parameters", "num_train_steps", "num_processes")
        return {
            **{name: number_in(manifest, name) for name in names},
            "device": str(manifest["device"]),
            "size_bytes": sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern)),
            "seconds": sum(number_in(line, "num_examples") / number_in(line, "samples_per_second") for line in train),
            "peak_memory_mib": max((number_in(line, "peak_memory_mib") for line in train), default=None),
            "curves": {split: thin(curve) for split, curve in points.items()},
        }
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return None  # a model from elsewhere, or from an earlier version: its texts are scored all the same


def number_in(values: dict[str, Any], name: str) -> float:
    """TypeError for what is no finite number: the files may be anybody's."""
    value = values[name]
    if isinstance(value, bool | str) or not math.isfinite(value):
        raise TypeError(f"{name}: {value!r}")
    return value


def thin(points: list) -> list:
    """At most NUM_POINTS of them, evenly spaced, with the last."""
    stride = -(-len(points) // NUM_POINTS) or 1
    return points[::-1][::stride][::-1]
