"""Rows of adapter factors compared by their products, through r x r matrices: no (out, in) matrix is ever formed.

A row's change in one layer is D_i = B_i A_i - B_0 A_0 = b_i (A_0 + a_i) + B_0 a_i, with a_i and b_i its deltas. With

    T_ij = b_i^T b_j,   W_ij = a_i a_j^T,   p_i = B_0^T b_i,   c_i = a_i A_0^T

of which T and W alone are of order n^2 r^2 (in + out), <D_i, D_j> is

    <T_ij + p_i^T + p_j + B_0^T B_0, W_ij> + <T_ij, c_i + c_j^T + A_0 A_0^T> + <p_i, c_j> + <p_j, c_i>.

Many float32 rows are multiplied in float32. In another gauge the factors may be large where the products are small,
and a distance may be small beside two lengths: what cancels then must not be what decides. Pairs in which the rounding
could be seen are taken again in float64, which a few rows, and float64 ones, are from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.errors import DefenseError
from fedllm_sec.kernels.torch_backend import full_float32
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.factors import Pair, Products

PARTS = 8  # of the clients: inner products of later with earlier ones alone are formed, a little over half of all
EQUAL = 1e-12  # squared distance by squared lengths, below which rows are one: float32 rows do not tell it from 0
WIDE = 2**26  # n^2 r^2 (in + out) of a layer below which all is float64: it costs milliseconds
NOISE = 5e-8  # error of a float32 inner product by the lengths of what is multiplied: 1e-8 measured
SEEN = 5e-6  # error of a squared distance, relative to it, from which a pair is taken again
SMALLEST, LARGEST = 1e-6, 1e6  # lengths of products, and of factors, within which float32 loses nothing at its ends

Block = tuple[slice, slice]  # of rows: left ones with right ones, among which are the left ones


def product_gram(updates: UpdateMatrix, extra: Tensor | None = None) -> Tensor:
    """<D_i, D_j> of all rows and `extra` ones, over all layers and what stands beside them: (n, n) float64."""
    rows, weights = _stored(updates)
    if extra is not None:
        rows, e = torch.cat([rows, extra.to(rows)]), len(extra)
        weights = torch.nn.functional.pad(weights, (0, e, 0, e))
        weights[-e:, -e:] = torch.eye(e, dtype=torch.float64)
    assert updates.products is not None
    gram, sizes = stored_gram(rows, updates.products)
    total = weights @ gram @ weights.T
    if sizes is not None and updates.mixing is not None and bool(_seen(total, weights.abs() @ sizes).any()):
        total = weights @ _whole(rows, updates.products, torch.float64)[0] @ weights.T
    return (total + total.T) / 2


def stored_gram(rows: Tensor, products: Products) -> tuple[Tensor, Tensor | None]:
    """The same of plain rows (n, d), and what their rounding is relative to, (n,): None where all is float64."""
    n = len(rows)
    work = max(n * n * pair.rank * (pair.a.stop - pair.a.start + pair.b.stop - pair.b.start) for pair in products.pairs)
    if rows.dtype == torch.float64 or work < WIDE:
        return _whole(rows, products, torch.float64)[0], None
    gram, sizes = _whole(rows, products, torch.float32)
    left, right = _covering(_seen(gram, sizes))
    if left:
        order, k = torch.tensor([*left, *(j for j in right if j not in left)]), len(left)
        blocks = [(slice(0, k), slice(0, len(order))), *((slice(i, i + 1),) * 2 for i in range(k, len(order)))]
        again = _by_blocks(rows[order.to(rows.device)], products, torch.float64, blocks)[0]
        gram[order[:k, None], order] = again[:k]
        gram[order, order[:k, None]] = again[:k]
        gram[order, order] = again.diagonal()  # a distance needs both lengths
    return gram, sizes


def _seen(gram: Tensor, sizes: Tensor) -> Tensor:
    """Of which pairs float32's rounding could be seen, in their distance or in a length: (n, n) bool."""
    squares = gram.diagonal()
    apart = (squares[:, None] + squares - 2 * gram).diagonal_scatter(squares)
    seen = ~((sizes[:, None] + sizes).square() * NOISE <= SEEN * apart) | (sizes < SMALLEST)
    return seen | seen.diagonal() | seen.diagonal()[:, None]


def _covering(seen: Tensor) -> tuple[list[int], list[int]]:
    """A few rows of which one is in every seen pair, and those that it is seen with."""
    left, rest = list[int](), seen.clone()
    while bool(rest.any()):
        left.append(int(rest.sum(1).argmax()))
        rest[left[-1]] = rest[:, left[-1]] = False
    return left, seen[left].any(0).nonzero().flatten().tolist()


