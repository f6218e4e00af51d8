"""Settings: one flat dataclass per script, with a part for each heading of --help. command_line.py reads them."""

import difflib
import hashlib
import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from utils.prompting import DEFAULT_PROMPT, Prompt

PARENT = os.getppid()  # read at once: a launcher may end while the libraries are imported
REPOSITORY = Path(__file__).resolve().parent.parent
SPLITS = ("train", "validation", "test")
FP16_REFUSAL = "fp16 overflows in T5 and trains to NaN; use --mixed_precision bf16, or no on a device without bf16"


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line, without a traceback, with exit code 2."""


def setting(default: Any, help_text: str) -> Any:
    """One field of a config, with its line of help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


def int_or_float(text: str) -> int | float:
    return int(text) if re.fullmatch(r"\d+", text) else float(text)


def size_or_auto(text: str) -> int | str:
    """A number of examples, or `auto`."""
    return text if text == "auto" else int(text)


@dataclass(frozen=True)
class Config:
    """A number must be positive, or the default, unless it is in `_have_limits` of its class, which checks them."""

    def __post_init__(self):
        have_limits = {name for part in type(self).__mro__ for name in vars(part).get("_have_limits", ())}
        for item in fields(self):
            value = getattr(self, item.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and value != item.default
            if is_number and item.name not in have_limits and not 0 < value < math.inf:  # nan is not 0 < nan
                raise UserError(f"--{item.name} must be positive, got {value}")


@dataclass(frozen=True)
class SourceConfig(Config):
    _argument_group_name = "dialogues"  # the heading of these settings in --help

    dialogue_column: str = setting("dialogue", "column that holds the dialogue")
    max_source_length: int = setting(1024, "longest prompt, in tokens; the dialogue's end is cut")


@dataclass(frozen=True)
class DataConfig(Config):
    _argument_group_name = "data"

    dataset_name: str = setting("knkarthick/dialogsum", "data set on the Hugging Face hub; not used with files")
    dataset_config_name: str | None = setting(None, "configuration of the hub's data set, if it has several")
    dataset_revision: str | None = setting(None, "commit, tag or branch of the hub's data set")
    validation_split: str = setting("validation", "name of the hub's split to validate on")
    train_file: str | None = setting(None, "csv, jsonl, json or parquet file to train on, instead of the hub's")
    validation_file: str | None = setting(None, "file for the validation loss")
    test_file: str | None = setting(None, "file that evaluate_rouge.py scores; the training scripts do not read it")
    summary_column: list[str] = setting(
        ["summary"], "column that holds the summary, or several, or one that holds lists: references of one dialogue"
    )
    max_eval_samples: int | None = setting(None, "validate on, or score, the first N rows only")

    def __post_init__(self):
        super().__post_init__()
        if self.dialogue_column in self.summary_column:
            raise UserError(f"--dialogue_column and --summary_column are both {self.dialogue_column!r}")


@dataclass(frozen=True)
class RougeConfig(Config):
    _argument_group_name = "ROUGE"

    rouge_tokenizer: Literal["default", "unicode"] = setting(
        "default", "how ROUGE splits words: default is rouge_score's, a to z and digits; unicode takes any script"
    )


@dataclass(frozen=True)
class DeviceConfig(Config):
    _argument_group_name = "device"

    per_device_eval_batch_size: size_or_auto = setting(
        "auto",
        "full-length examples per forward pass in validation and generation, more if they are shorter; auto: 32, but "
        "on a GPU summaries take as many as fit in a quarter of its memory",
    )
    attn_implementation: Literal["sdpa", "eager"] = setting("sdpa", "how attention is computed")

    @property
    def eval_batch_size(self) -> int:
        return 32 if self.per_device_eval_batch_size == "auto" else self.per_device_eval_batch_size


@dataclass(frozen=True)
class RunConfig(Config):
    _argument_group_name = "run"
    _have_limits = ("seed",)

    output_dir: str = setting("./output", "folder for all that the run leaves")
    overwrite_output_dir: bool = setting(False, "replace the results of a run that output_dir holds")
    seed: int = setting(42, "seed of everything that is random")
    demo: bool = setting(False, "take the tiny model and data of demo/: no network, minutes on two CPU cores")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.seed < 2**63:  # what torch takes
            raise UserError(f"--seed must be at least 0 and below 2**63, got {self.seed}")


@dataclass(frozen=True)
class OptimizationConfig(Config):
    _argument_group_name = "model and optimization"
    _have_limits = ("weight_decay", "warmup_ratio", "label_smoothing_factor")

    model_name_or_path: str = setting("google/flan-t5-base", "encoder-decoder model: hub name or folder")
    max_target_length: int = setting(128, "longest summary, in tokens; the end is cut")
    source_prefix: str = setting(DEFAULT_PROMPT.source_prefix, "what the prompt says before the dialogue")
    source_suffix: str = setting(DEFAULT_PROMPT.source_suffix, "what the prompt says after it; never cut")
    train_on_all_references: bool = setting(
        False, "make a row of each of a dialogue's references, instead of its first alone"
    )
    max_train_samples: int | None = setting(None, "train on the first N rows only")
    num_train_epochs: int_or_float = setting(1, "passes over the training set, also 0.5 or 2.5")
    max_train_steps: int | None = setting(None, "optimizer updates, instead of num_train_epochs")
    total_train_batch_size: int = setting(256, "examples per optimizer update, over all processes")
    per_device_train_batch_size: size_or_auto = setting(
        "auto",
        "full-length examples per forward pass, more if they are shorter; auto: as many as the GPU holds, 16 on a CPU",
    )
    learning_rate: float = setting(1e-3, "highest learning rate of AdamW")
    weight_decay: float = setting(0.01, "AdamW's weight decay, on matrices only")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = setting(
        "linear", "shape of the learning rate after the warm-up"
    )
    warmup_ratio: float = setting(0.0, "share of the updates over which the learning rate rises from 0")
    max_grad_norm: float = setting(1.0, "largest L2 norm of the gradient")
    label_smoothing_factor: float = setting(
        0.0, "share of each target token's weight that goes to the whole vocabulary, in the training loss alone"
    )
    mixed_precision: Literal["bf16", "no", "fp16"] = setting("bf16", "bf16: autocast over fp32 weights; no: fp32")
    gradient_checkpointing: bool = setting(False, "compute activations twice to hold fewer")
    compile: bool = setting(
        False, "compile the model's blocks in the first update, which then takes half a minute or more; for long runs"
    )
    deterministic: bool = setting(
        False,
        "make a run on a GPU repeatable and resumable bit for bit, as on a CPU; slower",
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.label_smoothing_factor < 1:
            factor = self.label_smoothing_factor
            raise UserError(f"--label_smoothing_factor must be at least 0 and below 1, got {factor}")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"--warmup_ratio must be between 0 and 1, got {self.warmup_ratio}")
        if self.lr_scheduler_type == "constant" and self.warmup_ratio:
            raise UserError(f"--warmup_ratio {self.warmup_ratio} needs --lr_scheduler_type constant_with_warmup")
        if self.lr_scheduler_type == "inverse_sqrt" and not self.warmup_ratio:  # it falls from the warm-up's end
            raise UserError("--lr_scheduler_type inverse_sqrt needs a --warmup_ratio above 0, got 0.0")
        if self.mixed_precision == "fp16":
            raise UserError(f"--mixed_precision fp16: {FP16_REFUSAL}")

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.source_prefix, self.source_suffix)

    @property
    def length_multiple(self) -> int:
        """What the lengths of training's micro-batches are padded to a multiple of, so that few graphs serve all."""
        return 64 if self.compile else 1


