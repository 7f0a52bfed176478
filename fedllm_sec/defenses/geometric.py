"""Rules whose answer is a point close to all rows: geometric median, RFA, centered clipping.

Every iterate of these rules is a combination of the rows (and of the carried vector v), so distances to it follow from
inner products alone: with C_ij = <x_i - p, x_j - p> for some p, and weights w of sum 1,

    ||x_i - sum_j w_j x_j||^2 = C_ii - 2 (C w)_i + w C w.

The loops below therefore run on (n, n) numbers, and the matrix is read twice in all: for its distances and for the
final combination.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import bucket_matrix, need, random_order
from fedllm_sec.defenses.claims import row_weights
from fedllm_sec.errors import DefenseError
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext

TINY = torch.finfo(torch.float64).tiny
NOISE = 3e-8  # relative error of the kernels' inner products and distances
TOLERANCE = 1e-6  # error of an inner product, relative to the two lengths, that changes no answer
FAR = 1e6  # median distances from the central row: beyond, only a row's direction is left in a Weiszfeld step


def typical_distance(sq_distances: Tensor) -> float:
    """The median distance between two different rows, 0 for a single row."""
    n = len(sq_distances)
    pairs = sq_distances[~torch.eye(n, dtype=torch.bool)]
    return midpoint(pairs.sqrt()) if n > 1 else 0.0


def central_row(sq_distances: Tensor) -> int:
    """The row with the smallest median squared distance to all rows: the lower median, which half far rows leave be."""
    return int(sq_distances.median(dim=1).values.argmin())


def centred_gram(updates: UpdateMatrix, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(C, D): <x_i - p, x_j - p> and squared distances of the rows, from one pass over the matrix.

    p is `extra`, (d,), which then counts as the last row, or else the most central row. C follows from distances,
    (D_ip + D_jp - D_ij) / 2, which a common part of all rows does not disturb but a far row does, or from inner
    products, where it is the other way round; for each pair the one with the smaller error counts. Where neither
    is good enough, far rows beside a large common part, the matrix is read again in float64.
    """
    found = kernels.geometry(updates, extra)
    squares, inner = found.sq_distances, found.gram
    p = central_row(squares) if extra is None else updates.n
    to_p, lengths = squares[p], found.norms + found.norms[p]
    by_distance = (to_p[:, None] + to_p[None] - squares) / 2
    by_product = inner - inner[:, p, None] - inner[None, p] + inner[p, p]
    error_distance = NOISE * (to_p[:, None] + to_p[None] + squares) / 2
    error_product = NOISE * lengths[:, None] * lengths[None]
    gram = torch.where(error_distance <= error_product, by_distance, by_product)
    error = torch.minimum(error_distance, error_product)
    sizes = to_p.sqrt()
    if bool((error > TOLERANCE * sizes[:, None] * sizes[None]).logical_and(sizes[:, None] * sizes[None] > 0).any()):
        gram = kernels.direct_gram(updates, p, extra)
    return gram, squares


