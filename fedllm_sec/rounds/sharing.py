"""Rows that were trained before: a client that trains the same twice gives the same row, whatever runs around it.

The runs of a grid train many clients alike: honest ones from the same vector under every attack, all of them while an
attack has not begun. A row is known by all that it depends on, so one that is taken from the store is, byte for byte,
the one that would have been trained.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedllm_sec.protocols import Client, LocalResult, LocalRule
from fedllm_sec.records.files import write_atomic
from fedllm_sec.rounds.source import Asked, Came, Source, trained_here

if TYPE_CHECKING:
    from fedllm_sec.rounds.federation import Federation

LARGEST = 4 << 30  # bytes that a store holds at most
OF_FREE = 0.2  # nor more than this share of what is free on its disk
HASH = 64  # characters before a row's bytes


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


@dataclass
class RowStore:
    """Rows in a folder, one file each; when it is full the one that was used longest ago goes.

    Several processes may use one folder. A file that is damaged, or that cannot be read or written, is as good as none:
    the row is trained.
    """

    folder: Path
    limit: int
    trained: int = 0  # rows that this process has trained and kept
    taken: int = 0  # rows that it has found

    @classmethod
    def at(cls, folder: Path) -> RowStore:
        """An empty or a begun store, at most 4 GiB and a fifth of what is free."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, min(LARGEST, int(OF_FREE * shutil.disk_usage(folder).free)))

    def get(self, key: str, id: str, device: torch.device) -> LocalResult | None:
        """The row of a key, whole; None where there is none."""
        path = self.folder / key
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        told, held = data[:HASH], data[HASH:]
        if hashlib.sha256(held).hexdigest().encode() != told:
            return None
        parts = load(held)
        count, steps, loss = parts["numbers"].tolist()
        self.taken += 1
        return LocalResult(id, parts["delta"].to(device), count, int(steps), loss, parts.get("buffers"))

    def put(self, key: str, result: LocalResult) -> None:
        """Keep a row; others make room."""
        self.trained += 1
        numbers = torch.tensor([result.count, result.steps, result.loss], dtype=torch.float64)
        parts = {"delta": result.delta.detach().cpu().contiguous(), "numbers": numbers}
        if result.buffers is not None:
            parts["buffers"] = result.buffers.cpu().contiguous()
        held = save(parts)
        with contextlib.suppress(OSError):
            if self._room(HASH + len(held)):
                write_atomic(self.folder / key, hashlib.sha256(held).hexdigest().encode(), held)

    def _room(self, needed: int) -> bool:
        """Whether so many bytes have room, after the oldest have gone."""
        there = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):
                stat = entry.stat()
                there.append((stat.st_mtime_ns, stat.st_size, entry.path))
        used = sum(size for _, size, _ in there)
        for _, size, path in sorted(there):
            if used + needed <= self.limit:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            used -= size
        return used + needed <= self.limit


def shared(store: RowStore, settings: str) -> Source:
    """Clients that train in this process, or have trained the same before; `settings` are those of their training.

    Never taken are rows beside which something else happens: where a client runs a defense of its own, an attacker
    changes its steps, or an observer looks on.
    """
    shards: dict[str, tuple[Any, str]] = {}  # client id -> its shard and the digest of it

    def source(federation: Federation, cohort: Sequence[Client], asked: Asked) -> Came:
        if federation.machine.world > 1:
            return trained_here(federation, cohort, asked)
        base = digest([settings, torch.get_num_threads(), federation.machine.device.type, _round(federation, asked)])

        def train(client: Client, guards: Sequence[LocalRule]) -> LocalResult:
            key = _key(federation, client, guards, asked.round, base, shards)
            if key is None:
                return asked.train(client, guards)
            found = store.get(key, client.id, asked.start.device)
            if found is None:
                found = asked.train(client, guards)
                store.put(key, found)
            return found

        return trained_here(federation, cohort, replace(asked, train=train))

    return source


def _round(federation: Federation, asked: Asked) -> list[Any]:
    """What all clients of a round are sent, and by what they train."""
    training, shifted = federation.training, federation.shifted
    rounds = asked.rounds if training.lr_schedule != "constant" else None
    sent = [asked.start, asked.control, federation.buffers, shifted.state_dict() if shifted is not None else None]
    ruled = bool(federation.algorithm.local) or federation.averaging is not None
    seen = asked.last_update if ruled else None  # only a rule sees the last step
    return [federation.seed, federation.before, asked.round, rounds, training, sent, seen]


def _key(
    federation: Federation, client: Client, guards: Sequence[LocalRule], round: int, base: str,
    shards: dict[str, tuple[Any, str]],
) -> str | None:  # fmt: skip
    """The name of a client's row; None where it is the row of more than can be said here."""
    threat = federation.threat
    attacks = threat is not None and client.id in threat.attackers(round)
    rules = threat.rules(client, round) if attacks and threat is not None else guards
    if rules or federation.observer.rules(client.id, round):
        return None
    held, known = shards.get(client.id, (None, ""))
    try:
        if held is not client.shard:
            known = digest(client.shard)
            shards[client.id] = client.shard, known
        return digest([base, client.id, known, client.memory])
    except Unlike:
        return None
