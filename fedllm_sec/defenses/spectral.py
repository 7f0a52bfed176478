"""Rules that look for the direction in which the rows spread most: DnC, CAF, SMEA.

The largest singular values of n centred rows are those of their (n, n) Gram matrix, which follows from the
squared distances. So each rule reads the matrix twice, and no power iteration with a random start is needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import lowest, need, need_f
from fedllm_sec.defenses.filters import by_id, mask_of, subsets
from fedllm_sec.defenses.geometric import central_row
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext

ERROR, STEADY = 2e-7, 1e-5  # relative: of distances, more than the kernels', and of caf's weights
EQUAL = 1e-6  # relative; eigenvalues and projections of equal rows differ by rounding, which must not decide a tie


def levelled(values: Tensor) -> Tensor:
    """Values >= 0 (n,) of which those that differ by rounding only are made equal.

    That is `EQUAL` of the value itself, or 1e-12 of the largest, to which small projections are rounded.
    """
    ordered, order = values.sort()
    step = ordered.diff() > EQUAL * ordered[1:] + 1e-12 * ordered[-1]
    run = torch.cat([torch.zeros(1, dtype=torch.long), step.cumsum(0)])
    first = torch.searchsorted(run, run)  # where the run of each begins
    made = torch.empty_like(values)
    made[order] = ordered[first]
    return made


def centred_products(sq_distances: Tensor, weights: Tensor) -> Tensor:
    """<x_i - m, x_j - m> for m = sum_k w_k x_k, weights of sum 1: (..., n, n).

    Only distances enter, so a common part of the rows costs no digits, and a row of weight 0 spoils nothing,
    however far away it is.
    """
    towards = (sq_distances @ weights[..., None])[..., 0]  # (..., n)
    to_mean = towards - (weights * towards).sum(-1, keepdim=True) / 2
    return (to_mean[..., :, None] + to_mean[..., None, :] - sq_distances) / 2


def top_direction(products: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """Largest eigenvalue of sum_i w_i d_i d_i^T and every row's squared projection on it: (), (n,).

    `products` are <d_i, d_j>. With z = sqrt(w) u the eigenvector is sum_i z_i d_i / sqrt(lambda).
    """
    root = weights.sqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * products * root[None])
    largest = float(values[-1].clamp_min(0.0))
    if largest == 0.0:
        return 0.0, torch.zeros_like(weights)
    return largest, (products @ (root * vectors[:, -1])).square() / largest


def outlier_scores(sq_distances: Tensor) -> Tensor:
    """Squared projection of each centred row on the top right singular vector: (n,)."""
    n = len(sq_distances)
    uniform = torch.full((n,), 1.0 / n, dtype=torch.float64)
    products = centred_products(sq_distances, uniform)
    return top_direction(products, torch.ones(n, dtype=torch.float64))[1]


def dnc(
    updates: UpdateMatrix,
    ctx: RoundContext,
    *,
    f: int,
    c: float = 1.0,
    coordinates: int | None = None,
    iterations: int = 1,
) -> Decision:
    """Divide and conquer: the mean without the c f rows that stand out most along the top singular vector.

    Shejwalkar and Houmansadr 2021, algorithm 2: rows are centred, a row's score is its squared projection on
    the top right singular vector, and the int(c f) highest are dropped. The paper draws a random subset of
    coordinates, `iterations` times, and averages the rows that survive every time; that saves memory. Here
    the Gram matrix does, so by default all coordinates count and there is one iteration; set `coordinates`
    for the paper's sample (drawn from the round's generator). If no row survives every draw, those that
    survived most draws are averaged (note `fallback` = 1). Scores are those of the last iteration.
    """
    n = updates.n
    dropped = int(c * f)
    need_f("dnc", n, f, n > dropped, "n > c f clients")
    need(c >= 0, "dnc", "c >= 0", "Raise it.", c=c)
    need(iterations >= 1, "dnc", "iterations >= 1", "Raise it.", iterations=iterations)
    need(
        coordinates is not None or iterations == 1,
        "dnc",
        "one iteration where all coordinates count",
        "Set coordinates.",
        iterations=iterations,
    )
    order = by_id(updates.ids)
    scores = torch.zeros(n, dtype=torch.float64)
    survived = torch.zeros(n, dtype=torch.long)
    for _ in range(iterations):
        if coordinates is None:
            squares = kernels.sq_distances(updates)
        else:
            squares = sampled_distances(updates, ctx.rng, coordinates)
        scores[order] = outlier_scores(squares[order][:, order])
        survived[lowest(levelled(scores), n - dropped, updates.ids)] += 1
    kept = survived == survived.max()
    fallback = int(survived.max()) < iterations
    weights = kept.double() / int(kept.sum())
    return Decision.weighted(updates, weights, kept=kept, scores=scores, notes={"fallback": float(fallback)})


def sampled_distances(updates: UpdateMatrix, rng: torch.Generator, size: int) -> Tensor:
    """Squared distances over `size` random coordinates (all of them if there are fewer): (n, n)."""
    need(size >= 1, "dnc", "coordinates >= 1", "Raise it.", coordinates=size)
    columns = draw_coordinates(updates.d, size, rng)
    total = torch.zeros(updates.n, updates.n, dtype=torch.float64)
    for place, block in updates.blocks():
        wide = block[:, inside(columns, place).to(block.device)].double()
        total += torch.stack([(wide - row).square().sum(1) for row in wide]).cpu()
    return total


def draw_coordinates(d: int, size: int, rng: torch.Generator) -> Tensor:
    """`size` random positions below d in rising order; above 2^20 with replacement, which is cheaper."""
    if size >= d:
        return torch.arange(d)
    if d <= 1 << 20:
        drawn = torch.randperm(d, generator=rng, device=rng.device)[:size]
    else:
        drawn = torch.randint(d, (size,), generator=rng, device=rng.device)
    return drawn.sort().values.cpu()


def inside(columns: Tensor, place: slice) -> Tensor:
    """Those of the rising positions that lie in a block, counted from its start."""
    ends = torch.searchsorted(columns, torch.tensor([place.start, place.stop]))
    found: Tensor = columns[int(ends[0]) : int(ends[1])] - place.start
    return found


def float64_distances(updates: UpdateMatrix) -> Tensor:
    """Squared distances with all products in float64, in two reads: (n, n).

    For iterations that carry the last digits of `kernels.sq_distances` (1e-6 or so) into their result. Rows are
    taken relative to the one with the smallest median distance, so a common part costs nothing.
    """
    gram = kernels.direct_gram(updates, central_row(kernels.sq_distances(updates)))
    own = gram.diagonal()
    return (own[:, None] + own[None] - 2 * gram).clamp_min(0.0).fill_diagonal_(0.0)


def caf_weights(sq_distances: Tensor, f: int) -> tuple[Tensor, int]:
    """The weights of the covariance filter (of sum 1), and the steps it took.

    From c = 1, while sum c > n - 2f: m is the c-weighted mean, tau_i the squared projection of x_i - m on
    the top eigenvector of the weighted covariance, c_i <- c_i (1 - tau_i / max tau). Of all the means met,
    the one with the smallest top eigenvalue wins.
    """
    n = len(sq_distances)
    c = torch.ones(n, dtype=torch.float64)
    best, winner, steps = math.inf, c / n, 0
    while float(c.sum()) > n - 2 * f or steps == 0:
        share = c / c.sum()
        largest, tau = top_direction(centred_products(sq_distances, share), share)
        steps += 1
        if largest < best:
            best, winner = largest, share
        tau = torch.where(c > 0, tau, 0.0)
        if largest == 0.0 or float(tau.max()) == 0.0:
            break
        c = c * (1 - tau / tau.max())
        if float(c.sum()) <= 0.0:
            break
    return winner, steps


def steady_weights(updates: UpdateMatrix, order: Tensor, f: int) -> tuple[Tensor, int]:
    """`caf_weights` of the rows in that order, to `STEADY` of the largest weight.

    The iteration can multiply the errors of the distances. It runs a second time on distances that are off by `ERROR`,
    more than the kernels are; where the answers differ, or rows are mixed, the matrix is read again in float64.
    """
    if updates.picked is not None and updates.products is None:
        squares = kernels.sq_distances(updates)[order][:, order]
        found, steps = caf_weights(squares, f)
        off = torch.rand(squares.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
        other, other_steps = caf_weights(squares * (1 + ERROR * (off + off.T)), f)
        if steps == other_steps and float((found - other).abs().max()) <= STEADY * float(found.max()):
            return found, steps
    return caf_weights(float64_distances(updates)[order][:, order], f)


def caf(updates: UpdateMatrix, ctx: RoundContext, *, f: int) -> Decision:
    """Covariance-bound agnostic filter: row weights that shrink along the direction of largest spread.

    Allouah et al. 2025, algorithm 2 (`caf_weights`), for n >= 2f + 1. With f = 0 the mean. It stops early
    when the rows that still count are all equal. Scores are 1 - w_i / max w. Two reads, where the iteration does not
    multiply the distances' errors too much (`steady_weights`), else four.
    """
    n = updates.n
    need_f("caf", n, f, n >= 2 * f + 1, "n >= 2f + 1 clients")
    order = by_id(updates.ids)
    weights = torch.full((n,), 1.0 / n, dtype=torch.float64)
    steps = 0
    if f > 0:
        weights[order], steps = steady_weights(updates, order, f)
    scores = 1 - weights / weights.max()
    return Decision.weighted(updates, weights, scores=scores, notes={"steps": float(steps)})


def smallest_spread(sq_distances: Tensor, size: int) -> list[int]:
    """The `size` rows whose covariance has the smallest top eigenvalue; every subset is looked at.

    Of several such sets the first one, which holds the lower places.
    """
    uniform = torch.full((size,), 1.0 / size, dtype=torch.float64)
    sets, largest = [], []
    for batch in subsets(len(sq_distances), size, batch=max(1, 4_000_000 // size**2)):
        inner = sq_distances[batch[:, :, None], batch[:, None, :]]  # (b, size, size)
        largest.append(torch.linalg.eigvalsh(centred_products(inner, uniform.expand(len(batch), size)))[:, -1])
        sets.append(batch)
    values = torch.cat(largest)
    smallest = values.min()
    first = int((values <= smallest + EQUAL * smallest.abs()).nonzero()[0])
    members: list[int] = torch.cat(sets)[first].tolist()
    return members


def peel_spread(sq_distances: Tensor, size: int) -> list[int]:
    """Greedy stand-in: drop the row with the largest projection on the top direction, and repeat.

    Of several such rows the one in the last place.
    """
    left = list(range(len(sq_distances)))
    while len(left) > size:
        scores = levelled(outlier_scores(sq_distances[left][:, left]))
        left.pop(int((scores == scores.max()).nonzero()[-1]))
    return left


def smea(updates: UpdateMatrix, ctx: RoundContext, *, f: int, max_subsets: int = 20_000) -> Decision:
    """The mean of the n - f rows whose covariance has the smallest top eigenvalue.

    Smallest maximum eigenvalue averaging (Allouah et al. 2023, "On the privacy-robustness-utility trilemma in
    distributed learning"). Exact while there are at most `max_subsets` sets of n - f rows; with more, f times
    the row with the largest projection on the top direction of those left is dropped (note `exact` = 0).
    """
    n = updates.n
    need_f("smea", n, f, n >= 2 * f + 1, "n >= 2f + 1 clients")
    need(max_subsets >= 1, "smea", "max_subsets >= 1", "Raise it.", max_subsets=max_subsets)
    order = by_id(updates.ids)
    squares = kernels.sq_distances(updates)[order][:, order]
    exact = math.comb(n, f) <= max_subsets
    members = smallest_spread(squares, n - f) if exact else peel_spread(squares, n - f)
    kept = mask_of(order[members], n)
    weights = kept.double() / (n - f)
    return Decision.weighted(updates, weights, kept=kept, notes={"exact": float(exact)})
