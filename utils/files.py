"""Atomic, durable writes; hashes of values, files and weights; errors of full disks.

A power loss may take what has been written and not flushed: a file's content, and a folder's list of names."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM)


def write_file(path: Path, content: bytes):
    """Write the whole file or leave what was there."""
    write_parts(path, [content])


def write_parts(path: Path, parts: Iterable[bytes]):
    """The same for content that comes in parts."""
    unfinished = path.with_name(path.name + ".part")
    try:
        if unfinished.is_symlink():
            unfinished.unlink()  # what it leads to is not ours
        with unfinished.open("wb") as file:
            for part in parts:
                file.write(part)
        flush_to_disk(unfinished)
        unfinished.replace(path)
        flush_to_disk(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, value: Any):
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_jsonl(path: Path, rows: list[dict]):
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def append_line(path: Path, line: str):
    """Append the whole line, or nothing and raise OSError."""
    is_new = not path.exists()
    size = 0 if is_new else path.stat().st_size
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            flush_to_disk(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


@contextlib.contextmanager
def raise_disk_errors(path: Path) -> Iterator[None]:
    """Around what safetensors and tokenizers write, which raise no OSError where a disk is full."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # tokenizers' errors have no class of their own
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def make_folder(folder: Path):
    """Make it, and those above it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush_to_disk(folder.parent)


def move_files(source: Path, target: Path, last: Container[str]):
    """Move all files of one folder, which is removed, into another; those of these names last, when the others are on
    the disk."""
    paths = sorted(source.iterdir(), key=lambda path: path.name in last)
    for path in paths:
        flush_to_disk(path)
    for number, path in enumerate(paths):
        if number and path.name in last:
            flush_to_disk(target)
        path.replace(target / path.name)
    flush_to_disk(target)
    source.rmdir()


def flush_to_disk(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise  # else it is one of the file systems that flush no folders
    finally:
        os.close(descriptor)


def hash_weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The SHA-256 of every bit of these tensors, their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        tensor = tensor.detach().as_subclass(torch.Tensor)  # bitsandbytes' tensors move in a way of their own
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_value(value: Any) -> str:
    """The SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
