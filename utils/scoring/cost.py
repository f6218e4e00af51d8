"""What a training cost, read from what it left in its folder."""

import json
from pathlib import Path
from typing import Any

NUM_POINTS = 200  # of a curve in a report; longer ones are thinned
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors")


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
            split: [[line["step"], line["loss"]] for line in metrics if line["split"] == split]
            for split in ("train", "validation")
        }
        return {
            **{name: manifest[name] for name in ("num_parameters", "num_trainable_parameters", "num_train_steps")},
            "num_processes": manifest["num_processes"],
            "device": manifest["device"],
            "size_bytes": sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern)),
            "seconds": sum(line["num_examples"] / line["samples_per_second"] for line in train),
            "peak_memory_mib": max((line["peak_memory_mib"] for line in train), default=None),
            "curves": {split: thin(curve) for split, curve in points.items()},
        }
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None  # a model from elsewhere, or from an earlier version: its texts are scored all the same


def thin(points: list) -> list:
    """At most NUM_POINTS of them, evenly spaced, with the last."""
    stride = -(-len(points) // NUM_POINTS) or 1
    return points[::-1][::stride][::-1]
