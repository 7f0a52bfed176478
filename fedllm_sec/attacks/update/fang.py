"""Attacks made for one rule: Krum, or the trimmed mean and the median (Fang et al. 2020)."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from fedllm_sec.attacks.update.columns import between, beyond, columns, scatter
from fedllm_sec.attacks.update.sight import honest_rows, repeat, uniform
from fedllm_sec.attacks.update.spread import spread_of
from fedllm_sec.errors import AttackError, CohortError
from fedllm_sec.protocols import ThreatView


def fang(
    view: ThreatView,
    *,
    against: Literal["krum", "trimmed_mean"] = "krum",
    b: float = 2.0,
    partial: bool = False,
) -> Tensor:
    """The directed deviation: move every coordinate against the direction in which the honest rows move it.

    `krum`: all attackers send -lambda * sign(honest mean), lambda halved from the paper's upper bound until
    Krum would choose it (Fang et al. 2020, sec. 4.2). `trimmed_mean`, also good against the median: per
    coordinate values just beyond the honest minimum or maximum, drawn between it and its b-fold (sec. 4.3).
    `partial` knows only what the attackers themselves trained (sec. 4.2 and 4.3, partial knowledge).
    Deviations: the paper forges weights, we forge updates, so the round's start is 0; colluders against
    Krum send equal rows, not rows a hair apart; against the trimmed mean the m values of a coordinate are
    one uniform draw shifted by k/m, each of them uniform.
    """
    rows = honest_rows(view, "fang", partial=partial)
    if partial and len(rows) < 2:
        raise CohortError("fang.partial: one attacker has one row and no spread. Needs 2 attackers, or partial: false.")
    if against == "krum":
        return _against_krum(view, rows, partial)
    if b <= 1:
        raise AttackError(f"fang.b: {b}: must be above 1.")
    return _against_trimmed_mean(view, rows, b, partial)


def krum_would_take(between: Tensor, to_forged: Tensor, copies: int, neighbours: int) -> bool:
    """Whether Krum's lowest score is the forged rows', for squared distances (h, h) and (h,).

    A forged row has `copies - 1` others at distance 0.
    """
    h = len(to_forged)
    others = between + torch.diag(torch.full((h,), math.inf, dtype=between.dtype))
    everyone = torch.cat([others, to_forged[:, None].expand(h, copies)], dim=1)
    honest = everyone.sort(dim=1).values[:, :neighbours].sum(1).min()
    zeros = torch.zeros(copies - 1, dtype=to_forged.dtype)
    forged = torch.cat([zeros, to_forged]).sort().values[:neighbours].sum()
    return bool(forged < honest)


def _against_krum(view: ThreatView, rows: Tensor, partial: bool) -> Tensor:
    h, d = rows.shape
    scattered = scatter(rows, "sign", with_mean=True)  # p = -sign(mean): the forged row is lambda * p
    seen, gram = spread_of(scattered, h), scattered.gram
    m, between = len(view.own), seen.between

    lengths = (seen.from_mean + 2 * gram[:h, -1] + gram[-1, -1]).clamp_min(0)  # ||x_i||^2

    def to_forged(strength: float) -> Tensor:
        """||strength * p - x_i||^2: (h,)."""
        dots = seen.dots + gram[h, -1]
        return (lengths - 2 * strength * dots + strength**2 * seen.square).clamp_min(0)

    n = h + m
    ranked = between.sort(dim=1).values  # the first is the row itself
    nearest = float(ranked[:, 1 : max(2, n - m - 1)].sum(1).min())
    bound = math.sqrt(nearest / (max(1, n - 2 * m - 1) * d)) + math.sqrt(float(lengths.max()) / d)
    if bound <= 0 or seen.square <= 0:
        warnings.warn("fang: the honest rows are all zero, so there is no direction: a no-op.", stacklevel=3)
        return torch.zeros_like(view.own, dtype=torch.float32)
    # partial: the attackers' own rows stand for the honest ones; one forged row more is tried each time it fails
    for copies in range(1, m + 1) if partial else [m]:
        neighbours = max(1, h + copies - (copies if partial else m) - 2)
        strength = bound
        while strength >= 1e-5 * bound:
            if krum_would_take(between, to_forged(strength), copies, neighbours):
                return repeat(strength * seen.direction, m)
            strength /= 2
    warnings.warn(
        f"fang: found no strength at which Krum would choose the forged rows ({m} attackers of "
        f"{view.cohort_size} clients); the weakest one is sent.",
        stacklevel=3,
    )
    return repeat(1e-5 * bound * seen.direction, m)


def _against_trimmed_mean(view: ThreatView, rows: Tensor, b: float, partial: bool) -> Tensor:
    m, d = view.own.shape
    drawn = uniform(1, d, view.rng, rows.device)[0]
    if not partial:  # away from the honest direction
        return beyond(rows, b, drawn, m)
    seen = columns(rows, deviation=True)  # between 3 and 4 deviations beyond the mean
    step = seen.mean.sign().neg_().mul_(seen.deviation)
    return between(torch.add(seen.mean, step, alpha=3), step, drawn, m)
