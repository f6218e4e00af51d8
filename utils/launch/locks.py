"""Locks on the folders that a run writes to."""

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from utils.config import UserError
from utils.files import make_folder
from utils.launch.output_dir import check_output_dir

logger = logging.getLogger(__name__)
LOCK = ".lock"


def lock_output_dir(accelerator: Accelerator, config: Any) -> contextlib.ExitStack:
    """Lock the folders that a run writes to, until what comes back is closed, and check them again: since they were
    checked first, another run may have ended there. UserError on every process."""
    locks, error = contextlib.ExitStack(), None
    if accelerator.is_main_process:
        try:
            for setting in ("output_dir", "merge_into"):
                if folder := getattr(config, setting, None):
                    locks.enter_context(lock_folder(Path(folder), setting))
            check_output_dir(config)
        except UserError as user_error:
            locks.close()
            error = str(user_error)
    (error,) = broadcast_object_list([error])
    if error:
        raise UserError(error)
    return locks


@contextlib.contextmanager
def lock_folder(folder: Path, setting: str) -> Iterator[None]:
    """Make the folder and lock it. UserError if another run holds the lock; if this process is killed, the system
    releases it. A folder made here that stays empty is removed again."""
    is_new = not folder.exists()
    lock = FileLock(
        folder / LOCK, blocking=False, thread_local=False
    )  # any thread may collect the garbage that holds it
    try:
        make_folder(folder)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"--{setting} {folder}: another run writes to it; wait for its end, or take another"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise UserError(f"--{setting} {folder}: cannot be written: {error.strerror}") from error
        logger.warning("%s cannot be locked (%s): start no second run that writes to it", folder, error.strerror)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before it is released: a waiting run notices, and opens a new one
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
