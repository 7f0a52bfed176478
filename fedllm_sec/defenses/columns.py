"""Rules that treat each coordinate by itself, and the plain mean."""

from __future__ import annotations

import math
from typing import Literal

import torch

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import lowest, need, need_f
from fedllm_sec.defenses.claims import capped_count, row_weights
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext


def mean(
    updates: UpdateMatrix,
    ctx: RoundContext,
    *,
    weights: Literal["uniform", "counts"] = "counts",
    cap: float = 3.0,
) -> Decision:
    """The mean of all rows, weighted by claimed example counts (`counts`) or not (`uniform`).

    McMahan et al. 2017, algorithm 1. A claim counts for at most `cap` times the median claim (note
    `capped_claims`: how many were cut): the paper trusts them.
    """
    shares = row_weights(updates.counts, weights, cap, "mean")
    notes = {"capped_claims": float(capped_count(updates.counts, cap))} if weights == "counts" else {}
    return Decision.weighted(updates, shares, notes=notes)


def median(updates: UpdateMatrix, ctx: RoundContext) -> Decision:
    """Coordinate-wise median, the middle of the two for even n (Yin et al. 2018, definition 1)."""
    return Decision(kernels.median(updates))


def trim_count(rule: str, n: int, f: int | None, beta: float | None) -> int:
    """How many values to drop at each end: f itself, or floor(beta n)."""
    one = (f is None) != (beta is None)
    need(one, rule, "either f or beta", "Set exactly one of them.", f=f, beta=beta)
    if f is not None:
        need_f(rule, n, f, n > 2 * f, "n > 2f clients")
        return f
    assert beta is not None
    need(0 <= beta < 0.5, rule, "0 <= beta < 1/2", "Lower beta.", beta=beta)
    return math.floor(beta * n + 1e-9)  # 0.29 * 100 is 28.999999999999996


def trimmed_mean(
    updates: UpdateMatrix, ctx: RoundContext, *, f: int | None = None, beta: float | None = None
) -> Decision:
    """Per coordinate, the mean without the f smallest and f largest values (Yin et al. 2018, definition 2).

    Set `f`, or `beta` as the fraction of rows to drop at each end (the paper's parameter). Needs n > 2f.
    """
    return Decision(kernels.trimmed_mean(updates, trim_count("trimmed_mean", updates.n, f, beta)))


def slsgd(
    updates: UpdateMatrix,
    ctx: RoundContext,
    *,
    option: Literal[1, 2] = 2,
    f: int | None = None,
    alpha: float = 0.8,
) -> Decision:
    """Moving average (1 - alpha) x_t + alpha x_new, x_new by the trimmed mean (option 2) or the mean (1).

    Xie et al. 2020, algorithm 1; `f` is the paper's b, the number trimmed at each end, and is needed for
    option 2. On deltas the moving average is a factor alpha. The paper lowers alpha over time; here it is
    constant.
    """
    need(0 < alpha <= 1, "slsgd", "0 < alpha <= 1", "Choose alpha in that range.", alpha=alpha)
    if option == 1:
        uniform = torch.full((updates.n,), 1.0 / updates.n, dtype=torch.float64)
        return Decision.weighted(updates, alpha * uniform)
    need(f is not None, "slsgd", "f, the number trimmed at each end, for option 2", "Set f, or option to 1.", f=f)
    return Decision(alpha * kernels.trimmed_mean(updates, trim_count("slsgd", updates.n, f, None)))


def robust_learning_rate(updates: UpdateMatrix, ctx: RoundContext, *, theta: float) -> Decision:
    """The mean, with its sign turned where fewer than `theta` net sign votes agree on a coordinate.

    Ozdayi et al. 2021: the learning rate of a coordinate is +1 if |sum_i sign(x_i)| >= theta, else
    -1. The paper sets theta above the number of attackers (4 of 10 clients with one attacker). Uniform
    weights.
    """
    need(
        0 <= theta <= updates.n,
        "robust_learning_rate",
        "0 <= theta <= n",
        "Change theta.",
        theta=theta,
        n=updates.n,
    )
    if (fast := kernels.for_rules(updates)) is not None:
        turned, flipped = fast.turned_mean(updates, theta)
        return Decision(turned, notes={"flipped_share": flipped / updates.d})
    agreed = kernels.sign_sums(updates).abs() >= theta
    uniform = torch.full((updates.n,), 1.0 / updates.n, dtype=torch.float64)
    average = kernels.combine(updates, uniform)
    update = torch.where(agreed, average, -average)
    return Decision(update, notes={"flipped_share": 1.0 - float(agreed.double().mean())})


NEAR = 1e-6  # relative: scores that differ by less are equal but for rounding


def foundationfl(updates: UpdateMatrix, ctx: RoundContext, *, m: int | None = None, f: int | None = None) -> Decision:
    """Median (with `f` the trimmed mean) of the rows and of `m` copies of the row farthest from both extremes.

    Fang et al. 2025 (FoundationFL, NDSS). A row's score is the smaller of its distances to the coordinate-wise maximum
    and to the coordinate-wise minimum of all rows; the row of the largest score is added m times, and of the n + m rows
    the coordinate-wise median is taken, or the trimmed mean without the f smallest and f largest values.

    Stated here: m is half of the rows, rounded up, unless set; scores within 1e-6 of the largest are equal, and the
    smallest client id of these is copied. Two rows on both extremes make a third between them, of mixed signs, the one
    that is copied: attackers then count for m rows more (docs/defenses_more.md). Scores are the largest minus
    the row's. Four reads: both extremes, distances to them, and the statistic.
    """
    n = updates.n
    copies = math.ceil(n / 2) if m is None else m
    need(copies >= 0, "foundationfl", "m >= 0 synthetic rows", "Raise m.", m=m)
    if f is not None:
        need_f("foundationfl", n, f, n + copies > 2 * f, "n + m > 2f rows")
    extremes = torch.stack([kernels.kth_value(updates, n - 1), kernels.kth_value(updates, 0)])
    distances = kernels.sq_distances(updates, extra=extremes)[:n, n:].amin(dim=1).sqrt()
    farthest = distances.max()
    beaten = (distances < (1 - NEAR) * farthest).double()
    copied = lowest(beaten, 1, updates.ids)[0]
    more = updates.select([*range(n), *[copied] * copies])
    update = kernels.median(more) if f is None else kernels.trimmed_mean(more, f)
    return Decision(update, scores=farthest - distances)
