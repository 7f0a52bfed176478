"""Residual-based reweighting: clients are judged by a robust line through each coordinate's sorted values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.filters import by_id
from fedllm_sec.kernels import networks
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext

CACHED = 2**18  # numbers of a block, so that a step of the networks finds its rows in the cache


def rank_mean(values: Tensor, first: int, last: int) -> Tensor:
    """Mean of the sorted values first..last-1 of each column of (n, c), by a pruned sorting network: (c,)."""
    rows = list(values)
    for a, b, kind in networks.mean_of_ranks(len(rows), first, last).comparators:
        low, high = rows[a], rows[b]
        if kind != networks.HIGH_ONLY:
            rows[a] = torch.minimum(low, high)
        if kind != networks.LOW_ONLY:
            rows[b] = torch.maximum(low, high)
    return torch.stack(rows[first:last]).mean(dim=0)


def middle(values: Tensor) -> Tensor:
    """Median of each column, the midpoint for an even number: (c,)."""
    n = len(values)
    return rank_mean(values, (n - 1) // 2, n // 2 + 1)


def repeated_median(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept, (c,) each, of a line through (rank, value) for columns sorted upwards, (n, c).

    Slope: the median over i of the median over j != i of (y_j - y_i) / (j - i) (Siegel 1982). Intercept:
    median value minus slope times median rank.
    """
    n = len(ordered)
    at_point = []
    for i in range(n):
        slopes = [(ordered[j] - ordered[i]) / (j - i) for j in range(n) if j != i]
        at_point.append(middle(torch.stack(slopes)))
    slope = middle(torch.stack(at_point))
    return slope, middle(ordered) - slope * (n - 1) / 2


def confidences(values: Tensor, line: tuple[Tensor, Tensor] | None, tuning: float) -> tuple[Tensor, ...]:
    """Confidence in each value, in [0, 1], and the line's value in its place, (n, c); slope and intercept, (c,).

    The line is put through the values where it is not given. With residuals r to the line, tau = 1.4826 (1 +
    5 / (n - 1)) M, M the median of |r| without its smallest, and h_i the leverage of the value's rank, the
    confidence is min(1, K sqrt(1 - h_i) tau / |r|) for K = tuning * sqrt(2 / n).
    """
    n = len(values)
    ordered, order = values.sort(dim=0, stable=True)
    slope, intercept = repeated_median(ordered) if line is None else line
    ranks = torch.arange(n, dtype=torch.float64, device=values.device)
    fitted = intercept + slope * ranks[:, None]
    residual = (ordered - fitted).abs()
    spread = rank_mean(residual, n // 2, (n + 1) // 2 + 1)  # the median of all but the smallest
    floor = 1e-7 * middle((ordered - middle(ordered)).abs())
    tau = torch.maximum(1.4826 * (1 + 5 / (n - 1)) * spread, floor)
    leverage = 1 / n + (ranks - (n - 1) / 2).square() * 12 / (n * (n * n - 1))
    reach = tuning * math.sqrt(2 / n) * (1 - leverage).clamp_min(0.0).sqrt()[:, None] * tau
    trust = torch.where(residual > reach, reach / residual.clamp_min(1e-300), 1.0)
    back = order.argsort(dim=0)
    return trust.gather(0, back), fitted.gather(0, back), slope, intercept


def _narrow(updates: UpdateMatrix, order: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of cache size, rows in the order of the ids: (columns, (n, c) float64)."""
    for place, block in updates.blocks():
        width = block.shape[1] if block.is_cuda else max(256, CACHED // updates.n)
        for start in range(0, block.shape[1], width):
            part = block[:, start : start + width][order.to(block.device)].double()
            yield slice(place.start + start, place.start + start + part.shape[1]), part


def residual_reweighting(
    updates: UpdateMatrix, ctx: RoundContext, *, tuning: float = 2.0, threshold: float = 0.1
) -> Decision:
    """Weight clients by how well their values fit a robust line, coordinate by coordinate.

    Fu et al. 2019, algorithm 1. In each coordinate the values are sorted and a repeated-median line is put
    through (rank, value); a value's confidence falls with its residual (`confidences`). Values with a
    confidence below `threshold` are replaced by the line's. A client's weight is the square of its summed
    confidences, each multiplied by the standard deviation of the confidences in that coordinate, as a share
    of all clients' (the square is in the authors' code). tuning = 2 and threshold = 0.1 are the paper's.

    Stated here: the paper adds 1e-7 to tau, here tau is at least 1e-7 times the coordinate's median
    deviation, so that scale does not matter, and where more than half of the values are equal the others
    have confidence 0. If the confidences tell nobody apart (all ones) the weights are equal (note `all_alike`
    = 1); with three rows the formulas always end there: up to n = 3 this is the mean, and protects nobody.
    The update is no combination of the rows, so `weights` is not given; scores are 1 - weight / largest
    weight. Time grows with n^2 log^2 n for each coordinate; the lines take two
    float64 vectors of d.
    """
    need(tuning > 0, "residual_reweighting", "tuning > 0", "Raise it.", tuning=tuning)
    sane = 0 <= threshold < 1
    need(sane, "residual_reweighting", "0 <= threshold < 1", "Change it.", threshold=threshold)
    n = updates.n
    if n <= 3:
        even = torch.full((n,), 1 / n, dtype=torch.float64)
        return Decision(kernels.combine(updates, even), None, None, 0 * even, {"all_alike": 1.0})
    order = by_id(updates.ids)
    if (fast := kernels.for_rules(updates)) is not None:
        lines = fast.Lines(updates.select(order.tolist()), tuning)
        weights, alike = _weights(lines.sums())
        return _decision(lines.mean(weights, threshold), weights, order, alike)
    sums = torch.zeros(n, dtype=torch.float64)
    put = torch.empty(2, updates.d, dtype=torch.float64, device=updates.compute_device)
    for place, values in _narrow(updates, order):
        trust, _, put[0, place], put[1, place] = confidences(values, None, tuning)
        sums += (trust * trust.std(dim=0)).sum(dim=1).cpu()
    weights, alike = _weights(sums)
    out = torch.empty(updates.d, device=updates.compute_device)
    for place, values in _narrow(updates, order):
        trust, fitted, _, _ = confidences(values, (put[0, place], put[1, place]), tuning)
        corrected = torch.where(trust >= threshold, values, fitted)
        out[place] = (weights.to(values.device) @ corrected).float()
    return _decision(out, weights, order, alike)


def _weights(sums: Tensor) -> tuple[Tensor, bool]:
    """Each client's share, (n,) of sum 1, from its summed confidences; whether these tell nobody apart."""
    alike = float(sums.max()) == 0.0
    weights = torch.ones_like(sums) if alike else (sums / sums.max()).square()
    return weights / weights.sum(), alike


def _decision(update: Tensor, weights: Tensor, order: Tensor, alike: bool) -> Decision:
    scores = torch.empty_like(weights)
    scores[order] = 1 - weights / weights.max()
    return Decision(update, None, None, scores, {"all_alike": float(alike)})