def within_reach(gram: Tensor, sq_distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(C, D, factors (n,)): rows farther from the central row p than FAR median distances, moved to that distance.

    x_i <- p + factor_i (x_i - p). Weiszfeld's pull of a far row is its direction, whatever its distance, but the terms
    of w C w grow with the distance's square: of rows at +1e16 and -1e16, which cancel there, float64 leaves only
    rounding, and all distances come out equal.
    """
    distances = gram.diagonal().clamp_min(0.0).sqrt()
    median = float(distances.median())
    if median == 0.0 and bool((distances > 0).any()):  # half of the rows are equal
        median = float(distances[distances > 0].median())
    factors = torch.where(distances > FAR * median, FAR * median / distances.clamp_min(TINY), 1.0)
    moved = factors < 1
    if not bool(moved.any()):
        return gram, sq_distances, factors
    near = gram * factors[:, None] * factors[None]
    lengths = near.diagonal()
    between = (lengths[:, None] + lengths[None] - 2 * near).clamp_min(0.0)
    changed = (moved[:, None] | moved[None]) & (sq_distances > 0)
    return near, torch.where(changed, between, sq_distances), factors


def distances_to(gram: Tensor, weights: Tensor) -> Tensor:
    """||x_i - sum_j w_j x_j|| for all i, from a (centred) Gram matrix and weights of sum 1: (n,)."""
    image = gram @ weights
    return (gram.diagonal() - 2 * image + weights @ image).clamp_min(0.0).sqrt()


def weiszfeld(
    gram: Tensor, shares: Tensor, *, iterations: int, tolerance: float, floor: float
) -> tuple[Tensor, int, bool]:
    """Weiszfeld's iteration from the weighted mean: (weights (n,) of sum 1, steps done, converged).

    w_i is in proportion to a_i / max(floor, ||x_i - z||). It stops when a step is shorter than `tolerance`
    times the median distance of the rows to z (the lower median, so that half far rows do not stop it early).
    """
    w = shares / shares.sum()
    for step in range(1, iterations + 1):
        r = distances_to(gram, w)
        pull = shares / r.clamp_min(max(floor, TINY))
        new = pull / pull.sum()
        change = new - w
        w = new
        if float((change @ gram @ change).clamp_min(0.0).sqrt()) <= tolerance * float(r.median()):
            return w, step, True
    return w, iterations, False


def optimal_row(sq_distances: Tensor, gram: Tensor, shares: Tensor) -> Tensor | None:
    """Weights on the rows at one place if that place is the geometric median, else None.

    Row k is optimal if the unit pulls of the rows elsewhere, sum_i a_i (x_i - x_k) / D_ik, are together
    weaker than the rows at x_k (Weiszfeld 1937; Vardi and Zhang 2000). Only the row with the best objective
    can be. Without this test Weiszfeld's iteration creeps towards such a row for ever.
    """
    distances = sq_distances.sqrt()
    k = int((distances @ shares).argmin())
    here = distances[k] <= 1e-12 * distances[k].median()
    pull = torch.where(here, 0.0, shares / distances[k].clamp_min(TINY))
    pull[k] -= pull.sum()
    strength = float((pull @ gram @ pull).clamp_min(0.0).sqrt())
    own = float(shares[here].sum())
    if strength >= own * (1 - 1e-9):
        return None
    return torch.where(here, shares, 0.0) / own


def geometric_median(
    updates: UpdateMatrix,
    ctx: RoundContext,
    *,
    weights: Literal["uniform", "counts"] = "uniform",
    cap: float = 3.0,
    buckets: int | None = None,
    smoothing: float = 1e-9,
    tolerance: float = 1e-8,
    iterations: int = 5000,
) -> Decision:
    """The point with the least (weighted) sum of distances to the rows, over all coordinates jointly.

    argmin_z sum_i a_i ||x_i - z||: a row if the optimality test says so, else Weiszfeld's iteration from
    the mean until a step is below `tolerance` times the median distance of the rows to z; distances are
    taken as at least `smoothing` times the median distance between rows. With `buckets` = k, the rows are
    first averaged in k random groups (Chen et al. 2017, algorithm 2). Scores are the distances to the
    result; a group's is no client's, so with buckets there are none. Where the minimum is not unique (rows on
    a line, n even) it is the one the iteration reaches. Rows more than a million median distances away count
    as if they were so far away in the same direction (`within_reach`).
    """
    place = "geometric_median"
    need(
        smoothing >= 0 and tolerance >= 0,
        place,
        "smoothing, tolerance >= 0",
        "Raise them.",
        smoothing=smoothing,
    )
    need(iterations >= 1, place, "iterations >= 1", "Raise it.", iterations=iterations)
    shares = row_weights(updates.counts, weights, cap, place)
    if buckets is None:
        return _weiszfeld_decision(updates, shares, smoothing, tolerance, iterations, exact=True)
    need(1 <= buckets <= updates.n, place, "1 <= buckets <= n", "Change buckets.", buckets=buckets, n=updates.n)
    groups = bucket_matrix(random_order(updates, ctx.rng), math.ceil(updates.n / buckets))
    inner = _weiszfeld_decision(
        updates.mix(groups), (groups > 0).double() @ shares, smoothing, tolerance, iterations, exact=True
    )
    assert inner.weights is not None
    return Decision(inner.update, groups.T @ inner.weights, notes=inner.notes)


def rfa(
    updates: UpdateMatrix,
    ctx: RoundContext,
    *,
    steps: int = 3,
    smoothing: float = 1e-6,
    weights: Literal["uniform", "counts"] = "counts",
    cap: float = 3.0,
) -> Decision:
    """`steps` smoothed Weiszfeld steps from the weighted mean (Pillutla et al. 2022).

    Weights are a_i / max(nu, ||x_i - z||), a_i the capped claimed counts. The paper's nu is 1e-6; here it is
    `smoothing` times the median distance between rows, so that the scale of the deltas does not matter. Rows more than
    a million median distances away count as if they were so far away in the same direction (`within_reach`): the
    paper's three steps are not enough to leave such a row behind, nor are they here.
    """
    need(steps >= 1, "rfa", "steps >= 1", "Raise steps.", steps=steps)
    shares = row_weights(updates.counts, weights, cap, "rfa")
    return _weiszfeld_decision(updates, shares, smoothing, 0.0, steps, exact=False)


def _weiszfeld_decision(
    updates: UpdateMatrix, shares: Tensor, smoothing: float, tolerance: float, iterations: int, *, exact: bool
) -> Decision:
    """Solve on the (n, n) numbers, then combine the rows once."""
    weights, scores, notes = solved(
        updates, shares, smoothing=smoothing, tolerance=tolerance, iterations=iterations, exact=exact
    )
    return Decision.weighted(updates, weights, scores=scores, notes=notes)


def solved(
    updates: UpdateMatrix, shares: Tensor, *, smoothing: float, tolerance: float, iterations: int, exact: bool
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The row weights of the (smoothed) geometric median, the rows' distances to it, both (n,), and notes."""
    gram, squares, factors = within_reach(*centred_gram(updates))
    w = optimal_row(squares, gram, shares) if exact else None
    steps, converged = 0, True
    if w is None:
        floor = smoothing * typical_distance(squares)
        w, steps, converged = weiszfeld(gram, shares, iterations=iterations, tolerance=tolerance, floor=floor)
    notes = {"steps": float(steps)} | ({"converged": float(converged)} if exact else {})
    scores = distances_to(gram, w) / factors
    own = w * factors
    own[int(gram.diagonal().argmin())] += float((w - own).sum())  # what a moved row has of the central one
    return own, scores, notes


def clip_weights(gram: Tensor, n: int, tau: float | Literal["median"], iterations: int) -> tuple[Tensor, Tensor, float]:
    """Centered clipping on the Gram of n rows and v: (weights (n + 1,), distances (n,), last radius).

    v <- v + mean_i min(1, tau / ||x_i - v||) (x_i - v), written as weights over the rows and the v of the
    round's start.
    """
    w = torch.zeros(n + 1, dtype=torch.float64)
    w[n] = 1.0
    radius = 0.0
    for _ in range(iterations):
        r = distances_to(gram, w)[:n]
        radius = float(torch.quantile(r, 0.5)) if tau == "median" else tau
        pull = torch.where(r > radius, radius / r.clamp_min(TINY), 1.0) / n
        w = (1 - pull.sum()) * w
        w[:n] += pull
    return w, distances_to(gram, w)[:n], radius


class CenteredClipping:
    """v <- v + mean_i min(1, tau / ||x_i - v||) (x_i - v), `iterations` times; v is kept from round to round.

    Karimireddy et al. 2021; v starts at zero and is last round's answer afterwards. The paper's tau
    is a number; by default it is the median distance of this round's rows to v, taken anew in each
    iteration. With `bucket_size` = s the rows are first averaged in random groups of s (Karimireddy et al.
    2022). Weights are those of the rows in the result; they add up to less than 1, the rest is last round's
    v. Scores are distances to the new v; a group's is no client's, so with `bucket_size` there are none.
    """

    def __init__(
        self,
        *,
        tau: float | Literal["median"] = "median",
        iterations: int = 1,
        bucket_size: int | None = None,
    ) -> None:
        place = "centered_clipping"
        need(tau == "median" or 0 < tau < math.inf, place, "tau > 0 or median", "Change tau.", tau=tau)
        need(iterations >= 1, place, "iterations >= 1", "Raise it.", iterations=iterations)
        need(
            bucket_size is None or bucket_size >= 1,
            place,
            "bucket_size >= 1",
            "Raise it.",
            bucket_size=bucket_size,
        )
        self.tau, self.iterations, self.bucket_size = tau, iterations, bucket_size
        self.v: Tensor | None = None

    def __call__(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        v = torch.zeros(updates.d) if self.v is None else self.v
        if len(v) != updates.d:
            raise DefenseError(
                f"centered_clipping: v of the last round has {len(v)} values, the rows have {updates.d}. "
                "Start a new run where the trained parameters change."
            )
        groups: Tensor | None = None
        rows = updates
        if self.bucket_size is not None:
            groups = bucket_matrix(random_order(updates, ctx.rng), self.bucket_size)
            rows = updates.mix(groups)
        w, distances, radius = clip_weights(centred_gram(rows, v)[0], rows.n, self.tau, self.iterations)
        new = kernels.combine(rows, w, v)
        self.v = new.clone()
        if groups is not None:
            return Decision(new, groups.T @ w[:-1], notes={"tau": radius})
        return Decision(new, w[:-1], None, distances, {"tau": radius})

    def state_dict(self) -> dict[str, Any]:
        return {} if self.v is None else {"v": self.v}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.v = state.get("v")
