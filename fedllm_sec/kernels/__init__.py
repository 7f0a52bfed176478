"""Numerics on an update matrix: each function is one stream over its column blocks.

Small results ((n, n) and (n,)) come back as float64 on the CPU, (d,) results as float32 on the compute device.
Rows that stand for products B A (`UpdateMatrix.products`) are compared by these and have no columns; `combine` adds up
their factors. Where a function takes `extra`, these are further rows, (d,) or (e, d), such as a reference vector: they
count as rows n, n+1, ... of the matrix without being copied into it. Screen NaN before you come here: sorting does not
order it. Infinite rows are safe wherever their weight is 0.

The work is done by one of three backends with the same functions: compiled with numba on the CPU, Triton on a GPU,
plain torch where these are missing. FEDLLM_SEC_KERNELS=torch chooses plain torch everywhere.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.errors import DefenseError
from fedllm_sec.kernels import networks, torch_backend
from fedllm_sec.kernels.mixed import mixed_pairs
from fedllm_sec.kernels.products import product_distances, product_gram
from fedllm_sec.kernels.sums import TILE, tiles
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.updates import exact_zeros

LARGEST_NETWORK = 2048  # rows; beyond, columns are sorted by torch.sort


@dataclass(frozen=True)
class Geometry:
    """All inner products and all squared distances of the rows, from one pass."""

    gram: Tensor  # (n, n) float64
    sq_distances: Tensor  # (n, n) float64, zeros on the diagonal

    @property
    def norms(self) -> Tensor:
        """Euclidean norm of each row: (n,) float64."""
        return self.gram.diagonal().clamp_min(0).sqrt()


def geometry(updates: UpdateMatrix, extra: Tensor | None = None) -> Geometry:
    """Inner products and squared distances of all rows in one pass, for rules that need both."""
    return Geometry(*_pairs(updates, extra, distances=True))


def gram(updates: UpdateMatrix, extra: Tensor | None = None) -> Tensor:
    """Inner products <x_i, x_j> of all rows: (n, n) float64, to about 1e-7 |x_i| |x_j|."""
    return _pairs(updates, extra, distances=False)[0]


def sq_distances(updates: UpdateMatrix, extra: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances of all pairs of rows: (n, n) float64, exact zeros on the diagonal.

    Within 1e-5 of direct float64 differences, also where rows share a large common part or one is 1e30.
    """
    return _pairs(updates, extra, distances=True)[1]


def row_norms(updates: UpdateMatrix) -> Tensor:
    """Euclidean norm of each row: (n,) float64."""
    if updates.picked is None or updates.products is not None:
        return geometry(updates).norms
    squares: Tensor = _backend(updates).square_sums(updates)
    return squares.sqrt()


def direct_gram(updates: UpdateMatrix, p: int, extra: Tensor | None = None) -> Tensor:
    """<x_i - x_p, x_j - x_p> with every product in float64, `extra` (d,) as a last row: slow, and right for all rows.

    For iterations that carry the last digits of `geometry` (1e-6 or so) into their result.
    """
    if updates.products is not None:
        gram = product_gram(updates, _extra_rows(updates, extra))
        return gram - gram[:, p, None] - gram[None, p] + gram[p, p]
    count = updates.n + (0 if extra is None else 1)
    total = torch.zeros(count, count, dtype=torch.float64)
    for place, block in updates.blocks():
        wide = block.double()
        if extra is not None:
            wide = torch.cat([wide, extra[None, place].to(wide)])
        wide = wide - wide[p]
        total += (wide @ wide.T).cpu()
    return total


