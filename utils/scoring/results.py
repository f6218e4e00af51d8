"""From each model's texts to predictions.jsonl and results.json, which hold all that a report shows."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

from accelerate import PartialState

from utils.config import EvaluationConfig
from utils.files import describe_file, write_json, write_jsonl
from utils.launch.script import describe_software
from utils.scoring.cost import read_training
from utils.scoring.diagnostics import describe_texts
from utils.scoring.rouge import compare_models, score_texts
from utils.scoring.tables import describe_differences, pair_comparisons

logger = logging.getLogger(__name__)


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
    models, comparisons = compare_models(scores, config.seed)
    num_unseen = sum(not re.search("[a-z0-9]", text.lower()) for texts in references for text in texts)
    if num_unseen:
        logger.warning("%d references have no letter a to z and no digit: nothing else counts in ROUGE", num_unseen)
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
    write_jsonl(Path(config.output_dir) / "predictions.jsonl", lines)
    # A kill in between leaves texts and scores that are not of each other, as a report will notice.
    results["predictions_sha256"] = describe_file(Path(config.output_dir) / "predictions.jsonl")["sha256"]
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
