"""Start a script: its settings, its log, its processes, and one line instead of a traceback for a user's mistake."""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from tqdm.contrib.logging import logging_redirect_tqdm

from utils.config import FP16_REFUSAL, TrainingConfig, UserError, parse_config


def run_script(main: Callable[[Any], None], config_class: type, demo_file: str):
    """Call `main` with the command line's settings; a UserError becomes one line on stderr and exit code 2."""
    start_logging()
    try:
        config = parse_config(config_class, demo_file, sys.argv[1:])
        with logging_redirect_tqdm():
            main(config)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine, not once per process
            sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}\n")
        sys.exit(2)


def start_logging():
    """One line per event on stderr, from this project at INFO and from the libraries only if something is wrong."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("utils").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Accelerate imports DeepSpeed wherever it is installed, which then says on stdout that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """The processes that the launcher started. UserError where precision or accumulation cannot be what was asked."""
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UserError(f"the launcher's mixed_precision is fp16: {FP16_REFUSAL}")
    if config.mixed_precision == "bf16" and torch.cuda.is_available():
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("--mixed_precision bf16: this GPU has none; use --mixed_precision no")
    tracker = None if config.report_to == "none" else config.report_to
    if tracker and importlib.util.find_spec(tracker) is None:  # Accelerate would go on without it
        raise UserError(f"--report_to {tracker}: the package is not installed; pip install {tracker}")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with=tracker, project_dir=Path(config.output_dir) / "tracker"
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"the launcher sets gradient_accumulation_steps to {accelerator.gradient_accumulation_steps}; remove it: "
            "it follows from --total_train_batch_size, --per_device_train_batch_size and the number of processes"
        )
    strategy = accelerator.distributed_type.value
    if strategy != "NO" and not strategy.startswith("MULTI_"):
        raise UserError(
            f"the launcher's distributed_type is {strategy}: only whole models on each process are supported"
        )
    torch.manual_seed(config.seed)  # an adapter's first weights are random
    return accelerator
