"""Which client holds which rows: each rule gives a list of index arrays, one a client, each row used once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from fedllm_sec.errors import DataError
from fedllm_sec.recipe.resolve import Entry

Shards = list[np.ndarray]
Partition = Callable[[np.ndarray, int, np.random.Generator], Shards]  # labels (rows,), clients, rng


def iid(labels: np.ndarray, clients: int, rng: np.random.Generator) -> Shards:
    """Rows dealt out at random in equal numbers."""
    return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients)]


def dirichlet(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: PositiveFloat = 0.5,
    min_rows: NonNegativeInt = 1,
) -> Shards:
    """Each class is split over the clients by shares drawn from Dirichlet(alpha): small alpha, few classes a client.

    Hsu et al. 2019, sec. 3, in the per-class form of Yurochkin et al. 2019. Draws are repeated (up to 100 times)
    until each client has `min_rows` rows.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise DataError(
            f"partition dirichlet: splits by class, but the training set has {len(classes)} class. "
            "Name data.columns.label, or use {name: quantity} or {name: iid}."
        )
    sizes = np.zeros(clients, dtype=int)
    for _ in range(100):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for c in classes:
            rows = rng.permutation(np.flatnonzero(labels == c))
            cuts = np.round(np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.append(piece)
        shards = [np.sort(np.concatenate(part)) for part in parts]
        sizes = np.array([len(s) for s in shards])
        if sizes.min() >= min_rows:
            return shards
    raise DataError(
        f"partition dirichlet: alpha={alpha} left a client with {sizes.min()} rows in 100 draws "
        f"(min_rows={min_rows}, {len(labels)} rows, {clients} clients). Raise alpha or lower clients.total."
    )


def quantity(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: PositiveFloat = 0.5,
    min_rows: NonNegativeInt = 1,
) -> Shards:
    """Shard sizes drawn from Dirichlet(alpha), rows at random: unequal amounts (Li et al. 2022, sec. 4)."""
    spare = len(labels) - clients * min_rows
    if spare < 0:
        raise DataError(
            f"partition quantity: {len(labels)} rows cannot give {clients} clients min_rows={min_rows} each. "
            "Lower one of them."
        )
    cuts = np.round(np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * spare).astype(int)
    cuts = cuts + min_rows * np.arange(1, clients)
    return [np.sort(part) for part in np.split(rng.permutation(len(labels)), cuts)]


def shards(labels: np.ndarray, clients: int, rng: np.random.Generator, *, per_client: PositiveInt = 2) -> Shards:
    """Rows sorted by class and cut into pieces; each client gets `per_client` of them (McMahan et al. 2017)."""
    pieces = np.array_split(np.argsort(labels, kind="stable"), clients * per_client)
    order = rng.permutation(len(pieces)).reshape(clients, per_client)
    return [np.sort(np.concatenate([pieces[i] for i in own])) for own in order]


def by_block(labels: np.ndarray, clients: int, rng: np.random.Generator) -> Shards:
    """Rows in their order cut into equal runs, one a client in random order: for text, one passage each."""
    runs = np.array_split(np.arange(len(labels)), clients)
    return [runs[i] for i in rng.permutation(clients)]


def by_speaker(labels: np.ndarray, clients: int, rng: np.random.Generator) -> Shards:
    """Each class of rows (speaker, writer) belongs to one client, dealt out at random (Caldas et al. 2018, LEAF).

    With as many speakers as clients each has one; else every client gets one, and the rest go by lot.
    """
    speakers = np.unique(labels)
    if len(speakers) < clients:
        raise DataError(
            f"partition by_speaker: {len(speakers)} speakers for {clients} clients. "
            "Lower clients.total or use by_block."
        )
    order = rng.permutation(speakers)
    owner = np.concatenate([np.arange(clients), rng.integers(clients, size=len(speakers) - clients)])
    return [np.flatnonzero(np.isin(labels, order[owner == k])) for k in range(clients)]


MENU: dict[str, Entry] = {
    "iid": Entry(iid, "-"),
    "dirichlet": Entry(dirichlet, "Hsu et al. 2019"),
    "quantity": Entry(quantity, "Li et al. 2022"),
    "shards": Entry(shards, "McMahan et al. 2017"),
    "by_block": Entry(by_block, "-"),
    "by_speaker": Entry(by_speaker, "Caldas et al. 2018"),
}


def split_rows(partition: Partition, labels: np.ndarray, clients: int, rng: np.random.Generator) -> Shards:
    """Apply a partition and refuse what would leave a client without data."""
    if len(labels) < clients:
        raise DataError(f"data: {len(labels)} training rows for {clients} clients. Lower clients.total or add rows.")
    given: Any = partition(labels.copy(), clients, rng)  # one that writes into them must not change the data
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise DataError(
            f"partition: gave back {type(given).__name__}, must give a list with an array of row numbers for each "
            "client. Mend it."
        )
    parts = [np.asarray(part) for part in given]
    if len(parts) != clients:
        raise DataError(f"partition: gave {len(parts)} parts for {clients} clients. Give one for each.")
    for i, part in enumerate(parts):
        if part.ndim != 1:
            raise DataError(f"partition: client {i} got an array of shape {part.shape}, must be (rows,). Flatten it.")
        if len(part) and (part.dtype.kind not in "iu" or part.min() < 0 or part.max() >= len(labels)):
            raise DataError(f"partition: client {i} got what is no row's number from 0 to {len(labels) - 1}.")
    empty = [i for i, part in enumerate(parts) if len(part) == 0]
    if empty:
        raise DataError(f"partition: clients {empty} got no rows. Use another partition or lower clients.total.")
    return parts
