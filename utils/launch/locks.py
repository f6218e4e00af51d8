"""Locks on the folders that a run writes to."""

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from utils.config import UserError
from utils.files import make_folder
from utils.launch.output_dir import check_output_dir
from utils.launch.processes import call_on_main

logger = logging.getLogger(__name__)
LOCK = ".lock"


def lock_output_dir(accelerator: Accelerator, config: Any) -> contextlib.ExitStack:
    """Lock the folders that a run writes to, until what comes back is closed, and check them again: since they were
    checked first, another run may have ended there. UserError on every process."""

    def lock(locks: contextlib.ExitStack):
        for setting in ("output_dir", "merge_into"):
            if folder := getattr(config, setting, None):
                locks.enter_context(lock_folder(Path(folder), setting))
        check_output_dir(config)

    return lock_on_main(accelerator, lock)


def lock_output_file(accelerator: Accelerator, path: Path, check: Callable[[], None]) -> contextlib.ExitStack:
    """The same for a file."""

    def lock(locks: contextlib.ExitStack):
        locks.enter_context(lock_path(path, path.with_name(f".{path.name}.lock"), "output_file"))
        check()

    return lock_on_main(accelerator, lock)


def lock_on_main(accelerator: Accelerator, lock: Callable[[contextlib.ExitStack], None]) -> contextlib.ExitStack:
    with contextlib.ExitStack() as locks:
        call_on_main(accelerator, lambda: lock(locks))
        return locks.pop_all()  # unless it failed: then they are let go


@contextlib.contextmanager
def lock_folder(folder: Path, setting: str) -> Iterator[None]:
    """Make the folder and lock it. UserError if another run holds the lock; if this process is killed, the system
    releases it. A folder made here that stays empty is removed again."""
    is_new = not folder.exists()
    try:
        with lock_path(folder, folder / LOCK, setting):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def lock_path(path: Path, lock_file: Path, setting: str) -> Iterator[None]:
    """As lock_folder, for a folder or a file and a lock file of any name."""
    lock = FileLock(lock_file, blocking=False, thread_local=False)  # any thread may collect the garbage that holds it
    try:
        make_folder(lock_file.parent)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"--{setting} {path}: another run writes to it; wait for its end, or take another") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise UserError(f"--{setting} {path}: cannot be written: {error.strerror}") from error
        logger.warning("%s cannot be locked (%s): start no second run that writes to it", path, error.strerror)
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)  # before it is released: a waiting run notices, and opens a new one
        lock.release()
