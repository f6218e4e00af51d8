"""End a run early without losing it: signals, a file STOP, a time limit; all processes at the same update."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

from utils.config import PARENT, TrainingConfig, parse_duration
from utils.launch.launcher import find_launch_words

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
PR_SET_PDEATHSIG = 1
early_signals = []


def hold_early_signals():
    """Remember a SIGUSR1 that comes while the script is loading, so that it stops at its first update.

    SIGTERM ends it at once until then: there is nothing to save, and other processes may be waiting for its end.
    """
    signal.signal(signal.SIGUSR1, lambda number, frame: early_signals.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # slurm/launch.sh holds it back until here


def end_with_launcher():
    """Have the system send SIGTERM when the launcher ends: `accelerate launch` of one process, and any launcher on
    SIGUSR1 or SIGKILL, tells no one."""
    has_ended = os.getppid() != PARENT and "ACCELERATE_MIXED_PRECISION" in os.environ  # while this one was importing
    by_launcher = find_launch_words() is not None or "TORCHELASTIC_RUN_ID" in os.environ
    if by_launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        has_ended |= os.getppid() != PARENT
    if has_ended:
        os.kill(os.getpid(), signal.SIGTERM)


class StopRequest:
    """Whether somebody asked to stop since the run began."""

    def __init__(self, accelerator: Accelerator, config: TrainingConfig):
        self.accelerator = accelerator
        self.file = Path(config.output_dir) / "STOP"
        self.deadline = time.monotonic() + parse_duration(config.max_time) if config.max_time else float("inf")
        self.signaled = bool(early_signals)
        self.interrupted_at = None
        self.agreed = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.take_signal)

    def take_signal(self, number: int, frame: FrameType | None):
        if number == signal.SIGINT:
            # torchrun passes on what the terminal has sent already: only a later one is a second one.
            if self.interrupted_at is not None and time.monotonic() > self.interrupted_at + 1:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            self.interrupted_at = self.interrupted_at or time.monotonic()
        self.signaled = True

    def asked(self) -> bool:
        """On all processes, whether any was asked; every process must call it. Once true, it stays true."""
        here = self.signaled or time.monotonic() > self.deadline or self.file.exists()
        if not self.agreed:
            flag = torch.tensor(int(here), device=self.accelerator.device)
            self.agreed = bool(
                self.accelerator.reduce(flag, "sum").item() if self.accelerator.num_processes > 1 else here
            )
        return self.agreed
