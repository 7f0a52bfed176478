"""The plain torch backend, for any device: used where numba or Triton is missing, and as the one to compare with.

Inner products are float32 products over slices of bounded width, added up in float64. Pairs whose distance cancels
are taken again relative to one of their rows, and what still cancels, or leaves the range of float32, is summed
directly in float64: at most three passes, whatever the rows hold. Nothing waits for the device within a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fedllm_sec.kernels.networks import HIGH_ONLY, LOW_ONLY, Network
from fedllm_sec.kernels.sums import TILE, plain_rows, tiles
from fedllm_sec.matrix import UpdateMatrix

SLICE = 4096  # columns of one float32 inner product
CANCELS = 16.0  # D below (|x|^2 + |y|^2) / 16 has lost more than 4 bits
TINY, HUGE = 1e-28, 1e36  # a row's squares are trusted where their sum is between these, per column for TINY
WIDE = 2**26  # products (n n d) below which all is done in float64: it costs milliseconds
SORTED_FROM = 256  # rows beyond which torch.sort is faster than a network in torch, measured on the CPU
PAIRS_AT_ONCE = 2**22  # elements of a direct float64 pass

ProductsPass = Callable[[UpdateMatrix, Tensor | None, int | None], Tensor]


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32: its 10 bits are not enough for a distance."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def blocks_with(updates: UpdateMatrix, extra: Tensor | None) -> Iterator[Tensor]:
    """The column blocks with the `extra` rows below."""
    for place, block in updates.blocks():
        yield block if extra is None else torch.cat([block, extra[:, place].to(block)])


def inner_products(block: Tensor) -> Tensor:
    """x_i . x_j over one block: (n, n) float64."""
    n, width = block.shape
    whole = width // SLICE * SLICE
    total = torch.zeros(n, n, dtype=torch.float64, device=block.device)
    if whole:
        slices = block[:, :whole].reshape(n, -1, SLICE).transpose(0, 1)  # (slices, n, SLICE), a view
        total += torch.bmm(slices, slices.transpose(1, 2)).sum(0, dtype=torch.float64)
    if whole < width:
        total += block[:, whole:] @ block[:, whole:].T
    return total


def products_pass(updates: UpdateMatrix, extra: Tensor | None, pivot: int | None) -> Tensor:
    """The (n, n) inner products of all rows, or of their differences to row `pivot`."""
    total: Tensor | None = None
    for block in blocks_with(updates, extra):
        part = inner_products(block if pivot is None else block - block[pivot])
        total = part if total is None else total + part
    n = updates.n + (0 if extra is None else extra.shape[0])
    return torch.zeros(n, n, dtype=torch.float64) if total is None else total.cpu()


def direct_pass(updates: UpdateMatrix, extra: Tensor | None, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products and squared distances of some pairs (2, p), in float64: (p,) each."""
    p = pairs.shape[1]
    products, distances = torch.zeros(p, dtype=torch.float64), torch.zeros(p, dtype=torch.float64)
    for block in blocks_with(updates, extra):
        left, right = pairs.to(block.device)
        step = max(1, PAIRS_AT_ONCE // p)
        for start in range(0, block.shape[1], step):
            some = block[:, start : start + step].double()
            x, y = some[left], some[right]
            products += (x * y).sum(1).cpu()
            distances += (x - y).square().sum(1).cpu()
    return products, distances


def symmetric(matrix: Tensor) -> Tensor:
    """Its upper triangle, mirrored: equal distances must be equal bits, for rules that break ties by order."""
    return matrix.triu() + matrix.triu(1).T


def expand(gram: Tensor) -> tuple[Tensor, Tensor]:
    """|x|^2 + |y|^2 - 2xy of all pairs, and which of these cancel (or are not numbers)."""
    squares = gram.diagonal()
    both = squares[:, None] + squares[None]
    distances = (both - 2 * gram).fill_diagonal_(0)
    return distances, ~(distances * CANCELS >= both)


def pair_sums(
    updates: UpdateMatrix, extra: Tensor | None, distances: bool, products: ProductsPass = products_pass
) -> tuple[Tensor, Tensor]:
    """Inner products and, if asked for, squared distances of all rows and `extra` ones: (n, n) float64 each."""
    with full_float32():
        gram = symmetric(products(updates, extra, None))
        squares = gram.diagonal()
        wild = ~((squares > TINY * updates.d) & (squares < HUGE))
        if gram.shape[0] ** 2 * updates.d < WIDE:
            wild[:] = True
        apart, redo = expand(gram)
        off_diagonal = ~torch.eye(gram.shape[0], dtype=torch.bool)
        tame = ~(wild[:, None] | wild[None])
        redo &= tame & off_diagonal
        if distances and int(redo.sum()) > 2 * gram.shape[0]:
            shifted = symmetric(products(updates, extra, int(redo.sum(1).argmax())))
            again, cancels = expand(shifted)
            better = redo & ~cancels & (again > TINY * updates.d)
            apart[better] = again[better]
            redo &= ~better
        pairs = ((redo | ~tame) if distances else ~tame).triu().nonzero().T
        if pairs.shape[1]:
            exact_gram, exact_apart = direct_pass(updates, extra, pairs)
            i, j = pairs
            loose = ~tame[i, j]
            gram[i[loose], j[loose]] = gram[j[loose], i[loose]] = exact_gram[loose]
            apart[i, j] = apart[j, i] = exact_apart
    return gram, apart


def accumulate(sums: Tensor, places: Sequence[int], updates: UpdateMatrix) -> Tensor:
    """Add row i to client places[i] of the running `sums`; the inner products of these sums: (n, n) float64."""
    where = torch.tensor(places, device=sums.device)
    gram = torch.zeros(updates.n, updates.n, dtype=torch.float64)
    for place, block in updates.blocks():
        touched = slice(place.start // TILE, tiles(place.stop))
        columns = slice(place.start - touched.start * TILE, place.stop - touched.start * TILE)
        rows = plain_rows(sums[touched, where], (touched.stop - touched.start) * TILE)
        rows[:, columns] += block.to(sums.device)
        sums[touched, where] = rows.view(updates.n, -1, TILE).transpose(0, 1)
        gram += pair_sums(UpdateMatrix.of(rows[:, columns], chunk_mb=updates.chunk_mb), None, False)[0]
    return gram


def square_sums(updates: UpdateMatrix) -> Tensor:
    """The squared norm of each row: (n,) float64."""
    parts = [block.double().square().sum(1) for _, block in updates.blocks()]
    return torch.stack(parts).sum(0).cpu() if parts else torch.zeros(updates.n, dtype=torch.float64)


def combine(updates: UpdateMatrix, weights: Tensor, extra: Tensor | None, extra_weights: Tensor) -> Tensor:
    """sum_i w_i x_i + sum_e v_e y_e: (d,) float32, summed in float64."""
    out = torch.empty(updates.d, device=updates.compute_device)
    for place, block in updates.blocks():
        total = weights.to(block.device) @ block.double()
        if extra is not None:
            total += extra_weights.to(block.device) @ extra[:, place].to(block.device).double()
        out[place] = total.float()
    return out


def order_statistics(updates: UpdateMatrix, network: Network) -> Tensor:
    """The network's statistic of each column: (d,) float32."""
    out = torch.empty(updates.d, device=updates.compute_device)
    for place, block in updates.blocks():
        if network.n > SORTED_FROM:
            out[place] = sorted_statistic(block, network)
            continue
        # On the CPU a step should find its rows in the cache.
        step = block.shape[1] if block.is_cuda else max(256, 2**18 // network.n)
        parts = [statistic(block[:, s : s + step], network) for s in range(0, block.shape[1], step)]
        out[place] = torch.cat(parts)
    return out


def statistic(block: Tensor, network: Network) -> Tensor:
    """The network's statistic of one block: (c,)."""
    rows = list(block)
    for a, b, kind in network.comparators:
        low, high = rows[a], rows[b]
        if kind != HIGH_ONLY:
            rows[a] = torch.minimum(low, high)
        if kind != LOW_ONLY:
            rows[b] = torch.maximum(low, high)
    first, last, k = network.first, network.last, network.nearest
    total = torch.zeros(block.shape[1], dtype=torch.float64, device=block.device)
    if k == 0:
        for row in rows[first:last]:
            total += row
        return (total / (last - first)).float()
    middle = rows[(network.n - 1) // 2].double() + rows[network.n // 2].double()
    for residue in range(first, first + k):  # see compiled_columns.order_statistics
        chosen = rows[residue]
        for j in range(residue, last - k, k):
            chosen = torch.where(rows[j].double() + rows[j + k].double() < middle, rows[j + k], chosen)
        total += chosen
    return (total / k).float()


def sorted_statistic(block: Tensor, network: Network) -> Tensor:
    """The same from a full sort of each column, for n beyond the networks."""
    return statistic(block.sort(0).values, Network(network.n, (), network.first, network.last, network.nearest))


def sign_sums(updates: UpdateMatrix) -> Tensor:
    """Per column, the number of positive minus the number of negative values: (d,) float32."""
    out = torch.empty(updates.d, device=updates.compute_device)
    for place, block in updates.blocks():
        out[place] = block.sign().sum(0)
    return out