@dataclass(frozen=True)
class CheckpointConfig(Config):
    _argument_group_name = "records and checkpoints"

    logging_steps: int = setting(10, "optimizer updates between two train lines in metrics.jsonl")
    eval_steps: int = setting(10, "optimizer updates between two validation losses")
    checkpointing_steps: int = setting(10, "optimizer updates between two checkpoints")
    checkpoints_total_limit: int = setting(3, "newest checkpoints that are kept, beside the best")
    resume_from_checkpoint: str | None = setting(
        None, "latest, or a folder of output_dir/checkpoints: resume from there, as if never interrupted"
    )
    metric_for_best_model: Literal["loss", "rouge1", "rouge2", "rougeL"] = setting(
        "loss", "what the best checkpoint is chosen by, on the validation rows; ROUGE on the first 64"
    )
    load_best_model_at_end: bool = setting(False, "export the best model instead of the last")
    early_stopping_patience: int | None = setting(
        None, "stop after this many validations in a row without improvement in metric_for_best_model"
    )
    max_time: str | None = setting(None, "HH:MM:SS: write a checkpoint and stop with exit code 75 after that long")
    preflight: bool = setting(False, "load no weights, say what the run would need and whether it can start, and end")
    assume_memory: str | None = setting(
        None, "with --preflight: estimate for a GPU of this much memory, such as 16GB, instead of for this machine"
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"] = setting(
        "none", "tracker, beside metrics.jsonl"
    )
    project_name: str = setting("dialogsum", "the tracker's project, or mlflow's experiment")
    run_name: str | None = setting(None, "the tracker's name of the run")

    def __post_init__(self):
        super().__post_init__()
        if self.max_time is not None and parse_duration(self.max_time) == 0:
            raise UserError("--max_time must be longer than no time")
        if self.resume_from_checkpoint == "":
            raise UserError("--resume_from_checkpoint is empty: latest, or a folder")
        if self.assume_memory is not None and parse_memory(self.assume_memory) and not self.preflight:
            raise UserError(f"--assume_memory {self.assume_memory} needs --preflight")

    @property
    def needs_validation(self) -> bool:
        chooses = self.load_best_model_at_end or self.early_stopping_patience is not None
        return chooses or self.metric_for_best_model != "loss"


