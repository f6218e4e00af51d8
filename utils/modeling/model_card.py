"""README.md of a model's folder: the hub's model card, for whoever finds the model without the run."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from utils.config import LoraTrainingConfig, TrainingConfig
from utils.files import write_file
from utils.launch.output_dir import CARD, CARD_MARK, is_own_card

SCORES_BEGIN, SCORES_END = "<!-- scores -->", "<!-- end of scores -->"
SETTINGS = (
    "num_train_epochs", "max_train_steps", "total_train_batch_size", "learning_rate", "lr_scheduler_type",
    "warmup_ratio", "weight_decay", "max_grad_norm", "label_smoothing_factor", "max_source_length",
    "max_target_length", "mixed_precision", "seed", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
    "use_rslora", "use_dora", "loraplus_lr_ratio", "load_in_4bit",
)  # fmt: skip


def write_model_card(config: TrainingConfig, run: dict[str, Any], folder: Path, is_adapter: bool):
    """Write README.md into the model's folder, unless one lies there that is not this function's.

    Args:
        run: what tracking.describe_run says of it.
    """
    if (folder / CARD).exists() and not is_own_card(folder / CARD):
        return
    base, is_lora = Path(config.model_name_or_path), isinstance(config, LoraTrainingConfig)
    base_name = base.resolve().name if base.exists() else base
    data = Path(config.train_file).name if config.train_file else config.dataset_name
    metadata = ModelCardData(
        base_model=None if base.exists() else config.model_name_or_path,
        datasets=None if config.train_file else [config.dataset_name],
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="summarization",
    )
    how = "with LoRA" if is_lora else "in full"
    kind = "the adapter alone; peft must be installed" if is_adapter else "a full model"
    if is_lora and not is_adapter:
        kind = "base and adapter merged into one full model"
    lines = [
        *("---", metadata.to_yaml(), "---"), CARD_MARK, "",
        f"# {folder.resolve().name}", "",
        f"`{base_name}` fine-tuned {how} to summarise dialogues, on {run['num_train_examples']:,} examples of "
        f"`{data}`: {kind}.", "",
        *describe_use(folder, config), "",
        *describe_training(config, run), "",
        SCORES_BEGIN, SCORES_END,
    ]  # fmt: skip
    write_file(folder / CARD, ("\n".join(lines) + "\n").encode())


def describe_use(folder: Path, config: TrainingConfig) -> list[str]:
    return [
        "## Use", "",
        "```python",
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig", "",
        f"name = {folder.resolve().name!r}  # a folder, or a name on the hub",
        "settings = GenerationConfig.from_pretrained(name)",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        "model = AutoModelForSeq2SeqLM.from_pretrained(name, generation_config=settings)",
        'dialogue = "#Person1#: May I borrow your ladder?\\n#Person2#: Sure, take it."',
        'prompt = f"{settings.source_prefix}{dialogue}{settings.source_suffix}"',
        'ids = model.generate(**tokenizer(prompt, return_tensors="pt"))',
        "print(tokenizer.decode(ids[0], skip_special_tokens=True))",
        "```", "",
        f"The prompt is part of the model: {json.dumps(config.source_prefix)} before the dialogue and "
        f"{json.dumps(config.source_suffix)} after it. It was trained on prompts of at most "
        f"{config.max_source_length:,} tokens.",
    ]  # fmt: skip


def describe_training(config: TrainingConfig, run: dict[str, Any]) -> list[str]:
    settings = {name: getattr(config, name, None) for name in SETTINGS}
    settings = {name: value for name, value in settings.items() if value is not None and value is not False}
    settings.pop("num_train_epochs" if config.max_train_steps else "", None)
    text = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in text.splitlines()]
    num_updates = max(line["step"] for line in metrics)
    last = {line["split"]: line for line in metrics}
    exported = f"{num_updates:,} updates"
    if config.load_best_model_at_end:
        metric, sign = config.metric_for_best_model, 1 if config.metric_for_best_model == "loss" else -1
        validations = [line for line in metrics if line["split"] == "validation" and line["step"] > 0]
        last["validation"] = min(validations, key=lambda line: sign * line[metric])
        exported += f", of which the best model, after {last['validation']['step']:,}, is this"
    rows = [
        (
            f"{split} loss per target token, in nats",
            f"{line.get('plain_loss', line['loss']):.4f} (update {line['step']:,})",
        )
        for split, line in last.items()
    ]
    rows += [(name, ", ".join(value) if isinstance(value, list) else value) for name, value in settings.items()]
    return [
        "## Training", "",
        f"{exported}; {run['num_trainable_parameters']:,} of {run['num_parameters']:,} "
        "parameters were trained.", "",
        "| | |", "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]  # fmt: skip


def add_scores(folder: Path, text: str) -> bool:
    """Put Markdown in place of the card's scores; whether there is a card that has a place for them."""
    path = folder / CARD
    if not path.is_file():
        return False
    before, begin, rest = path.read_text(encoding="utf-8").partition(SCORES_BEGIN)
    _, end, after = rest.partition(SCORES_END)
    if not (begin and end):
        return False
    write_file(path, f"{before}{begin}\n{text}\n{end}{after}".encode())
    return True
