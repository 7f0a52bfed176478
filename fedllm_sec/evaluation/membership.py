"""How well scores tell rows that were trained on from others: the area under the ROC, and what is found at few false
alarms. Higher scores mean members."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm_sec.errors import FedError

Scores = NDArray[np.float64]
RESAMPLES = 1000
POINTS = 200  # of a curve that is kept


def auc(members: Scores, others: Scores) -> float:
    """The chance that a member scores higher than another row, ties counting half (Mann and Whitney 1947)."""
    _need(members, others)
    ranked = np.sort(others)
    below = np.searchsorted(ranked, members, "left") + np.searchsorted(ranked, members, "right")
    return float(below.sum() / (2 * len(members) * len(others)))


def tpr_at(members: Scores, others: Scores, fpr: float = 0.01) -> float:
    """The share of members above a threshold that at most the share `fpr` of the others is above.

    With n others, floor(fpr n) of them may be above: below 1 / fpr others, none.
    """
    _need(members, others)
    allowed = math.floor(fpr * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -np.inf
    return float((members > threshold).mean())


def roc(members: Scores, others: Scores) -> list[tuple[float, float]]:
    """The curve (share of others, share of members) above each threshold, from (0, 0) to (1, 1)."""
    _need(members, others)
    both = np.concatenate([members, others])
    thresholds = np.unique(both)[::-1]
    if len(thresholds) > POINTS:
        thresholds = thresholds[np.unique(np.linspace(0, len(thresholds) - 1, POINTS).round().astype(int))]
    found = [(0.0, 0.0)]
    found += [(float((others >= t).mean()), float((members >= t).mean())) for t in thresholds]
    return found


@dataclass(frozen=True)
class Told:
    """AUC and TPR at 1 % FPR of one observation, each with its values in bootstrap resamples of the rows."""

    auc: float
    tpr: float
    aucs: Scores  # (resamples,)
    tprs: Scores
    curve: list[tuple[float, float]]
    members: int
    others: int


def told_apart(members: Scores, others: Scores) -> Told:
    """Both measures, members and others resampled apart, from a fixed seed (Efron and Tibshirani 1993, ch. 13)."""
    rng = np.random.default_rng(0)
    aucs, tprs = np.empty(RESAMPLES), np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        m, o = (rows[rng.integers(len(rows), size=len(rows))] for rows in (members, others))
        aucs[i], tprs[i] = auc(m, o), tpr_at(m, o)
    return Told(
        auc(members, others), tpr_at(members, others), aucs, tprs, roc(members, others), len(members), len(others)
    )


def _need(members: Scores, others: Scores) -> None:
    for name, rows in (("members", members), ("others", others)):
        if len(rows) == 0:
            raise FedError(f"membership: no {name}, so there is nothing to tell apart. Give at least one row of both.")
        if not np.isfinite(rows).all():
            raise FedError(f"membership: the scores of some {name} are not finite. Observe another client.")
