"""Start a script: its settings, its log, its processes, and one line instead of a traceback for a user's mistake."""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm.contrib.logging import logging_redirect_tqdm

from utils.config import FP16_REFUSAL, TrainingConfig, UserError, parse_config
from utils.files import DISK_ERRORS
from utils.strategies import configure_strategy


def run_script(main: Callable[[Any], None], config_class: type, demo_file: str):
    """Call `main` with the command line's settings; a UserError becomes one line on stderr and exit code 2."""
    start_logging()
    try:
        config = parse_config(config_class, demo_file, sys.argv[1:])
        with logging_redirect_tqdm():
            main(config)
    except UserError as error:
        end_with(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        end_with(f"{error.filename or config.output_dir}: {error.strerror}")


def end_with(text: str) -> NoReturn:
    """One line on stderr and exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine, not once per process
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {' '.join(text.split())}\n")
    sys.exit(2)


def start_logging():
    """One line per event on stderr, from this project at INFO and from the libraries only if something is wrong."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("utils").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for library in ("transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
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
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    on_cpu = deepspeed and not torch.accelerator.is_available()  # where it must be told how processes talk
    accelerator = Accelerator(
        mixed_precision="no" if deepspeed else config.mixed_precision,  # DeepSpeed has an autocast of its own
        log_with=tracker,
        project_dir=Path(config.output_dir) / "tracker",
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else [],
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"the launcher sets gradient_accumulation_steps to {accelerator.gradient_accumulation_steps}; remove it: "
            "it follows from --total_train_batch_size, --per_device_train_batch_size and the number of processes"
        )
    strategy = accelerator.distributed_type.value
    if strategy not in ("NO", "DEEPSPEED", "FSDP") and not strategy.startswith("MULTI_"):
        raise UserError(f"the launcher's distributed_type is {strategy}: DDP, DeepSpeed and FSDP2 are supported")
    configure_strategy(accelerator, config)
    return accelerator
