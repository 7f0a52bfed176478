"""The update matrix: the one format in which clients speak to the server.

Letters: n clients, d parameters, c block width. A row is one client's *delta* (trained minus received
parameters).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fedllm_sec.errors import DefenseError, reason
from fedllm_sec.matrix.factors import NoColumns, Products
from fedllm_sec.matrix.fetching import ahead, free_mb, gathered, uploaded
from fedllm_sec.matrix.layout import Layout
from fedllm_sec.matrix.rowfile import NAMES, RowFile, open_rows, save_rows
from fedllm_sec.matrix.storage import new_rows as new_rows


@dataclass(frozen=True)
class UpdateMatrix:
    """The (n, d) deltas of one round, who sent them, and how many examples each *claims* to have used.

    The rows lie in device memory, host memory, a file, or spread over the ranks of a process group;
    `blocks()` reads all of them alike. `rows` is never written to. `mixing` is a lazy (k, n) matrix W: the
    matrix then stands for W @ rows, (k, d), which is formed one column block at a time and never as a whole.
    """

    rows: Tensor  # (n, d) float32, bfloat16 or float16; this rank's rows only where `owners` is set
    ids: tuple[str, ...]
    counts: tuple[float, ...]
    layout: Layout
    mixing: Tensor | None = None  # (k, n) float64
    chunk_mb: float | None = None  # size of a column block in float32; None: from the free memory
    device: torch.device | None = None  # where blocks are computed; None: where the rows are
    file: RowFile | None = None  # where `rows` is a memory-mapped file
    owners: tuple[int, ...] | None = None  # the rank that holds each row, where they are spread
    group: dist.ProcessGroup | None = None
    products: Products | None = None  # what rows of factors stand for, where they are compared by it

    # ------------------------------------------------------------ making one

    @classmethod
    def of(
        cls,
        rows: Tensor | Sequence[Tensor],
        *,
        ids: Sequence[str] | None = None,
        counts: Sequence[float] | None = None,
        layout: Layout | None = None,
        chunk_mb: float | None = None,
        device: str | torch.device | None = None,
    ) -> UpdateMatrix:
        """Stack rows; what is not said becomes ids "0", "1", ..., equal counts, one unnamed layout block."""
        if not isinstance(rows, Tensor):
            rows = _stacked(rows)
        if rows.ndim != 2 or rows.shape[0] == 0:
            raise DefenseError(
                f"updates: need an (n, d) matrix with n >= 1, got shape {tuple(rows.shape)}. Give one row per client."
            )
        return cls._checked(rows, rows.shape[0], ids, counts, layout, chunk_mb, device)

    @classmethod
    def across_ranks(
        cls,
        rows: Tensor,
        *,
        owners: Sequence[int],
        ids: Sequence[str] | None = None,
        counts: Sequence[float] | None = None,
        layout: Layout | None = None,
        chunk_mb: float | None = None,
        device: str | torch.device | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> UpdateMatrix:
        """The matrix of all ranks' rows: row i is the next unused row of rank `owners[i]`.

        `rows` are this rank's own, (0, d) if it has none. Every rank makes the same calls in the same order;
        each column block is gathered to all ranks when its turn comes.
        """
        rank = dist.get_rank(group)
        if rows.ndim != 2 or rows.shape[0] != list(owners).count(rank):
            raise DefenseError(
                f"updates: owners gives rank {rank} {list(owners).count(rank)} rows, but it holds shape"
                f" {tuple(rows.shape)}. Pass the (n, d) rows of this rank."
            )
        made = cls._checked(rows, len(owners), ids, counts, layout, chunk_mb, device)
        return replace(made, owners=tuple(owners), group=group)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        layout: Layout | None = None,
        chunk_mb: float | None = None,
        device: str | torch.device | None = None,
    ) -> UpdateMatrix:
        """A matrix that stays on disk: a file of `save`, or any safetensors file with an (n, d) "rows"."""
        file, metadata = open_rows(Path(path))
        ids = json.loads(metadata["ids"]) if "ids" in metadata else None
        counts = json.loads(metadata["counts"]) if "counts" in metadata else None
        if layout is None and "layout" in metadata:
            names, shapes = json.loads(metadata["layout"])
            layout = Layout(tuple(names), tuple(tuple(shape) for shape in shapes))
        if file.n == 0:
            raise DefenseError(f"{path}: need an (n, d) matrix with n >= 1, got 0 rows. Save at least one client.")
        return replace(cls._checked(file.mapped(), file.n, ids, counts, layout, chunk_mb, device), file=file)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows (mixed, if they are), ids, counts and layout as a safetensors file; atomic."""
        metadata = {
            "ids": json.dumps(self.ids),
            "counts": json.dumps(self.counts),
            "layout": json.dumps([self.layout.names, self.layout.shapes]),
        }
        save_rows(Path(path), self.blocks(), self.n, self.d, self.rows.dtype, metadata)

    @classmethod
    def _checked(
        cls,
        rows: Tensor,
        n: int,
        ids: Sequence[str] | None,
        counts: Sequence[float] | None,
        layout: Layout | None,
        chunk_mb: float | None,
        device: str | torch.device | None,
    ) -> UpdateMatrix:
        d = int(rows.shape[1])
        if rows.dtype not in NAMES:
            raise DefenseError(f"updates: rows are {rows.dtype}, need float32, bfloat16 or float16. Use rows.float().")
        for what, given in (("ids", ids), ("counts", counts)):
            if given is not None and len(given) != n:
                raise DefenseError(f"updates: {len(given)} {what} for {n} rows. Give one for each row.")
        if layout is not None and layout.size != d:
            raise DefenseError(f"updates: the layout has {layout.size} parameters, a row has {d}. They must agree.")
        try:
            claimed = tuple(float(c) for c in counts) if counts is not None else (1.0,) * n
        except (TypeError, ValueError) as error:
            raise DefenseError(f"updates: counts: {reason(error)}. Give the rows' numbers of examples.") from None
        if chunk_mb is not None and not (isinstance(chunk_mb, (int, float)) and chunk_mb > 0):
            raise DefenseError(f"updates: chunk_mb={chunk_mb}: a block needs some memory. Give a number above 0.")
        return cls(
            rows=rows.detach(),
            ids=tuple(str(id) for id in (ids if ids is not None else range(n))),  # numbers too, as Flower and Ray have
            counts=claimed,
            layout=layout if layout is not None else Layout.single(d),
            chunk_mb=chunk_mb,
            device=torch.device(device) if device is not None else None,
        )

    # ------------------------------------------------------------ what it is

    @property
    def n(self) -> int:
        return len(self.ids)

    @property
    def d(self) -> int:
        return int(self.rows.shape[1])

    @property
    def sources(self) -> int:
        """How many stored rows there are, on all ranks: n, unless the matrix is mixed."""
        return len(self.owners) if self.owners is not None else int(self.rows.shape[0])

    @property
    def compute_device(self) -> torch.device:
        """Where blocks are computed."""
        return self.rows.device if self.device is None else self.device

    @cached_property
    def picked(self) -> tuple[int, ...] | None:
        """The stored rows this matrix consists of, in order, or None where it truly mixes them."""
        if self.mixing is None:
            return tuple(range(self.sources))
        ones = self.mixing == 1
        if bool((ones.sum(1) == 1).all()) and bool(((self.mixing != 0).sum(1) == 1).all()):
            return tuple(ones.int().argmax(1).tolist())
        return None

    # ------------------------------------------------------------ choosing and mixing rows

    def select(self, indices: Sequence[int]) -> UpdateMatrix:
        """The chosen rows, in that order; nothing is copied."""
        keep = [int(i) for i in indices]
        if not keep or min(keep) < 0 or max(keep) >= self.n:
            raise DefenseError(f"updates: cannot select rows {keep} of {self.n}. Give indices in 0..{self.n - 1}.")
        pick = torch.zeros(len(keep), self.n, dtype=torch.float64)
        pick[torch.arange(len(keep)), torch.tensor(keep, dtype=torch.long)] = 1.0
        return self.mix(pick, [self.ids[i] for i in keep])

    def mix(self, weights: Tensor, ids: Sequence[str] | None = None) -> UpdateMatrix:
        """Lazy W @ rows for W (k, n); ids default to the own ids where k == n, else "mix0", "mix1", ...

        Rows that keep all ids keep their counts; others carry the sum of the counts of the rows they are made of.
        """
        w = weights.detach().to(device="cpu", dtype=torch.float64)
        if w.ndim != 2 or w.shape[0] == 0 or w.shape[1] != self.n:
            raise DefenseError(
                f"updates: weights of shape {tuple(w.shape)} cannot mix {self.n} rows. Give (k, {self.n})."
            )
        if not bool(w.isfinite().all()):
            raise DefenseError("updates: mixing weights hold NaN or infinity. Screen the rows they were made from.")
        k = w.shape[0]
        names = tuple(ids) if ids is not None else (self.ids if k == self.n else tuple(f"mix{i}" for i in range(k)))
        if len(names) != k:
            raise DefenseError(f"updates: {len(names)} ids for {k} mixed rows. Give one for each row.")
        counts = self.counts
        if names != self.ids:
            claimed = torch.tensor(self.counts, dtype=torch.float64)
            counts = tuple(torch.where(w != 0, claimed, 0.0).sum(1).tolist())
        return replace(self, mixing=w if self.mixing is None else exact_zeros(w, self.mixing), ids=names, counts=counts)

    def unmixed(self) -> UpdateMatrix:
        """The stored rows, without mixing and selection."""
        if self.mixing is None:
            return self
        n = self.sources
        return replace(self, mixing=None, ids=tuple(str(i) for i in range(n)), counts=(1.0,) * n)

    # ------------------------------------------------------------ reading it

    def places(self, default_mb: float) -> list[slice]:
        """The column blocks, by `chunk_mb` or else by `default_mb` and the free memory.

        Their width is a multiple of 256 or 32,768 columns where there is room for that many. Sums over
        columns are the same for all blocks of 32,768 columns and more, bit for bit; else to float64 rounding.
        """
        megabytes = self.chunk_mb if self.chunk_mb is not None else min(default_mb, free_mb(self.compute_device) / 8)
        width = max(1, int(megabytes * 2**20 / (4 * max(1, self.sources, self.n))))
        width -= width % max(tile for tile in (1, 256, 32768) if tile <= width)
        return [slice(start, min(start + width, self.d)) for start in range(0, self.d, width)]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Column blocks (slice, (n, c) float32) on the compute device: all d columns once, in order.

        Do not write into a block: it may be a view of the rows. From a file, or from host memory to a GPU,
        the next block is fetched while you use this one.
        """
        for place, raw in self.raw_blocks():
            yield place, self.formed(raw)

    def raw_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Column blocks (slice, (sources, c)) of the stored rows in their dtype, on the compute device."""
        self.need_columns()
        target = self.compute_device
        # On the CPU a block that fits the cache is read back from there; elsewhere large ones hide latencies.
        default_mb = 256.0 if target.type == "cuda" else (32.0 if self.file is not None else 8.0)
        fetched = self._fetched(self.places(default_mb))
        return fetched if self.owners is None else gathered(fetched, self.owners, self.group)

    def _fetched(self, places: list[slice]) -> Iterator[tuple[slice, Tensor]]:
        if self.compute_device.type == "cuda" and self.rows.device.type == "cpu":
            return uploaded(ahead(self._read, places), self.compute_device)
        if self.file is not None:
            return ahead(self._read, places)
        return ((place, self.rows[:, place].to(self.compute_device)) for place in places)

    def _read(self, place: slice) -> Tensor:
        return self.rows[:, place] if self.file is None else self.file.read(place)

    def need_columns(self) -> None:
        """An error where a single number of a row means nothing, since the row stands for products."""
        if self.products is not None:
            raise NoColumns(
                "reads single coordinates, and in product space a row has none: its products B A are never formed, and "
                "the numbers of A and B are others in every gauge. Choose a rule of whole rows (krum, "
                "geometric_median, flame, ...), or defense.space: aligned or factors."
            )

    def formed(self, raw: Tensor) -> Tensor:
        """The (n, c) float32 block that stored rows (sources, c) stand for."""
        if self.mixing is None:
            return raw.float()
        if self.picked is not None:
            return raw[list(self.picked)].float()
        used = (self.mixing != 0).any(0)
        w, block = self.mixing[:, used], raw[used.to(raw.device)].float()
        sizes = w[w != 0].abs()
        if sizes.numel() and (float(sizes.min()) < 1e-30 or float(sizes.max()) > 1e30):
            block = block.double()  # such weights have no float32
        mixed = (w.to(block) @ block).float()
        if bool(mixed.sum().isfinite()):
            return mixed
        # A stored row holds an infinity, or a sum overflowed: where its weight is 0 it must not count.
        rows = [w[i, w[i] != 0].to(block) @ block[(w[i] != 0).to(block.device)] for i in range(w.shape[0])]
        return torch.stack(rows).float()


def exact_zeros(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, with 0 where the terms cancel up to rounding: a row mixed away must not come back."""
    product = left @ right
    return torch.where(product.abs() <= 1e-14 * (left.abs() @ right.abs()), torch.zeros_like(product), product)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    sizes = [tuple(row.shape) for row in rows]
    if not sizes:
        raise DefenseError("updates: an empty list of rows. Give at least one client's update.")
    if len(set(sizes)) > 1:
        odd = next(i for i, size in enumerate(sizes) if size != sizes[0])
        raise DefenseError(f"updates: row {odd} has shape {sizes[odd]}, row 0 {sizes[0]}. All rows need one length.")
    if len({row.dtype for row in rows}) > 1:
        raise DefenseError(f"updates: rows of different types {sorted({str(row.dtype) for row in rows})}. Use one.")
    return torch.stack(list(rows))
