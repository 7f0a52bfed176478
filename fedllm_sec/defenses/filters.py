"""Row filters that look at distances, and rules that filter values or layers: MDA, MeaMed, LASA."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.before import clip_factors
from fedllm_sec.defenses.checks import need, need_f
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext


def by_id(ids: Sequence[str]) -> Tensor:
    """Positions in the order of the client ids: ties are then broken by id, not by how rows are stacked."""
    return torch.tensor(sorted(range(len(ids)), key=lambda i: ids[i]))


def mask_of(members: Sequence[int] | Tensor, n: int) -> Tensor:
    """(n,) bool, true at `members`."""
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.as_tensor(members, dtype=torch.long)] = True
    return mask


def subsets(n: int, size: int, batch: int = 20_000) -> Iterator[Tensor]:
    """All subsets of range(n) with `size` members, in batches of rows: (b, size) int64."""
    chosen = itertools.combinations(range(n), size)
    while rows := list(itertools.islice(chosen, batch)):
        yield torch.tensor(rows)


def meamed(updates: UpdateMatrix, ctx: RoundContext, *, f: int) -> Decision:
    """Per coordinate, the mean of the n - f values nearest the median (Xie et al. 2018, sec. 3, "MeaMed").

    The median of an even number of values is their midpoint. Of two values equally far from it the smaller
    is taken; the paper leaves this open.
    """
    need_f("meamed", updates.n, f, updates.n >= 2 * f + 1, "n >= 2f + 1 clients")
    return Decision(kernels.mean_around_median(updates, updates.n - f))


def smallest_diameter(sq_distances: Tensor, size: int) -> list[int]:
    """The `size` rows with the smallest diameter; of several such sets the one with the least sum of
    squared distances. Exact: every subset is looked at."""
    best: tuple[float, float] = (math.inf, math.inf)
    members: list[int] = list(range(size))
    for batch in subsets(len(sq_distances), size):
        inner = sq_distances[batch[:, :, None], batch[:, None, :]]  # (b, size, size)
        diameter, total = inner.amax(dim=(1, 2)), inner.sum(dim=(1, 2))
        least = diameter.min()
        first = int(torch.where(diameter == least, total, math.inf).argmin())
        if (float(least), float(total[first])) < best:
            best = (float(least), float(total[first]))
            members = batch[first].tolist()
    return members


def peel_diameter(sq_distances: Tensor, size: int) -> list[int]:
    """Greedy stand-in: of the two rows that are farthest apart, drop the one farther from all, and repeat."""
    left = list(range(len(sq_distances)))
    while len(left) > size:
        inner = sq_distances[left][:, left]
        ends = divmod(int(inner.argmax()), len(left))
        sums = inner.sqrt().sum(dim=1)
        left.pop(ends[0] if sums[ends[0]] > sums[ends[1]] else ends[1])
    return left


def mda(updates: UpdateMatrix, ctx: RoundContext, *, f: int, max_subsets: int = 100_000) -> Decision:
    """The mean of the n - f rows whose largest mutual distance is smallest: minimum-diameter averaging.

    El Mhamdi et al. 2021, "MDA" (Rousseeuw 1985). Exact while there are at most `max_subsets` sets of n - f
    rows; sets of equal diameter are told apart by their sum of squared distances, which the paper leaves
    open. With more sets it is greedy (note `exact` = 0): of the two rows farthest apart the one farther from
    all others goes, f times. Scores are the distances to the farthest kept row.
    """
    n = updates.n
    need_f("mda", n, f, n >= 2 * f + 1, "n >= 2f + 1 clients")
    need(max_subsets >= 1, "mda", "max_subsets >= 1", "Raise it.", max_subsets=max_subsets)
    order = by_id(updates.ids)
    squares = kernels.sq_distances(updates)[order][:, order]
    exact = math.comb(n, f) <= max_subsets
    members = order[smallest_diameter(squares, n - f) if exact else peel_diameter(squares, n - f)]
    scores = torch.empty(n, dtype=torch.float64)
    kept = mask_of(members, n)
    scores[order] = squares[:, kept[order]].amax(dim=1).sqrt()
    weights = kept.double() / (n - f)
    return Decision.weighted(updates, weights, kept=kept, scores=scores, notes={"exact": float(exact)})


# ---------------------------------------------------------------- LASA

HALF = 1 << 16  # a float32 magnitude is found through its upper and its lower 16 bits


def magnitude_thresholds(updates: UpdateMatrix, keep: int) -> tuple[Tensor, Tensor]:
    """Each row's norm and its `keep`-th largest |value|, exact, in two reads or fewer: (n,) float64, (n,) float32.

    Where no compiled pass finds it: the bits of non-negative float32 numbers order like the numbers, so counting first
    the upper and then, in the bin that holds the wanted value, the lower 16 bits finds it without sorting d values.
    """
    fast = kernels.for_rules(updates)
    found: tuple[Tensor, Tensor] | None = None if fast is None else fast.magnitude_thresholds(updates, keep)
    if found is not None:
        return found
    n = updates.n
    squares = torch.zeros(n, dtype=torch.float64)
    counts = torch.zeros(n, HALF, dtype=torch.long)
    for _, block in updates.blocks():
        squares += block.double().square().sum(1).cpu()
        counts += _bin_counts(block.abs().contiguous().view(torch.int32) >> 16)
    upper, left = _bin_of(counts, torch.full((n,), keep))
    counts.zero_()
    for _, block in updates.blocks():
        bits = block.abs().contiguous().view(torch.int32)
        inside = (bits >> 16) == upper[:, None].to(bits.device)
        counts += _bin_counts(bits & (HALF - 1), inside)
    lower, _ = _bin_of(counts, left)
    bits32 = ((upper << 16) | lower).to(torch.int32)
    return squares.sqrt(), bits32.view(torch.float32)


def _bin_counts(values: Tensor, inside: Tensor | None = None) -> Tensor:
    """How often each of the 2^16 values occurs in each row of (n, c): (n, 2^16)."""
    n = len(values)
    keys = values.long() + HALF * torch.arange(n, device=values.device)[:, None]
    flat = keys.flatten() if inside is None else keys[inside]
    return torch.bincount(flat, minlength=n * HALF).view(n, HALF).cpu()


def _bin_of(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the rank-th largest value of each row, and its rank inside the bin: (n,), (n,)."""
    above = counts.flip(1).cumsum(1)  # values in this bin or higher ones
    place = (above < rank[:, None]).sum(1)
    bins = HALF - 1 - place
    higher = above.gather(1, place[:, None])[:, 0] - counts.gather(1, bins[:, None])[:, 0]
    return bins, rank - higher


