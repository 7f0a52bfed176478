"""Tensors that runs of a grid have made and others take: a folder of bounded size, and names by content."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedllm_sec.records.environment import versions

LARGEST = 4 << 30  # bytes that a store holds at most
OF_FREE = 0.2  # nor more than this share of what is free on its disk
SPARED = 8  # a full store is emptied to all but an eighth, which up to eight processes fill between their looks at it
HASH = 64  # characters before an entry's bytes


# ---------------------------------------------------------------- names


class Unlike(TypeError):
    """A value of which it cannot be said whether another is equal to it."""


def digest(value: Any) -> str:
    """The same for equal values only: tensors, arrays, numbers, texts, and tuples, lists, mappings, records of them."""
    hasher = hashlib.sha256()
    _add(hasher.update, value)
    return hasher.hexdigest()


def _add(update: Callable[[Any], None], value: Any) -> None:
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous()
        update(f"tensor {held.dtype} {tuple(held.shape)}:".encode())
        update(held.view(-1).view(torch.uint8).numpy() if held.numel() else b"")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        update(f"array {value.dtype} {value.shape}:".encode() + value.tobytes())
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)}:".encode())
        for key, at in value.items():
            _add(update, key)
            _add(update, at)
    elif isinstance(value, (list, tuple, range)):
        update(f"list {len(value)}:".encode())
        if all(type(held) is int for held in value):
            update(repr(list(value)).encode())
        else:
            for each in value:
                _add(update, each)
    elif is_dataclass(value) and not isinstance(value, type):
        update(f"{type(value).__qualname__}:".encode())
        for part in fields(value):
            _add(update, getattr(value, part.name))
    else:
        raise Unlike(type(value).__qualname__)


class Digests:
    """Digests of rows that come again and again: that of a record, which nobody writes to, is taken once."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Any], str]] = {}  # id -> the record while it lives, its digest

    def of(self, value: Any) -> str:
        """Of a record, or of anything else."""
        if not is_dataclass(value):
            return digest(value)
        record, known = self.known.get(id(value), (None, ""))
        if record is None or record() is not value:
            self.known = {id: there for id, there in self.known.items() if there[0]() is not None}
            known = digest(value)
            self.known[id(value)] = weakref.ref(value), known
        return known


@functools.cache
def code() -> str:
    """The digest of this package's source and of the versions of what it computes with."""
    root = Path(__file__).parents[1]
    source = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.py"))}
    return digest([source, versions(), torch.__version__])


def place(device: torch.device) -> list[Any]:
    """What computes here: numbers of another processor, or of more threads, may differ in their last digit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return [device.type, name, torch.get_num_threads()]


# ---------------------------------------------------------------- the folder


@dataclass
class Store:
    """Tensors in a folder, one file an entry; when it is full what was used longest ago goes.

    Several processes may use one folder. A file that is damaged, or that cannot be read or written, is as good as none:
    what it held is made again.
    """

    folder: Path
    limit: int
    counts: Counter[str] = field(default_factory=Counter)  # what its users in this process have made and taken
    _left: int = 0  # bytes that may be written before the folder is looked through again

    @classmethod
    def at(cls, folder: Path) -> Store:
        """An empty or a begun store, at most 4 GiB and a fifth of what is free."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, min(LARGEST, int(OF_FREE * shutil.disk_usage(folder).free)))

    def get(self, key: str, shapes: Mapping[str, tuple[int, ...] | None]) -> dict[str, Tensor] | None:
        """The tensors of a key, whole; None where there are none, or others than of these names and shapes."""
        path = self.folder / key
        try:
            data, now = path.read_bytes(), time.time_ns()  # the system's own stamps may be the same for milliseconds
            os.utime(path, ns=(now, now))
        except OSError:
            return None
        told, held = data[:HASH], data[HASH:]
        if hashlib.sha256(held).hexdigest().encode() != told:
            return None
        try:
            parts = load(held)
        except SafetensorError:
            return None
        wanted = {name: shape for name, shape in shapes.items() if shape is not None}
        return parts if {name: tuple(part.shape) for name, part in parts.items()} == wanted else None

    def put(self, key: str, parts: Mapping[str, Tensor]) -> None:
        """Keep tensors; others make room."""
        held = save({name: part.detach().cpu().contiguous() for name, part in parts.items()})
        with contextlib.suppress(OSError):
            if self._room(HASH + len(held)):
                self._write(key, hashlib.sha256(held).hexdigest().encode() + held)

    def _write(self, key: str, data: bytes) -> None:
        """All of a file or nothing. A machine that loses its power may leave less, which its hash will tell."""
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{key}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, self.folder / key)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _room(self, needed: int) -> bool:
        """Whether so many bytes have room, after the oldest have gone."""
        full = self.limit - self.limit // SPARED
        if needed > full:
            return False
        if needed <= self._left:
            self._left -= needed
            return True
        there = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):
                stat = entry.stat()
                there.append((stat.st_mtime_ns, stat.st_size, entry.path))
        used = sum(size for _, size, _ in there)
        for _, size, path in sorted(there):
            if used + needed <= full:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            used -= size
        self._left = self.limit // SPARED**2
        return used + needed <= full
