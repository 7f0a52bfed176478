"""How the files of a run are written: whole or not at all, and by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# `write_atomic`, and what writes an adapter, put these beside their goal; a killed process leaves them.
LEFTOVER = re.compile(r"\.[\w-]+(\.\w+)?\.[a-z0-9_]{8}")


def plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def in_a_line(found: object) -> str:
    """What a strange file holds, or an error that repeats it, as a short line that does not command a terminal."""
    return "".join(mark if mark.isprintable() else "?" for mark in " ".join(str(found).split()))[:200]


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of these parts so that a reader, or a kill, sees either the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        try:
            os.fchmod(handle, 0o644)  # mkstemp makes it private
            for part in parts:
                _write(handle, part)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError) and path.is_dir():  # the error names the file beside it
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from error
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, keys in the order given."""
    write_atomic(path, as_json(value))


def as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode()


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file, and come back when it is on the disk."""
    with _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as handle:
        _write(handle, data)
        os.fsync(handle)


def cut(path: Path, size: int) -> None:
    """Leave the first `size` bytes of a file; one that is not there is made."""
    with _opened(path, os.O_WRONLY | os.O_CREAT) as handle:
        os.ftruncate(handle, size)


def _write(handle: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]  # a full disk may take a part, and refuse the rest


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A file itself, never what a link of its name leads to."""
    handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        yield handle
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_leftovers(folder: Path, seconds: float = 0.0) -> None:
    """Remove what killed processes left in this folder and the folders in it, if it is so old at least."""
    for path in [*folder.glob(".*"), *folder.glob("*/.*")]:
        with contextlib.suppress(FileNotFoundError):  # another process writes here too, and has just finished
            if LEFTOVER.fullmatch(path.name) and time.time() - path.lstat().st_mtime >= seconds:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# ---------------------------------------------------------------- one process at a time


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether this process has the lock of this file to itself, until the end of the block.

    The system takes the lock back when the process ends, however it ends: a killed process leaves nothing to clean up.
    """
    import fcntl  # not on Windows, where reports are read all the same

    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(path, os.O_RDWR | os.O_CREAT) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(handle).st_ino == path.stat().st_ino  # else the last holder has just removed it
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            yield False
            return
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def holder(path: Path) -> int | None:
    """The process that has the lock of this file, or had it when it was killed."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
