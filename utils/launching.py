"""Start a script: its settings, its log, its processes, and one line instead of a traceback for a user's mistake."""

import gc
import importlib.util
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm.contrib.logging import logging_redirect_tqdm

from utils.command_line import parse_config
from utils.config import TrainingConfig, UserError
from utils.files import DISK_ERRORS
from utils.launcher import check_launcher
from utils.stopping import EXIT_STOPPED, listen
from utils.strategies import configure_strategy

logger = logging.getLogger(__name__)
FOR_TRAINING = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
                "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_DYNAMO_BACKEND",
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")  # fmt: skip


def run_script(main: Callable[[Any], None], config_class: type, demo_file: str):
    """Call `main` with the command line's settings; a UserError becomes one line on stderr and exit code 2."""
    if issubclass(config_class, TrainingConfig):
        listen()
    start_logging()
    configure_gpus()
    code = run(main, config_class, demo_file)
    if code in (0, EXIT_STOPPED):  # else the others may be waiting, and are ended by the launcher
        leave_process_group()
    if code:
        sys.exit(code)


def run(main: Callable[[Any], None], config_class: type, demo_file: str) -> int:
    """The exit code. What `main` held is gone by then."""
    try:
        config = parse_config(config_class, demo_file, sys.argv[1:])
        check_launcher(config)
        with logging_redirect_tqdm():
            main(config)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except UserError as error:
        return report_mistake(str(error))
    except KeyboardInterrupt:  # before a training listens, or in an evaluation, whose finished batches are kept
        report_mistake("interrupted")
        return 130
    except BrokenPipeError:  # whoever read the tables has gone; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return report_mistake(f"{error.filename or config.output_dir}: {error.strerror}")


def report_mistake(text: str) -> int:
    """One line on stderr, and the exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine, not once per process
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {' '.join(text.split())}\n")
    return 2


def leave_process_group():
    """To be called when the run's objects are gone, before Python ends; signals are ignored from here on.

    gloo's threads need Python's lock to free the tensors of their last work: if Python has gone by then they abort,
    and if DDP is the last to hold the group it waits for them with the lock in its hand.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        # There is nothing left to stop. Python would put back the default, of which a process dies on its way out.
        signal.signal(number, signal.SIG_IGN)
    if torch.distributed.is_initialized():
        gc.collect()  # what is in reference cycles, DDP among it
        time.sleep(0.1)  # gloo's threads get the lock
        torch.distributed.destroy_process_group()


def start_logging():
    """One line per event on stderr, from this project at INFO and from the libraries only if something is wrong."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it may have been closed by >&-
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # rather than fail where the terminal has no such letter
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("utils").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for library in ("transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    # Accelerate imports DeepSpeed wherever it is installed, which then says on stdout that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def configure_gpus():
    """PyTorch's settings that suit micro-batches of ever new lengths; to be called before CUDA starts."""
    # cuDNN's attention, PyTorch's first choice on an H100, plans each new pair of batch size and lengths anew, for 60
    # to 90 ms. Here every micro-batch is such a pair, and in decoding every token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Tensors of ever new sizes fragment memory that is taken in blocks of fixed size.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """The processes of a training. UserError where precision, tracker or strategy cannot be what was asked."""
    if config.mixed_precision == "bf16" and torch.cuda.is_available():
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("--mixed_precision bf16: this GPU has none; use --mixed_precision no")
    tracker = None if config.report_to == "none" else config.report_to
    if tracker and importlib.util.find_spec(tracker) is None:  # Accelerate would go on without it
        raise UserError(f"--report_to {tracker}: the package is not installed; pip install {tracker}")
    accelerator = start_processes(
        mixed_precision="no" if asks_for("DEEPSPEED") else config.mixed_precision,  # DeepSpeed has its own autocast
        log_with=tracker,
        project_dir=Path(config.output_dir) / "tracker",
    )
    strategy = accelerator.distributed_type.value
    if strategy not in ("NO", "DEEPSPEED", "FSDP") and not strategy.startswith("MULTI_"):
        raise UserError(f"the launcher's distributed_type is {strategy}: DDP, DeepSpeed and FSDP2 are supported")
    configure_strategy(accelerator, config)
    return accelerator


def start_whole_models() -> Accelerator:
    """The processes of an evaluation, which each hold a whole model: how a training is sharded, compiled or rounded
    does not matter."""
    for name in FOR_TRAINING:
        os.environ.pop(name, None)
    return start_processes(mixed_precision="no")


def start_processes(**settings: object) -> Accelerator:
    """The Accelerator of all the processes that the launcher started. UserError where it cannot be what was asked."""
    asked = next((strategy for strategy in ("DEEPSPEED", "FSDP") if asks_for(strategy)), None)
    if asked and "LOCAL_RANK" not in os.environ:
        raise UserError(f"ACCELERATE_USE_{asked} is set: start the script with accelerate launch or torchrun")
    # The main process alone hashes checkpoints and writes and reloads models while the others wait.
    settings["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=timedelta(hours=2))]
    if not torch.accelerator.is_available():
        if num_gpus := os.environ.get("SLURM_GPUS_ON_NODE"):
            logger.warning("Slurm gives %s GPUs on this node and PyTorch sees none: the CPU computes", num_gpus)
        # CPU processes find each other on gloo, and must be told so; otherwise each takes itself for the only one.
        if asked == "DEEPSPEED":
            settings["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo", timeout=timedelta(hours=2))]
        else:
            settings["cpu"] = True
    deepspeed_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") if asked == "DEEPSPEED" else None
    refusals = (ValueError, ImportError, OSError, *((AttributeError, TypeError) if deepspeed_file else ()))
    try:
        accelerator = Accelerator(**settings)
    except refusals as error:
        where = f"--deepspeed_config_file {deepspeed_file}" if deepspeed_file else "the launcher's settings"
        raise UserError(f"{where}: {error}") from error
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != num_processes:
        raise UserError(
            f"the launcher has started {num_processes} processes, of which each takes itself for the only one; "
            "start them with accelerate launch or torchrun"
        )
    strategy = accelerator.distributed_type.value
    if asked and strategy != asked:
        instead = "unset ACCELERATE_USE_CPU" if asked == "DEEPSPEED" else "it needs GPUs"
        raise UserError(f"ACCELERATE_USE_{asked} is set, but what runs is {strategy}: {instead}")
    return accelerator


def asks_for(strategy: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{strategy}", "").lower() == "true"
