"""Means over seeds and differences against a twin, each with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev

from scipy.special import stdtrit

from fedllm_sec.report.measures import Measure

CONFIDENCE = 0.95
NORMAL = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def over_seeds(found: Sequence[Measure], unit: str) -> Measure | None:
    """The mean of one measure over seeds with a 95 % interval; `n` is the number of seeds.

    One seed: the interval of the measure itself (Wilson's, where it is a counted rate). Several: the wider, at each
    end, of Student's t over the seeds and, for counted rates, Wilson's for all their rows together: three seeds that
    agree exactly are not certain. Rates stay in [0, 1]. A mean that is not finite has no interval.
    """
    if not found:
        return None
    if len(found) == 1:
        return Measure(found[0].value, found[0].low, found[0].high, 1, found[0].round)
    middle = mean(m.value for m in found)
    if not math.isfinite(middle):
        return Measure(middle, n=len(found))
    low, high = student([m.value for m in found])
    if all(m.n and m.low is not None for m in found):
        rows = sum(m.n or 0 for m in found)
        pooled = wilson(sum(m.value * (m.n or 0) for m in found) / rows, rows)
        low, high = min(low, *pooled), max(high, *pooled)
    if unit in ("rate", "percent"):
        low, high = max(0.0, low), min(1.0, high)
    return Measure(middle, low, high, len(found))


def student(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of Student's t for the mean of two values or more."""
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a rate p of n."""
    shrink = 1 + NORMAL**2 / n
    half = NORMAL * math.sqrt(max(0.0, p * (1 - p)) / n + NORMAL**2 / (4 * n * n)) / shrink
    return (p + NORMAL**2 / (2 * n)) / shrink - half, (p + NORMAL**2 / (2 * n)) / shrink + half


def difference(pairs: Sequence[tuple[Measure, Measure]]) -> Measure | None:
    """Mean of first minus second over the seeds, with a 95 % interval; `n` is the number of seeds.

    The wider, at each end, of Student's t over the paired differences (two seeds or more) and Newcombe's interval
    (1998, method 10) for the difference of two counted rates, here of the means over the seeds.
    """
    if not pairs:
        return None
    gaps = [a.value - b.value for a, b in pairs]
    middle = mean(gaps)
    if not math.isfinite(middle):
        return Measure(middle, n=len(pairs))
    lows, highs = [], []
    if len(pairs) > 1:
        low, high = student(gaps)
        lows, highs = [low], [high]
    a, b = (over_seeds([pair[side] for pair in pairs], "rate") for side in (0, 1))
    counted = all(m.low is not None and m.high is not None and m.n for pair in pairs for m in pair)
    if counted and a is not None and b is not None and None not in (a.low, a.high, b.low, b.high):
        lows.append(middle - math.hypot(a.value - a.low, b.high - b.value))  # type: ignore[operator]
        highs.append(middle + math.hypot(a.high - a.value, b.value - b.low))  # type: ignore[operator]
    return Measure(middle, min(lows, default=None), max(highs, default=None), len(pairs))