def accumulate(sums: Tensor, places: Sequence[int], updates: UpdateMatrix) -> Tensor:
    """Add row i of the matrix to client places[i] of running sums (see `sums.py`), in place, for rules that remember.

    Returns the inner products of the sums that were added to, (n, n) float64, from the same pass.
    """
    fits = sums.ndim == 3 and (sums.shape[0], sums.shape[2]) == (tiles(updates.d), TILE)
    if not (fits and sums.dtype == torch.float32 and sums.is_contiguous()):
        raise DefenseError(
            f"accumulate: rows of {updates.d} do not fit sums of shape {tuple(sums.shape)}, {sums.dtype}. "
            "Make them with kernels.sums.new_sums."
        )
    clients = sums.shape[1]
    if len(places) != updates.n or len(set(places)) != updates.n or min(places) < 0 or max(places) >= clients:
        raise DefenseError(
            f"accumulate: places {list(places)} for {updates.n} rows and {clients} sums. Give each row one of its own."
        )
    backend = _backend(updates) if sums.device == updates.compute_device else torch_backend
    products: Tensor = backend.accumulate(sums, places, updates)
    return products


def combine(updates: UpdateMatrix, weights: Tensor, extra: Tensor | None = None) -> Tensor:
    """sum_i w_i x_i: (d,) float32, summed in float64. A row of weight 0 is not read, whatever it holds.

    With `extra` rows, `weights` has one entry more for each of them.
    """
    if updates.products is not None:
        updates = replace(updates, products=None)
    more = _extra_rows(updates, extra)
    w = weights.detach().to(device="cpu", dtype=torch.float64)
    count = updates.n + (0 if more is None else more.shape[0])
    if w.shape != (count,):
        raise DefenseError(f"combine: weights of shape {tuple(w.shape)} for {count} rows. Give one for each row.")
    if not bool(w.isfinite().all()):
        raise DefenseError("combine: weights hold NaN or infinity. Screen the rows they were made from.")
    w, v = w[: updates.n], w[updates.n :]
    stored = updates.unmixed()
    if updates.mixing is not None:
        w = exact_zeros(w[None], updates.mixing)[0]
    used = w.nonzero().flatten().tolist()
    if not used:
        out = torch.zeros(updates.d, device=updates.compute_device)
        return out if more is None else (v @ more.double().cpu()).float().to(out.device)
    if len(used) < len(w):
        stored, w = stored.select(used), w[used]
    combined: Tensor = _backend(stored).combine(stored, w, more, v)
    return combined