@dataclass(frozen=True)
class TrainingConfig(
    CheckpointConfig, OptimizationConfig, DeviceConfig, RougeConfig, RunConfig, DataConfig, SourceConfig
):
    output_dir: str = setting("./flan-t5-base-dialogsum-checkpoint", "folder for the model and the run's records")


@dataclass(frozen=True)
class AdapterConfig(Config):
    _argument_group_name = "LoRA"
    _have_limits = ("lora_dropout", "loraplus_lr_ratio")

    adapter_name_or_path: str | None = setting(
        None, "go on training this adapter of model_name_or_path, with its own rank, alpha, dropout, prompt and so on"
    )
    lora_r: int = setting(32, "rank of the adapter's matrices")
    lora_alpha: int = setting(32, "the adapter's output is scaled by lora_alpha / lora_r")
    lora_dropout: float = setting(0.1, "dropout on the adapter's input")
    lora_target_modules: list[str] = setting(
        ["q", "v"], "names of the linear layers that get an adapter; all-linear: all but the head"
    )
    use_rslora: bool = setting(False, "scale the adapter's output by lora_alpha / sqrt(lora_r) instead")
    use_dora: bool = setting(False, "DoRA: train the length of each row of an adapted weight apart from its direction")
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+: the learning rate of the adapter's B matrices is this many times that of its A matrices"
    )
    load_in_4bit: bool = setting(False, "hold the frozen weights in 4 bits, on a GPU: requirements-4bit.txt")
    merge_into: str | None = setting(None, "folder for base and adapter merged into one full model, in fp32")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if self.loraplus_lr_ratio is not None and not 1 <= self.loraplus_lr_ratio < math.inf:
            raise UserError(f"--loraplus_lr_ratio must be at least 1, got {self.loraplus_lr_ratio}")
        if self.merge_into == "":
            raise UserError("--merge_into is empty: a folder for the merged model")


