"""The processes of a run, and how they leave."""

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list

from utils.config import UserError

logger = logging.getLogger(__name__)
MINUTES_TO_MEET = 10
FOR_TRAINING = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
                "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_DYNAMO_BACKEND",
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")  # fmt: skip


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


def start_evaluation() -> Accelerator:
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
    # The main process alone hashes checkpoints, writes models and merges them while the others wait.
    settings["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=timedelta(hours=2))]
    if not torch.accelerator.is_available():
        if num_gpus := os.environ.get("SLURM_GPUS_ON_NODE"):
            logger.warning("Slurm gives %s GPUs on this node and PyTorch sees none: the CPU computes", num_gpus)
        # CPU processes find each other on gloo, and must be told so; otherwise each thinks that it is the only one.
        if asked == "DEEPSPEED":
            settings["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo", timeout=timedelta(hours=2))]
        else:
            settings["cpu"] = True
    deepspeed_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") if asked == "DEEPSPEED" else None
    refusals = (ValueError, ImportError, OSError, *((AttributeError, TypeError) if deepspeed_file else ()))
    # The process group waits as long for a process that never comes as for one that writes a model.
    watch = threading.Timer(60 * MINUTES_TO_MEET, give_up)
    watch.daemon = True
    watch.start()
    try:
        accelerator = Accelerator(**settings)
    except refusals as error:
        where = f"--deepspeed_config_file {deepspeed_file}" if deepspeed_file else "the launcher's settings"
        raise UserError(f"{where}: {error}") from error
    finally:
        watch.cancel()
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != num_processes:
        raise UserError(
            f"the launcher has started {num_processes} processes, of which each thinks that it is the only one; "
            "start them with accelerate launch or torchrun"
        )
    strategy = accelerator.distributed_type.value
    if asked and strategy != asked:
        instead = "unset ACCELERATE_USE_CPU" if asked == "DEEPSPEED" else "it needs GPUs"
        raise UserError(f"ACCELERATE_USE_{asked} is set, but what runs is {strategy}: {instead}")
    return accelerator


def give_up():
    here = [os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    sys.stderr.write(
        "{}: error: process {} of {}: the others did not all connect to {}:{} within {} minutes\n".format(
            Path(sys.argv[0]).name, *here, MINUTES_TO_MEET
        )
    )
    sys.stderr.flush()
    os._exit(2)  # the main thread is waiting in PyTorch


def call_on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """What the function returns on the main process, on every process; so is a UserError that it raises there."""
    value, error = None, None
    if accelerator.is_main_process:
        try:
            value = function()
        except UserError as user_error:
            error = str(user_error)
    value, error = broadcast_object_list([value, error])
    if error:
        raise UserError(error)
    return value


def asks_for(strategy: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{strategy}", "").lower() == "true"
