"""Rows hidden in the spread of the honest ones: ALIE, IPM, Min-Max, Min-Sum, and a search against a known
rule.

Each attack reads the honest rows once: mean, deviation, distances and the perturbation all come from one
stream.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from torch import Tensor

from fedllm_sec.attacks.update.columns import Perturbation, Scatter, columns, scatter
from fedllm_sec.attacks.update.search import known_rule, strongest
from fedllm_sec.attacks.update.sight import honest_rows, repeat
from fedllm_sec.attacks.update.simple import need_positive
from fedllm_sec.attacks.update.weights import Weighing, row_weights
from fedllm_sec.errors import CohortError
from fedllm_sec.protocols import ThreatView


def alie_z(n: int, m: int) -> float:
    """The z of Baruch et al. 2019, algorithm 3: the (n - m - s) / (n - m) quantile, s = floor(n/2 + 1) - m.

    s honest clients must be farther out than the attackers for these to be in the majority.
    """
    supporters = n // 2 + 1 - m
    if supporters <= 0 or n - m <= 0:
        raise CohortError(
            f"alie: with m={m} of n={n} the attackers are a majority by themselves and z has no bound. Set alie.z."
        )
    share = (n - m - supporters) / (n - m)
    return NormalDist().inv_cdf(share) if share > 0 else -math.inf


def alie(
    view: ThreatView,
    *,
    z: float | Literal["optimise"] | None = None,
    direction: Literal["minus", "plus"] = "minus",
    partial: bool = False,
) -> Tensor:
    """A little is enough: all attackers send mean -/+ z * std, per coordinate (Baruch et al. 2019, sec. 3).

    z None takes the paper's quantile `alie_z`; it warns where that is not positive, because then nothing is
    hurt (10 clients with 2 attackers give z = 0). "optimise" searches z against the known rule (at most 20
    evaluations). Mean and population std are those of the honest rows, or with `partial` of the attackers'
    own benign rows, as in the paper.
    """
    rows = honest_rows(view, "alie", partial=partial)
    m = len(view.own)
    if partial and m < 2:
        raise CohortError(
            "alie.partial: one attacker has one row and no deviation. Needs 2 attackers, or partial: false."
        )
    seen = columns(rows, deviation=True)
    mean, deviation = seen.mean, seen.deviation
    if not bool(deviation.any()):
        warnings.warn(
            "alie: the rows it sees are all alike, so there is no deviation to hide in: a no-op.", stacklevel=2
        )
    sign = -1.0 if direction == "minus" else 1.0
    if z == "optimise":
        best = strongest(view, "alie", lambda s: mean + sign * s * deviation, mean, first=0.125)
        return repeat(mean + sign * best * deviation, m)
    strength = alie_z(view.cohort_size, m) if z is None else z
    if not strength > 0:
        warnings.warn(
            f"alie: z = {strength:.3g} with {m} attackers of {view.cohort_size} clients: the attackers send the honest "
            "mean or less, a no-op. Set alie.z or add attackers.",
            stacklevel=2,
        )
        strength = 0.0 if z is None else strength
    return repeat(mean.add_(deviation, alpha=sign * strength), m)


def ipm(
    view: ThreatView,
    *,
    epsilon: float | Literal["optimise"] | None = None,
    partial: bool = False,
    weights: Weighing = "counts",
) -> Tensor:
    """Inner product manipulation: all attackers send -epsilon * mean of the honest rows (Xie et al. 2020, sec. 3).

    None takes 1.1 times the weight of all other rows over that of the attackers' in the server's mean, 1.1 (n - m) / m
    where weights are equal: a tenth above where that mean's inner product with the honest mean turns negative (theorem
    1 there; to a few percent where honest clients of more weight send other rows). `weights` are those of the rule
    `mean`: `counts`, capped claims (what is not granted of them is assumed, see docs/attacks.md), or `uniform`. Below 1
    the rows are hard to tell by length, which is the setting against median and Krum. "optimise" searches epsilon
    against the known rule.
    """
    rows = honest_rows(view, "ipm", partial=partial)
    m = len(view.own)
    mean = columns(rows).mean
    if epsilon == "optimise":
        best = strongest(view, "ipm", lambda s: mean * -s, mean, first=0.125)
        return repeat(mean * -best, m)
    if epsilon is None:
        known = row_weights(view, weights, "ipm")
        epsilon = 1.1 * max(known.others, float(known.own.min())) / float(known.own.sum())
    need_positive(epsilon, "ipm.epsilon")
    return repeat(mean.mul_(-epsilon), m)


@dataclass(frozen=True)
class Spread:
    """How honest rows x_i lie around their mean, and along a direction p to leave the mean by."""

    mean: Tensor  # (d,) float32
    direction: Tensor  # (d,) float32, p
    between: Tensor  # (h, h) float64, ||x_i - x_j||^2
    from_mean: Tensor  # (h,) float64, ||x_i - mean||^2
    dots: Tensor  # (h,) float64, <x_i - mean, p>
    square: float  # ||p||^2

    def from_forged(self, gamma: float) -> Tensor:
        """||mean + gamma p - x_i||^2: (h,)."""
        return gamma**2 * self.square - 2 * gamma * self.dots + self.from_mean


def spread(rows: Tensor, perturbation: Perturbation) -> Spread:
    """One read of rows (h, d). p is -mean / ||mean|| (unit), -sign(mean), or -std (population)."""
    seen = scatter(rows, perturbation)
    return spread_of(seen, len(rows), seen.gram[-1, -1].item() if perturbation == "unit" else 1.0)


def spread_of(seen: Scatter, h: int, square: float = 1.0) -> Spread:
    """Distances from inner products; the direction is divided by the root of `square`, if that is positive."""
    gram, scale = seen.gram, square**-0.5 if square > 0 else 0.0
    direction = seen.direction if scale == 1.0 else seen.direction * scale
    from_mean = gram.diagonal()[:h]
    between = (from_mean[:, None] + from_mean[None] - 2 * gram[:h, :h]).clamp_min(0).fill_diagonal_(0)
    return Spread(seen.mean, direction, between, from_mean, gram[:h, h] * scale, float(gram[h, h]) * scale**2)


def largest(holds: Callable[[float], bool], start: float) -> float:
    """The largest gamma that still holds, by doubling from `start` and then bisection; the last success
    returned.
    """
    good, bad = 0.0, start
    while holds(bad) and bad < 1e30 * start:
        good, bad = bad, 2 * bad
    for _ in range(60):
        middle = (good + bad) / 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good


def _pushed(view: ThreatView, name: str, rows: Tensor, perturbation: Perturbation, *, total: bool) -> Tensor:
    """mean + gamma p with the largest gamma at which the forged row is no farther out than an honest one."""
    seen = spread(rows, perturbation)
    between = seen.between
    bound = float(between.sum(1).max() if total else between.max())
    if bound <= 0 or seen.square <= 0:
        warnings.warn(
            f"{name}: the honest rows are all alike or their mean is zero, so there is no room: a no-op.", stacklevel=3
        )
        return repeat(seen.mean, len(view.own))

    def hidden(gamma: float) -> bool:
        away = seen.from_forged(gamma)
        return float(away.sum() if total else away.max()) <= bound

    gamma = largest(hidden, math.sqrt(bound / seen.square / 4))
    return repeat(seen.mean + gamma * seen.direction, len(view.own))


def min_max(view: ThreatView, *, perturbation: Perturbation = "std", partial: bool = False) -> Tensor:
    """mean + gamma p, at most as far from any honest row as two honest rows are from each other.

    gamma is the largest with max_i ||mean + gamma p - x_i|| <= max_ij ||x_i - x_j|| (Shejwalkar and
    Houmansadr 2021, sec. 4.2, unknown rule). p: `unit` -mean/||mean||, `sign` -sign(mean), `std` -std.
    Deviation: gamma is found by bisection on distances that follow from one Gram pass, to float64
    precision, instead of the paper's halving steps from 10; the last success is returned. `partial` takes
    the attackers' own rows for the honest ones.
    """
    return _pushed(view, "min_max", honest_rows(view, "min_max", partial=partial), perturbation, total=False)


def min_sum(view: ThreatView, *, perturbation: Perturbation = "std", partial: bool = False) -> Tensor:
    """mean + gamma p whose squared distances to all honest rows sum up to no more than any honest row's do.

    gamma is the largest with sum_i ||mean + gamma p - x_i||^2 <= max_i sum_j ||x_i - x_j||^2 (Shejwalkar and
    Houmansadr 2021, sec. 4.2). Settings and search as in `min_max`.
    """
    return _pushed(view, "min_sum", honest_rows(view, "min_sum", partial=partial), perturbation, total=True)


def tailored(view: ThreatView, *, perturbation: Perturbation = "std", evaluations: int = 20) -> Tensor:
    """mean + gamma p with gamma searched against the very rule of the recipe (Shejwalkar and Houmansadr
    2021, sec. 4.1).

    Maximises ||rule(all rows) - honest mean||, with at most `evaluations` calls of the rule. Strengths are
    tried in units of the largest honest distance over ||p||.
    """
    rows = known_rule(view, "tailored")[1]
    seen = spread(rows, perturbation)
    unit = math.sqrt(float(seen.between.max()) / seen.square) if seen.square > 0 else 0.0
    if unit <= 0:
        warnings.warn("tailored: the honest rows are all alike or their mean is zero: a no-op.", stacklevel=2)
        return repeat(seen.mean, len(view.own))

    def row_at(strength: float) -> Tensor:
        return seen.mean + strength * unit * seen.direction

    best = strongest(view, "tailored", row_at, seen.mean, first=1 / 16, evaluations=evaluations)
    return repeat(row_at(best), len(view.own))