def _whole(rows: Tensor, products: Products, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`_by_blocks` for all pairs, from a little over half of them."""
    step = -(-len(rows) // PARTS)
    stops = [min(start + step, len(rows)) for start in range(0, len(rows), step)]
    blocks = [(slice(start, stop), slice(0, stop)) for start, stop in zip([0, *stops], stops, strict=False)]
    gram, sizes = _by_blocks(rows, products, dtype, blocks)
    return gram.tril() + gram.tril(-1).T, sizes


def _by_blocks(rows: Tensor, products: Products, dtype: torch.dtype, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """<D_i, D_j> of some blocks of pairs, (n, n), and the rows' sizes (n,), to whose products rounding is relative.

    The square of a size is the sum of (|b_k| |A_0k| + |b_k| |a_k| + |B_0k| |a_k|)^2 over the r parts of all layers.
    """
    n = len(rows)
    total = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
    sizes = torch.zeros(n, dtype=torch.float64, device=rows.device)
    start = products.start.to(rows.device)
    most = max(max(pair.a.stop - pair.a.start, pair.b.stop - pair.b.start) for pair in products.pairs)
    rooms = torch.empty(2, n * most, dtype=dtype, device=rows.device)  # new memory for each layer costs as much again
    with full_float32():
        for pair in products.pairs:
            own, sizes_here = _layer(pair, start, rows, rooms, blocks)
            total += pair.scale**2 * own
            sizes += pair.scale**2 * sizes_here
    for place in products.plain:
        block = rows[:, place].double()
        own = block @ block.T
        total, sizes = total + own, sizes + own.diagonal()
    return total.cpu(), sizes.sqrt().cpu()


def _layer(pair: Pair, start: Tensor, rows: Tensor, rooms: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """One layer's part of both, unscaled."""
    n, r = len(rows), pair.rank
    a = _copied(rooms[0], rows[:, pair.a]).view(n * r, -1)  # (n r, in)
    b = _copied(rooms[1], rows[:, pair.b].reshape(n, -1, r).transpose(0, 1)).view(-1, n * r)  # (out, n r): runs of r
    a0, b0 = start[pair.a].to(a).view(r, -1), start[pair.b].to(b).view(-1, r)
    c, first_a, moves = (a @ a0.T).view(n, r, r), a0 @ a0.T, bool(b0.any())
    p, first_b = (b0.T @ b).view(r, n, r).transpose(0, 1), b0.T @ b0
    total = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
    tall, wide = a.new_zeros(n, r), a.new_zeros(n, r)  # squared lengths of the columns of b and the rows of a
    for left, right in blocks:
        i, j = slice(left.start * r, left.stop * r), slice(right.start * r, right.stop * r)
        t, w = b[:, i].T @ b[:, j], a[i] @ a[j].T
        for squares, x in ((tall, t), (wide, w)):
            squares[left] = x[:, i.start - j.start :].diagonal().view(-1, r)
        t, w = (x.view(left.stop - left.start, r, -1, r) for x in (t, w))
        whole = w + (c[left] + first_a)[:, :, None]  # A_i A_j^T
        whole += c[right].permute(2, 0, 1)
        whole *= t
        if moves:
            whole.addcmul_((p[left].mT + first_b)[:, :, None] + p[right].transpose(0, 1), w)
        total[left, right] = whole.sum(3).sum(1, dtype=torch.float64)
    if moves:
        cross = p.flatten(1) @ c.flatten(1).T
        total += cross + cross.T
    tall, wide = tall.sqrt(), wide.sqrt()
    reach = tall * (wide + first_a.diagonal().sqrt()) + first_b.diagonal().sqrt() * wide
    reach[(tall > LARGEST) | (wide > LARGEST)] = torch.inf
    return total, reach.double().square().sum(1)


def _copied(room: Tensor, values: Tensor) -> Tensor:
    return room[: values.numel()].view(values.shape).copy_(values)


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


def _inner(tall: Tensor, wide: Tensor) -> Tensor:
    """<T_i^T W_i, T_j^T W_j> of (n, k, out) and (n, k, in), through k x k matrices: (n, n)."""
    n, k = tall.shape[:2]
    t, w = tall.reshape(n * k, -1), wide.reshape(n * k, -1)
    return (t @ t.T).mul_(w @ w.T).view(n, k, n, k).sum((1, 3))


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
            total += pair.scale**2 * _inner(tall, wide).cpu()
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
