"""Rows of adapter factors compared by their products, through r x r matrices: no (out, in) matrix is ever formed.

A row's change in one layer is D_i = B_i A_i - B_0 A_0 = b_i A_i + B_0 a_i, with a_i and b_i its deltas, so that

    <D_i, D_j> = <b_i^T b_j, A_i A_j^T> + <X_i, a_j> + <a_i, X_j>,   X_i = B_0^T b_i A_i + B_0^T B_0 a_i / 2.

The first term is of order n^2 r^2 (in + out), the others n^2 r in. All of it is float64: in another gauge the factors
may be large where the products are small, and what cancels then must not be what decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.factors import Pair, Products

PARTS = 8  # of the clients: inner products of later with earlier ones alone are formed, a little over half of all
EQUAL = 1e-12  # squared distance by squared lengths, below which rows are one: float32 rows do not tell it from 0


def product_gram(updates: UpdateMatrix, extra: Tensor | None = None) -> Tensor:
    """<D_i, D_j> of all rows and `extra` ones, over all layers and what stands beside them: (n, n) float64."""
    rows, weights = _stored(updates)
    if extra is not None:
        rows, e = torch.cat([rows, extra.to(rows)]), len(extra)
        weights = torch.nn.functional.pad(weights, (0, e, 0, e))
        weights[-e:, -e:] = torch.eye(e, dtype=torch.float64)
    assert updates.products is not None
    total = weights @ stored_gram(rows, updates.products).cpu() @ weights.T
    return (total + total.T) / 2


def stored_gram(rows: Tensor, products: Products) -> Tensor:
    """The same of plain rows (n, d)."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    start = products.start[None].to(rows.device)
    for pair in products.pairs:
        a0, b0, a, b = pair.wide(start), pair.tall(start), pair.wide(rows), pair.tall(rows)
        whole = a0 + a
        part = inner(b.mT, whole)
        if bool(b0.any()):
            x = (b0.mT @ b) @ whole + (b0.mT @ b0 / 2) @ a
            cross = x.flatten(1) @ a.flatten(1).T
            part += cross + cross.T
        total += pair.scale**2 * part
    for place in products.plain:
        block = rows[:, place].double()
        total += block @ block.T
    return total


def inner(tall: Tensor, wide: Tensor) -> Tensor:
    """<T_i^T W_i, T_j^T W_j> of (n, k, out) and (n, k, in), through k x k matrices: (n, n)."""
    n, k = tall.shape[:2]
    t, w = tall.reshape(n * k, -1), wide.reshape(n * k, -1)
    gram = torch.zeros(n, n, dtype=t.dtype, device=t.device)
    step = -(-n // PARTS)
    for start in range(0, n, step):
        stop = min(start + step, n)
        left, right = slice(start * k, stop * k), slice(0, stop * k)
        both = (t[left] @ t[right].T).mul_(w[left] @ w[right].T)
        gram[start:stop, :stop] = both.view(stop - start, k, stop, k).sum((1, 3))
    return gram.tril() + gram.tril(-1).T


def product_distances(gram: Tensor) -> Tensor:
    """Squared distances from inner products: (n, n), 0 where rows are one but for the rounding of the wire."""
    squares = gram.diagonal()
    both = squares[:, None] + squares[None]
    apart = both - 2 * gram
    return torch.where(apart <= EQUAL * both, 0.0, apart).fill_diagonal_(0.0)


def _stored(updates: UpdateMatrix) -> tuple[Tensor, Tensor]:
    """The stored rows (s, d) that count, on the compute device, and W (n, s) of what is asked for."""
    if updates.owners is not None:
        raise DefenseError("space: rows that lie on several ranks have no products yet. Gather them first.")
    if updates.mixing is None:
        return updates.rows.to(updates.compute_device), torch.eye(updates.n, dtype=torch.float64)
    used = (updates.mixing != 0).any(0)
    return updates.rows[used.to(updates.rows.device)].to(updates.compute_device), updates.mixing[:, used]


class ProductSums:
    """What each client changed, added up over the rounds by id: a product of rank 2 r for each layer, in float64.

    Of a longer sum the largest 2 r singular values are kept, so that memory does not grow with the rounds.
    """

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {}  # client id -> "u.0" (2 r, out), "v.0" (2 r, in), ..., "plain"

    def add(self, updates: UpdateMatrix) -> Tensor:
        """Add this round's rows; inner products of the sums of this round's clients, (n, n) float64, in their order."""
        products = updates.products
        assert products is not None
        rows, weights = _stored(updates)
        start, total = products.start[None].to(rows.device), torch.zeros(updates.n, updates.n, dtype=torch.float64)
        own = [self.sums.setdefault(id, {}) for id in updates.ids]
        for number, pair in enumerate(products.pairs):
            self._add(own, number, pair, rows, start, weights)
            tall, wide = (torch.stack([known[f"{side}.{number}"] for known in own]) for side in "uv")
            total += pair.scale**2 * inner(tall, wide).cpu()
        plain = torch.cat([rows[:, place].double() for place in products.plain] or [rows[:, :0].double()], 1)
        for known, row in zip(own, weights.to(plain) @ plain, strict=True):
            known["plain"] = known["plain"].to(row) + row if "plain" in known else row
        beside = torch.stack([known["plain"] for known in own])
        return total + (beside @ beside.T).cpu()

    @staticmethod
    def _add(
        own: list[dict[str, Tensor]], number: int, pair: Pair, rows: Tensor, start: Tensor, weights: Tensor
    ) -> None:
        """Add one layer of this round to the sums of the round's clients."""
        b0, a, b = pair.tall(start)[0].mT, pair.wide(rows), pair.tall(rows).mT
        whole, (u, v) = pair.wide(start) + a, (f"u.{number}", f"v.{number}")
        for known, shares in zip(own, weights, strict=True):
            used = shares.nonzero().flatten().tolist()
            tall = [part for i in used for part in (shares[i] * b[i], shares[i] * b0)]
            wide = [part for i in used for part in (whole[i], a[i])]
            if u in known:
                tall, wide = [known[u].to(b0), *tall], [known[v].to(b0), *wide]
            known[u], known[v] = _cut(torch.cat(tall), torch.cat(wide), 2 * pair.rank)

    def state_dict(self) -> dict[str, Any]:
        return {id: dict(known) for id, known in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {id: dict(known) for id, known in state.items()}


def _cut(tall: Tensor, wide: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of T^T W, (k, out) and (k, in), of this rank: (rank, out), (rank, in)."""
    left, upper = torch.linalg.qr(tall.T)
    right, lower = torch.linalg.qr(wide.T)
    u, sizes, v = torch.linalg.svd(upper @ lower.T)
    rank_here = min(rank, len(sizes))
    root = sizes[:rank_here].sqrt()
    made = (left @ u[:, :rank_here] * root).T, (right @ v[:rank_here].T * root).T
    if rank_here == rank:
        return made
    return tuple(torch.cat([part, part.new_zeros(rank - rank_here, part.shape[1])]) for part in made)  # type: ignore[return-value]
