"""Where the rows of a round are kept: on the training device, in host memory, or in a file that has no name.

Such a file is mapped into memory, so that whatever reads a tensor reads it; what has been read is given back to the
system every few milliseconds, so that the process never holds more of it than a few blocks. It loses its name as soon
as it is made: a process that dies leaves nothing behind, nobody can remove or cut it, and its space is free again with
its last tensor. All of its space is asked for when it is made: a full disk is an error then, not a crash while it is
written.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedllm_sec.errors import FedError

Place = Literal["device", "host", "disk"]
EVERY_S = 0.005  # seconds between two looks at what is resident
MOST_BYTES = 2**28  # of mapped pages that may stay resident
ROOM = 2**26  # bytes that a disk must have left beside the rows


@dataclass(frozen=True)
class Storage:
    """Where, as what, and (on disk) in which folder the rows of a round are kept."""

    place: Place = "device"
    dtype: torch.dtype = torch.float32
    folder: Path | None = None

    def rows(self, n: int, d: int, device: torch.device) -> Tensor:
        """An unwritten (n, d) tensor for the rows of a round."""
        if self.place == "disk":
            return _unnamed((n, d), self.dtype, self._folder)
        return new_rows(n, d, device=device if self.place == "device" else "cpu", dtype=self.dtype)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, `new_rows` of two rows and more lie on disk too, if the rows do, and little stays resident."""
        if self.place != "disk":
            yield
            return
        before, over = _IN_FOLDER.set(self._folder), threading.Event()
        keeper = threading.Thread(target=_give_back, args=(over, _resident_of_files()), daemon=True)
        keeper.start()
        try:
            yield
        finally:
            _IN_FOLDER.reset(before)
            over.set()
            keeper.join()

    @property
    def _folder(self) -> Path:
        if self.folder is None:
            raise FedError("rows on disk need a folder. Give Storage one.")
        return self.folder


ON_DEVICE = Storage()

_IN_FOLDER: ContextVar[Path | None] = ContextVar("in_folder", default=None)
_MAPPED: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def new_rows(*shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """An unwritten tensor. On the CPU numpy makes it, which asks for large pages: quicker to write first.

    Where rows are kept on disk (`Storage.in_use`) so are two rows and more.
    """
    host = torch.device(device).type == "cpu"
    folder = _IN_FOLDER.get()
    if host and folder is not None and len(shape) > 1 and shape[0] > 1:
        return _unnamed(shape, dtype, folder)
    if host and dtype == torch.float32:
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, device=device, dtype=dtype)


def remembered(d: int) -> Tensor:
    """An unwritten float32 row (d,) in host memory that a rule keeps from round to round, on disk where rows are."""
    folder = _IN_FOLDER.get()
    return new_rows(d) if folder is None else _unnamed((1, d), torch.float32, folder)[0]


def taken(rows: Tensor, places: list[int]) -> Tensor:
    """A copy of some rows (n, d), kept where such rows are kept: one row at a time is in memory besides."""
    out = new_rows(len(places), rows.shape[1], device=rows.device, dtype=rows.dtype)
    for i, place in enumerate(places):
        out[i] = rows[place]
    return out


def available(device: torch.device) -> int:
    """Bytes that can still be taken there: of a GPU, or of host memory within the limit of a container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(0, limit - used))
    return free


def fitting(needed: int, device: torch.device) -> Place:
    """Where so many bytes of rows go by default: the first place of which they take no more than half."""
    if needed <= available(device) / 2:
        return "device"
    return "host" if device.type != "cpu" and needed <= available(torch.device("cpu")) / 2 else "disk"


def _unnamed(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """A tensor in a file of its own."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            status = os.fstatvfs(file.fileno())
            if status.f_bavail * status.f_frsize < size + ROOM:
                raise OSError(f"{status.f_bavail * status.f_frsize / 1e6:,.1f} MB are free")
            os.posix_fallocate(file.fileno(), 0, size)
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise FedError(
            f"compute.rows: disk: {folder}: {size / 1e6:,.1f} MB for {shape[0]} rows cannot be had there "
            f"({error.strerror or error}). Every round before this one is kept: free some space and start the run "
            "again, set output.folder on another disk, or compute.rows_dtype: bfloat16."
        ) from error
    _MAPPED.add(memory)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _give_back(over: threading.Event, before: int) -> None:
    """Until it is over: where more mapped pages are resident than may be, the system is to take them back.

    They are those of a file, so that none is lost: whoever needs one again reads it again.
    """
    while not over.wait(EVERY_S):
        if _resident_of_files() - before > MOST_BYTES:
            _drop()


def _drop() -> None:
    """No page of any file stays resident. In a function of its own: nothing here may keep a file beyond its tensor."""
    for memory in list(_MAPPED):
        memory.madvise(mmap.MADV_DONTNEED)


def _resident_of_files() -> int:
    """Bytes of mapped files that this process holds in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return 0
