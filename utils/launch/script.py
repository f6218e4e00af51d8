"""Start a script: its settings, its log, and one line instead of a traceback for a user's mistake."""

import importlib.metadata
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm.contrib.logging import logging_redirect_tqdm

from utils.config import REPOSITORY, TrainingConfig, UserError
from utils.files import DISK_ERRORS
from utils.launch.command_line import parse_config
from utils.launch.launcher import check_launcher
from utils.launch.processes import leave_process_group
from utils.launch.stopping import EXIT_STOPPED, end_with_launcher, hold_early_signals
from utils.launch.times import charge_imports

SECONDS_FOR_LAUNCHER = 3  # torchrun looks ten times a second


def run_script(main: Callable[[Any], None], config_class: type, demo_file: str):
    """Call `main` with the command line's settings; a UserError becomes one line on stderr and exit code 2."""
    end_with_launcher()
    if issubclass(config_class, TrainingConfig):
        hold_early_signals()
    start_logging()
    charge_imports()
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
        configure_gpus(config)
        with logging_redirect_tqdm():
            main(config)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except UserError as error:
        return report_mistake(str(error))
    except KeyboardInterrupt:  # before a training listens, or in an evaluation, whose finished batches are kept
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes are
            report_mistake("interrupted")
        return 130
    except BrokenPipeError:  # whoever read the tables has gone; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        return report_mistake(f"--deterministic: {operation} has no deterministic implementation")
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return report_mistake(f"{error.filename or getattr(config, 'output_dir', 'stdout')}: {error.strerror}")


def report_mistake(text: str) -> int:
    """One line on stderr, and the exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # If all processes made this mistake, the first reports it, and the launcher ends this one while it waits.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_LAUNCHER)
    rank = os.environ.get("RANK", "0")
    process = f"process {rank}: " if rank != "0" else ""
    behind_a_bar = rank != "0" and sys.stderr.isatty()  # the main process's, which is still there
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    line = f"{Path(sys.argv[0]).name}: error: {process}{shown}\n"
    sys.stderr.write("\n" * behind_a_bar + line)
    return 2


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


def configure_gpus(config: Any):
    """PyTorch's settings that suit micro-batches of ever new lengths, and --deterministic; to be called before CUDA
    starts."""
    # cuDNN's attention, PyTorch's first choice on an H100, plans each new pair of batch size and lengths anew, for 60
    # to 90 ms. Here every micro-batch is such a pair, and in decoding every token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Tensors of ever new sizes fragment memory that is taken in blocks of fixed size.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if getattr(config, "deterministic", False):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which PyTorch refuses matrix products
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


LIBRARIES = ("torch", "accelerate", "transformers", "datasets", "peft", "evaluate", "rouge_score")


def describe_software() -> dict[str, Any]:
    commit = None
    if shutil.which("git"):
        words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]  # HASH, or HASH-dirty
        git = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        commit = git.stdout.strip() if git.returncode == 0 else None
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"library_versions": versions, "python_version": platform.python_version(), "git_commit": commit}
