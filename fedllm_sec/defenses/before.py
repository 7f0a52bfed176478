"""Before the rule: rows to rows. All but the noise are lazy row mixes W @ rows and copy nothing."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import bucket_matrix, need, need_f, random_order
from fedllm_sec.defenses.noise import each_value, note_noise
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import RoundContext


def clip_factors(norms: Tensor, radius: float) -> Tensor:
    """min(1, radius / norm) for norms (n,); a row of zeros has factor 1."""
    return torch.where(norms > radius, radius / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)


def norm_clipping(
    updates: UpdateMatrix, ctx: RoundContext, *, radius: float | Literal["median"] = "median"
) -> UpdateMatrix:
    """Scale rows longer than `radius` down to it; `median` is the median length of this round's rows.

    x_i * min(1, R / ||x_i||) (Sun et al. 2019). The paper's R is a number; the median is our
    default because a fixed R means nothing without knowing the deltas' scale.
    """
    norms = kernels.row_norms(updates)
    if radius == "median":
        limit = float(torch.quantile(norms, 0.5))
    else:
        need(radius > 0 and math.isfinite(radius), "norm_clipping", "radius > 0", "Use median.", radius=radius)
        limit = radius
    return updates.mix(torch.diag(clip_factors(norms, limit)))


def neighbour_matrix(sq_distances: Tensor, f: int) -> Tensor:
    """(n, n) matrix that averages each row with its n - f nearest rows, itself included."""
    n = len(sq_distances)
    own_first = sq_distances.clone()
    own_first.fill_diagonal_(-1.0)
    nearest = own_first.argsort(dim=1, stable=True)[:, : n - f]
    return torch.zeros_like(sq_distances).scatter_(1, nearest, 1.0 / (n - f))


def nnm(updates: UpdateMatrix, ctx: RoundContext, *, f: int) -> UpdateMatrix:
    """Nearest-neighbour mixing: each row becomes the mean of its n - f nearest rows, itself included.

    Allouah et al. 2023. Needs n > f; the rule after it keeps its f.
    """
    need_f("nnm", updates.n, f, updates.n > f, "n > f clients")
    return updates.mix(neighbour_matrix(kernels.sq_distances(updates), f))


def bucketing(updates: UpdateMatrix, ctx: RoundContext, *, s: int = 2) -> UpdateMatrix:
    """Means of `s` randomly grouped rows; a short last bucket is kept (Karimireddy et al. 2022, algorithm 1).

    The rule after it sees ceil(n / s) rows of which up to f can be spoilt: set its f for that number of
    rows. A bucket claims the examples of all its clients. The permutation is drawn over client ids, so it does not
    depend on the order of the rows; a rule that remembers clients by id cannot follow, since buckets are none.
    """
    need(s >= 1, "bucketing", "s >= 1 rows in a bucket", "Raise s.", s=s)
    matrix = bucket_matrix(random_order(updates, ctx.rng), s)
    return updates.mix(matrix, ids=[f"bucket{i}" for i in range(len(matrix))])


def arc_factors(norms: Tensor, f: int) -> Tensor:
    """Factors that clip the floor(2 (f / n) (n - f)) largest norms to the next one below them."""
    n = len(norms)
    k = (2 * f * (n - f)) // n
    if k == 0:
        return torch.ones_like(norms)
    limit = float(norms.sort(descending=True).values[min(k, n - 1)])
    return clip_factors(norms, limit)


def arc(updates: UpdateMatrix, ctx: RoundContext, *, f: int) -> UpdateMatrix:
    """Adaptive robust clipping: the k = floor(2 (f / n) (n - f)) longest rows are cut to the next length.

    Allouah et al. 2025. Needs n > 2f.
    """
    need_f("arc", updates.n, f, updates.n > 2 * f, "n > 2f clients")
    return updates.mix(torch.diag(arc_factors(kernels.row_norms(updates), f)))


def weak_dp_client(
    updates: UpdateMatrix,
    ctx: RoundContext,
    *,
    radius: float | Literal["median"] = "median",
    sigma: float = 0.01,
    absolute: bool = False,
) -> UpdateMatrix:
    """Clip each row to C = `radius`, then add noise of the expected length `sigma` * C to it (Sun et al. 2019).

    With `absolute` it is N(0, (sigma C)^2) on each value, of length sigma C sqrt(d): with a number for `radius` each
    row is then the Gaussian mechanism with noise multiplier `sigma`; with `median` C is taken from the data and no
    (epsilon, delta) follows. Note `weak_dp_client_noise_to_step`: what is left of the noise in the mean of the rows,
    beside that mean. The noise makes a new (n, d) matrix: the one step before the rule that copies the rows. It is
    drawn per client in the order of client ids.
    """
    good = sigma >= 0 and math.isfinite(sigma)
    need(good, "weak_dp_client", "sigma >= 0", "Set sigma to 0 or more.", sigma=sigma)
    clipped = norm_clipping(updates, ctx, radius=radius)
    limit = float(torch.quantile(kernels.row_norms(updates), 0.5)) if radius == "median" else radius
    rows = torch.empty(updates.n, updates.d, device=updates.compute_device)
    for place, block in clipped.blocks():
        rows[:, place] = block.to(rows)
    std = each_value(sigma, limit, updates.d, absolute)
    step = float(torch.linalg.vector_norm(rows.mean(0), dtype=torch.float64))
    length = std * math.sqrt(updates.d / updates.n)
    note_noise(ctx, "weak_dp_client", length, step, "Lower sigma, or leave `absolute` out.")
    for i in sorted(range(updates.n), key=lambda i: updates.ids[i]):
        noise = torch.randn(updates.d, generator=ctx.rng, device=ctx.rng.device)
        rows[i].add_(noise.to(rows), alpha=std)
    return UpdateMatrix.of(
        rows, ids=updates.ids, counts=updates.counts, layout=updates.layout, chunk_mb=updates.chunk_mb
    )