SLACK = 1 + 1e-9  # times a bound, so that a score equal to it passes


def mz_scores(values: Tensor) -> Tensor:
    """|v - median| / standard deviation down the columns of (n, layers); 0 where all values are equal."""
    spread = values.std(dim=0, correction=0)
    gaps = (values - torch.quantile(values, 0.5, dim=0)).abs()
    return torch.where(spread > 1e-12 * values.abs().amax(dim=0), gaps / spread, 0.0)


def lasa(
    updates: UpdateMatrix,
    ctx: RoundContext,
    *,
    sparsity: float = 0.3,
    norm_bound: float = 2.0,
    sign_bound: float = 1.0,
) -> Decision:
    """Layer by layer, the mean over the clients whose norm and sign balance in that layer are ordinary.

    Xu et al. 2025 (WACV), algorithm 1. Rows are clipped to the median norm and the share `sparsity` of their
    smallest magnitudes is set to zero. In each layer l a client is kept if both MZ-scores |v - median| / std
    are within the bounds, for v the layer's norm and for v its sign purity (1 + sum sign / sum |sign|) / 2.
    The paper uses 1 and 1 on CIFAR, 2 and 1 elsewhere.

    Stated here: values tied with the smallest kept magnitude are all kept; the threshold is taken over the
    whole row (the authors' code leaves parameters of one dimension dense); a layer of zeros has sign purity
    1/2; a score equal to its bound passes, so that two clients are never both dropped. A layer with nobody
    left takes all clients, as in the authors' code (note `empty_layers`). Scores are the share of layers a
    client was dropped in. Four reads of the matrix; layers are the parameters of the layout.
    """
    need(0.0 <= sparsity < 1.0, "lasa", "0 <= sparsity < 1", "Lower it.", sparsity=sparsity)
    bounds_hold = norm_bound >= 1 and sign_bound >= 1
    need(bounds_hold, "lasa", "bounds >= 1", "Raise them.", norm_bound=norm_bound, sign_bound=sign_bound)
    need(updates.d >= 1, "lasa", "d >= 1 parameters", "Send some.", d=updates.d)
    n, d = updates.n, updates.d
    norms, thresholds = magnitude_thresholds(updates, max(1, d - int(sparsity * d)))
    fast = kernels.for_rules(updates)
    layers = [place for place in updates.layout.slices().values() if place.start < place.stop]
    if fast is not None:
        squares, signs, filled = fast.layer_sums(updates, thresholds, layers).unbind(2)
    else:
        squares, signs, filled = (torch.zeros(n, len(layers), dtype=torch.float64) for _ in range(3))
        for l, piece, _ in _layer_pieces(updates, thresholds, layers):
            squares[:, l] += piece.double().square().sum(1).cpu()
            signs[:, l] += piece.sign().double().sum(1).cpu()
            filled[:, l] += (piece != 0).double().sum(1).cpu()
    clip = clip_factors(norms, midpoint(norms))
    purity = (1 + signs / filled.clamp_min(1.0)) / 2
    passed = mz_scores(clip[:, None] * squares.sqrt()) <= norm_bound * SLACK
    passed &= mz_scores(purity) <= sign_bound * SLACK
    empty = ~passed.any(dim=0)
    passed[:, empty] = True
    shares = clip[:, None] * passed / passed.sum(dim=0)  # (n, layers)
    if fast is not None:
        out = fast.layer_mean(updates, thresholds, layers, shares)
    else:
        out = torch.empty(d, device=updates.compute_device)
        for l, piece, place in _layer_pieces(updates, thresholds, layers):
            out[place] = (shares[:, l].to(piece.device) @ piece.double()).float()
    scores = 1 - passed.double().mean(dim=1)
    return Decision(out, None, None, scores, {"empty_layers": float(empty.sum())})


def _layer_pieces(
    updates: UpdateMatrix, thresholds: Tensor, layers: Sequence[slice]
) -> Iterator[tuple[int, Tensor, slice]]:
    """The sparsified rows, in pieces that lie in one block and one layer: (layer, (n, c), its columns)."""
    for place, block in updates.blocks():
        sparse = torch.where(block.abs() >= thresholds[:, None].to(block.device), block, 0.0)
        for l, layer in enumerate(layers):
            start, stop = max(place.start, layer.start), min(place.stop, layer.stop)
            if start < stop:
                yield l, sparse[:, start - place.start : stop - place.start], slice(start, stop)