@dataclass(frozen=True)
class LoraTrainingConfig(AdapterConfig, TrainingConfig):
    output_dir: str = setting("./flan-t5-base-dialogsum-lora", "folder for the adapter and the run's records")

    def __post_init__(self):
        super().__post_init__()
        if self.load_in_4bit and self.mixed_precision != "bf16":
            raise UserError("--load_in_4bit computes in bf16: leave --mixed_precision at bf16")


@dataclass(frozen=True)
class DecodingConfig(Config):
    _argument_group_name = "generation"
    _have_limits = ("length_penalty",)

    max_new_tokens: int = setting(128, "longest generated summary, in tokens")
    min_new_tokens: int | None = setting(None, "shortest generated summary, in tokens; by default the model's own")
    no_repeat_ngram_size: int | None = setting(
        None, "no sequence of this many tokens is repeated in a summary; by default the model's own setting"
    )
    num_beams: int = setting(1, "beams of the search; 1 is greedy")
    length_penalty: float = setting(1.0, "with beams: above 0 favours longer texts, below 0 shorter ones")
    dtype: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "precision of generation; auto: bf16 on a GPU that supports it, else fp32"
    )
    base_model_name_or_path: str | None = setting(
        None, "base of every adapter, instead of the one that it names, which may have moved"
    )

    def __post_init__(self):
        super().__post_init__()
        if not -100 <= self.length_penalty <= 100:
            raise UserError(f"--length_penalty must be between -100 and 100, got {self.length_penalty}")
        if self.length_penalty != 1 and self.num_beams == 1:
            raise UserError(f"--length_penalty {self.length_penalty} needs --num_beams above 1")
        if self.max_new_tokens > 100_000:
            raise UserError(f"--max_new_tokens must be at most 100000, got {self.max_new_tokens}")
        if (self.min_new_tokens or 0) > self.max_new_tokens:
            raise UserError(f"--min_new_tokens {self.min_new_tokens} is above --max_new_tokens {self.max_new_tokens}")


@dataclass(frozen=True)
class ScoringConfig(Config):
    _argument_group_name = "models and scoring"
    _have_limits = ("example_index",)

    models: list[str] = setting(
        ["original=google/flan-t5-base", "full=./flan-t5-base-dialogsum-checkpoint",
         "lora=./flan-t5-base-dialogsum-lora"],
        "NAME=PATH_OR_HUB_ID of each model; a LoRA folder brings its base along",
    )  # fmt: skip
    predictions_file: list[str] = field(
        default_factory=list,
        metadata={"help": "FILE or NAME=FILE, also several: score the texts in these instead", "action": "extend"},
    )
    split: Literal["train", "validation", "test"] = setting("test", "split to summarise and score")
    example_index: int = setting(42, "row of the split to print with every model's summary")
    use_stemmer: bool = setting(False, "ROUGE on Porter stems, as papers and run_summarization do")
    rouge_newline: bool = setting(False, "a line for each sentence before scoring: rougeLsum takes a line for one")
    bertscore: str | None = setting(
        None, "also score by BERTScore with this encoder, hub name or folder: requirements-bertscore.txt"
    )
    bertscore_num_layers: int | None = setting(
        None,
        "layer whose embeddings BERTScore compares; by default the one that bert_score has for the encoder's name",
    )
    add_to_card: bool = setting(False, "put the scores into README.md of each model that was trained here")
    report_only: bool = setting(False, "only write the reports again, from what output_dir holds")

    def __post_init__(self):
        super().__post_init__()
        if self.example_index < 0:
            raise UserError(f"--example_index must not be negative, got {self.example_index}")
        if self.bertscore == "":
            raise UserError("--bertscore is empty")
        if self.bertscore_num_layers and not self.bertscore:
            raise UserError(f"--bertscore_num_layers {self.bertscore_num_layers} needs --bertscore")
        if self.add_to_card and self.predictions_file:
            raise UserError("--add_to_card needs models, and --predictions_file names texts")
        names = [model.partition("=")[0] for model in self.models]
        for model, name in zip(self.models, names, strict=True):
            if not name or not model.partition("=")[2]:
                raise UserError(f"--models takes NAME=PATH_OR_HUB_ID, got {model!r}")
            if names.count(name) > 1:
                raise UserError(f"--models names {name!r} twice")
            check_model_name(name, "models", self.demo)