def map_columns(updates: UpdateMatrix, column_rule: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `column_rule`, (n, c) -> (c,), to each column block: (d,) float32."""
    out = torch.empty(updates.d, device=updates.compute_device)
    for place, block in updates.blocks():
        out[place] = column_rule(block)
    return out


def median(updates: UpdateMatrix) -> Tensor:
    """Coordinate-wise median, midpoint for even n: (d,)."""
    return _statistic(updates, networks.median(updates.n))


def trimmed_mean(updates: UpdateMatrix, f: int) -> Tensor:
    """Per coordinate, the mean without the f smallest and the f largest values: (d,).

    Only values that stay are added up, in float64: one of 1e30 leaves no trace.
    """
    n = updates.n
    if not 0 <= 2 * f < n:
        raise DefenseError(f"trimmed_mean: needs n > 2f rows, got n={n}, f={f}. Lower f or have more clients.")
    return _statistic(updates, networks.mean_of_ranks(n, f, n - f))


def mean_around_median(updates: UpdateMatrix, k: int) -> Tensor:
    """Per coordinate, the mean of the k values nearest the median: (d,). Of two equally near, the smaller."""
    if not 1 <= k <= updates.n:
        raise DefenseError(f"mean_around_median: k={k} of {updates.n} rows. Give k in 1..{updates.n}.")
    return _statistic(updates, networks.nearest_median(updates.n, k))


def kth_value(updates: UpdateMatrix, k: int) -> Tensor:
    """Per coordinate, the k-th smallest value, k from 0: (d,)."""
    if not 0 <= k < updates.n:
        raise DefenseError(f"kth_value: k={k} of {updates.n} rows. Give k in 0..{updates.n - 1}.")
    return _statistic(updates, networks.mean_of_ranks(updates.n, k, k + 1))


def sign_sums(updates: UpdateMatrix) -> Tensor:
    """Per coordinate, the number of positive minus the number of negative values: (d,)."""
    updates.need_columns()
    sums: Tensor = _backend(updates).sign_sums(updates)
    return sums


def _statistic(updates: UpdateMatrix, network: networks.Network) -> Tensor:
    updates.need_columns()
    if network.n > LARGEST_NETWORK:
        return map_columns(updates, lambda block: torch_backend.sorted_statistic(block, network))
    result: Tensor = _backend(updates).order_statistics(updates, network)
    return result


def _pairs(updates: UpdateMatrix, extra: Tensor | None, *, distances: bool) -> tuple[Tensor, Tensor]:
    more = _extra_rows(updates, extra)
    if updates.products is not None:
        products = product_gram(updates, more)
        return products, product_distances(products)
    backend = _backend(updates)
    if updates.picked is not None:
        pairs: tuple[Tensor, Tensor] = backend.pair_sums(updates, more, distances)
        return pairs
    assert updates.mixing is not None
    used = (updates.mixing != 0).any(0)
    count = 0 if more is None else more.shape[0]
    weights = _extended(updates.mixing[:, used], count)
    if bool(used.any()):
        stored = updates.unmixed().select(used.nonzero().flatten().tolist())
        new_gram, new_distances, good = mixed_pairs(weights, *backend.pair_sums(stored, more, True))
        if good:
            return new_gram, new_distances
    direct: tuple[Tensor, Tensor] = backend.pair_sums(updates, more, distances)  # from mixed blocks
    return direct


def _extended(mixing: Tensor, count: int) -> Tensor:
    """W with `count` rows more that stay as they are."""
    (k, n), wide = mixing.shape, torch.zeros(mixing.shape[0] + count, mixing.shape[1] + count).double()
    wide[:k, :n] = mixing
    wide[k:, n:] = torch.eye(count, dtype=torch.float64)
    return wide


def _extra_rows(updates: UpdateMatrix, extra: Tensor | None) -> Tensor | None:
    if extra is None:
        return None
    rows = extra.detach()[None] if extra.ndim == 1 else extra.detach()
    if rows.ndim != 2 or rows.shape[1] != updates.d:
        raise DefenseError(
            f"kernels: extra rows of shape {tuple(extra.shape)} next to rows of {updates.d}. Give (d,) or (e, d)."
        )
    return rows.to(device=updates.compute_device, dtype=torch.float32)


_IN_TORCH = ContextVar("in_torch", default=False)


@contextlib.contextmanager
def in_torch() -> Iterator[None]:
    """Plain torch for what is done inside: for a few small rows, before which nothing is worth compiling."""
    before = _IN_TORCH.set(True)
    try:
        yield
    finally:
        _IN_TORCH.reset(before)


def plain() -> bool:
    """Whether plain torch is to do everything."""
    return _IN_TORCH.get() or os.environ.get("FEDLLM_SEC_KERNELS") == "torch"


def _backend(updates: UpdateMatrix) -> Any:
    """The module that does the work for this matrix."""
    if plain():
        return torch_backend
    kind = updates.compute_device.type
    name, needs = {"cpu": ("cpu_backend", "numba"), "cuda": ("triton_backend", "triton")}.get(kind, ("", ""))
    return _module(name) if name and _installed(needs) else torch_backend


def for_rules(updates: UpdateMatrix) -> Any:
    """The compiled passes that single rules need (`cpu_rules`), or None where a rule is to do without them."""
    updates.need_columns()
    usable = updates.compute_device.type == "cpu" and updates.n <= LARGEST_NETWORK
    return _module("cpu_rules") if usable and not plain() and _installed("numba") else None


def load() -> None:
    """Load the library of the compiled code now, which takes about a second, once in a process, and not in a call."""
    if not plain() and _installed("numba"):
        _module("cpu_backend").ready()


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f"fedllm_sec.kernels.{name}")
