"""From each model's texts to predictions.jsonl and results.json, which hold all that a report shows."""

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import PartialState

from utils.config import EvaluationConfig
from utils.cost import read_training
from utils.diagnostics import describe_texts
from utils.files import write_json, write_jsonl
from utils.rouge import compare_models, score_texts
from utils.tables import describe_differences, pair_comparisons
from utils.tracking import describe_software


def write_results(
    config: EvaluationConfig,
    dialogues: list[dict[str, Any]],
    predictions: dict[str, list[str]],
    truncated: dict[str, list[bool | None]],
    facts: dict[str, Any],
):
    """Score `predictions[model]` and write both files; results.json begins with `facts`."""
    references = [dialogue["references"] for dialogue in dialogues]
    scores = {
        name: score_texts(texts, references, config.use_stemmer, config.rouge_newline, name)
        for name, texts in predictions.items()
    }
    lines = [
        describe_line(name, index, dialogue, predictions, truncated, scores)
        for name in predictions
        for index, dialogue in enumerate(dialogues)
    ]
    write_jsonl(Path(config.output_dir) / "predictions.jsonl", lines)
    models, comparisons = compare_models(scores, config.seed)
    sources = [dialogue["dialogue"] for dialogue in dialogues]
    paths = {} if config.predictions_file else dict(model.split("=", maxsplit=1) for model in config.models)
    for name, texts in predictions.items():
        models[name]["diagnostics"] = describe_texts(texts, sources, truncated.get(name))
        models[name]["training"] = read_training(paths[name]) if name in paths else None
    results = {
        **facts,
        "models": models,
        "comparisons": comparisons,
        "references": describe_texts(
            [text for texts in references for text in texts],
            [source for source, texts in zip(sources, references, strict=True) for _ in texts],
        ),
        "num_dialogues": len(dialogues),
        "num_rows": sum(map(len, references)),
        "num_processes": PartialState().num_processes,
        "settings": dataclasses.asdict(config),
        **describe_software(),
    }
    results["conclusions"] = describe_differences(pair_comparisons(results), len(dialogues))
    write_json(Path(config.output_dir) / "results.json", results)


def describe_line(
    name: str, index: int, dialogue: dict, predictions: dict, truncated: dict, scores: dict
) -> dict[str, Any]:
    """A line of predictions.jsonl; `scores[metric]` has an F1 for each reference."""
    line = {"id": dialogue["id"], "model": name, "prediction": predictions[name][index]}
    if truncated.get(name) and truncated[name][index] is not None:
        line["truncated"] = truncated[name][index]
    of_line = {metric: of_metric[index] for metric, of_metric in scores[name].items()}
    return line | {"references": dialogue["references"], "dialogue": dialogue["dialogue"], "scores": of_line}