@dataclass(frozen=True)
class EvaluationConfig(ScoringConfig, RougeConfig, DecodingConfig, DeviceConfig, RunConfig, DataConfig, SourceConfig):
    output_dir: str = setting("./rouge-report", "folder for predictions.jsonl, results.json and the reports")

    @property
    def partial_texts(self) -> Path:
        """Of the files of finished batches, what their names begin with."""
        return Path(self.output_dir, "predictions.partial")


@dataclass(frozen=True)
class TextsConfig(Config):
    _argument_group_name = "texts in, summaries out"

    model: str = setting("./flan-t5-base-dialogsum-lora", "hub name or folder; a LoRA folder brings its base along")
    input_file: str | None = setting(
        None, "txt file of one dialogue, or csv, jsonl, json or parquet; without it, one dialogue is read from stdin"
    )
    output_file: str | None = setting(None, "csv or jsonl file; without it, one summary is written to stdout")
    summary_column: str = setting("summary", "column of output_file for the summaries")
    overwrite_output_file: bool = setting(False, "replace an output_file that is there")
    demo: bool = setting(False, "summarise the demo's test rows with its LoRA model: no network")

    def __post_init__(self):
        super().__post_init__()
        for name in ("model", "input_file", "output_file", "summary_column"):
            if getattr(self, name) == "":
                raise UserError(f"--{name} is empty")
        if self.summary_column == "truncated":
            raise UserError("--summary_column: 'truncated' is the name of another column of the output")


@dataclass(frozen=True)
class SummaryConfig(TextsConfig, DecodingConfig, DeviceConfig, SourceConfig):
    _not_of_texts = ("dtype", "overwrite_output_file")  # auto becomes a dtype once the device is known

    @property
    def partial_texts(self) -> Path | None:
        """Of the files of finished batches, what their names begin with; None if there are to be none."""
        # By settings, so that another command's are not taken for this one's.
        settings = sorted((name, value) for name, value in vars(self).items() if name not in self._not_of_texts)
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
        return Path(f"{self.output_file}.partial-{digest}") if self.output_file else None


def parse_duration(text: str) -> int:
    """Seconds of HH:MM:SS."""
    if not re.fullmatch(r"\d{1,4}:[0-5]\d:[0-5]\d", text):
        raise UserError(f"--max_time must be HH:MM:SS, got {text!r}")
    hours, minutes, seconds = map(int, text.split(":"))
    return (hours * 60 + minutes) * 60 + seconds


def parse_memory(text: str) -> int:
    """Bytes of 16GB or 16GiB."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d+)?) ?(GB|GiB)", text, flags=re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise UserError(f"--assume_memory must be a size such as 16GB, got {text!r}")
    return int(float(found[1]) * (10**9 if found[2].upper() == "GB" else 2**30))


def check_model_name(name: str, setting: str, demo: bool):
    """UserError for a name that would be another's in the results."""
    if name in ("dialogue", "human summary") or " ".join(name.split()) != name:
        raise UserError(f"--{setting}: {name!r} cannot be a model's name: take a word of letters and digits")
    if "_vs_" in name:
        raise UserError(f"--{setting}: {name!r} contains '_vs_', which separates two names in a comparison")
    if demo and name == "random":
        raise UserError(f"--{setting}: with --demo, 'random' is the name of the random training summaries")


def nearest(name: str, names: list[str], prefix: str) -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""
