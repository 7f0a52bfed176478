"""Means over seeds and differences against a twin, each with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev

from scipy.special import stdtrit

from fedllm_sec.report.measures import Measure

CONFIDENCE = 0.95
NORMAL = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def over_seeds(found: Sequence[Measure], unit: str, least: float = -math.inf) -> Measure | None:
    """The mean of one measure over seeds with a 95 % interval; `n` is the number of seeds.

    One seed: the interval of the measure itself (Wilson's, where it is a counted rate). Several: the wider, at each
    end, of Student's t over the seeds and, for counted rates, Wilson's for all their rows together: three seeds that
    agree exactly are not certain. Rates stay in [0, 1], others at or above `least`. A mean that is not finite has no
    interval.
    """
    if not found:
        return None
    if len(found) == 1:
        return Measure(found[0].value, found[0].low, found[0].high, 1, found[0].round)
    middle = mean(m.value for m in found)
    if not math.isfinite(middle):
        return Measure(middle, n=len(found))
    low, high = student([m.value for m in found])
    if all(counted(m) for m in found):
        _, *limits = pooled(found)
        low, high = min(low, *limits), max(high, *limits)
    low = max(low, 0.0 if unit in ("rate", "percent") else least)
    high = min(high, 1.0) if unit in ("rate", "percent") else high
    return Measure(middle, low, high, len(found))


def counted(m: Measure) -> bool:
    """Whether it is a rate of counted rows."""
    return bool(m.n) and m.low is not None and m.high is not None


def pooled(found: Sequence[Measure]) -> tuple[float, float, float]:
    """The rate of all rows together, and Wilson's limits of it; one rate keeps its own."""
    if len(found) == 1 and found[0].low is not None and found[0].high is not None:
        return found[0].value, found[0].low, found[0].high
    rows = sum(m.n or 0 for m in found)
    rate = sum(m.value * (m.n or 0) for m in found) / rows
    return rate, *wilson(rate, rows)


def student(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of Student's t for the mean of two values or more."""
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a rate p of n."""
    shrink = 1 + NORMAL**2 / n
    half = NORMAL * math.sqrt(max(0.0, p * (1 - p)) / n + NORMAL**2 / (4 * n * n)) / shrink
    return (p + NORMAL**2 / (2 * n)) / shrink - half, (p + NORMAL**2 / (2 * n)) / shrink + half


DIFFERENCE = (1, -1)
ROUNDING = 12  # decimals: differences of rates that are equal on paper are equal here


def difference(
    rows: Sequence[Sequence[Measure]], unit: str = "rate", signs: Sequence[int] = DIFFERENCE
) -> Measure | None:
    """Mean over the seeds of first minus second, with a 95 % interval; `n` is the number of seeds.

    The wider, at each end, of Student's t over the paired differences (two seeds or more) and Newcombe's interval
    (1998, method 10) for the difference of two counted rates, from Wilson's limits of the rows of all seeds together:
    what seeds differ in, both sides of a pair share. `signs` (1, -1, -1, 1) is a difference of two differences, for
    which Newcombe's square-and-add holds in the same way (Zou and Donner 2008). A difference of rates stays within
    what it can be: [-1, 1] for two, [-2, 2] for four.
    """
    if not rows:
        return None
    gaps = [_signed(row, signs) for row in rows]
    middle = mean(gaps)
    if not math.isfinite(middle):
        return Measure(middle, n=len(rows))
    lows, highs = [], []
    if len(rows) > 1:
        low, high = student(gaps)
        lows, highs = [low], [high]
    if all(counted(m) for row in rows for m in row):
        sides = [(sign, *pooled([row[place] for row in rows])) for place, sign in enumerate(signs)]
        lows.append(middle - math.hypot(*(rate - low if sign > 0 else high - rate for sign, rate, low, high in sides)))
        highs.append(middle + math.hypot(*(high - rate if sign > 0 else rate - low for sign, rate, low, high in sides)))
    if not lows:
        return Measure(middle, n=len(rows))
    low, high = min(lows), max(highs)
    if unit in ("rate", "percent"):
        most = len(signs) / 2
        low, high = max(low, -most), min(high, most)
    return Measure(middle, low, high, len(rows))


def _signed(row: Sequence[Measure], signs: Sequence[int]) -> float:
    added, taken = _sides(row, signs)
    return round(added - taken, ROUNDING)


def _sides(row: Sequence[Measure], signs: Sequence[int]) -> tuple[float, float]:
    """What is added and what is taken away."""
    given = list(zip(row, signs, strict=True))
    return sum(m.value for m, sign in given if sign > 0), sum(m.value for m, sign in given if sign < 0)


def told_apart(rows: Sequence[Sequence[Measure]], unit: str = "rate", signs: Sequence[int] = DIFFERENCE) -> bool:
    """Whether two sides differ by more than their difference's interval; equal ones never do.

    Where there is no interval, as for one loss against another, any difference counts.
    """
    sides = [_sides(row, signs) for row in rows]
    if all(a == b or (math.isnan(a) and math.isnan(b)) or round(a - b, ROUNDING) == 0 for a, b in sides):
        return False
    gap = difference(rows, unit, signs)
    return gap is None or gap.low is None or gap.high is None or not gap.low <= 0.0 <= gap.high
