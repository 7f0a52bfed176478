"""How far attackers moved the aggregate, and how much their rows stand out. Only evaluation may know who they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.errors import DefenseError
from fedllm_sec.evaluation.detection import auc
from fedllm_sec.matrix import UpdateMatrix


def measure_rows(updates: UpdateMatrix, update: Tensor, malicious: Collection[str]) -> dict[str, Any]:
    """{"robustness", "stealth"} of one round, from one pass over the rows as the defense was given them.

    `update` (d,) is what the defense made of them. Each is None where it cannot be said: nobody malicious among the
    rows, fewer than two honest rows, an update that is not finite.
    """
    bad = [id in malicious for id in updates.ids]
    if not any(bad) or all(bad):
        return {"robustness": None, "stealth": None}
    finite = bool(update.isfinite().all())
    known = kernels.geometry(updates, update if finite else None)
    good = [i for i, is_bad in enumerate(bad) if not is_bad]
    ratio = robustness_ratio(known.sq_distances[good][:, [*good, updates.n]]) if finite else None
    return {"robustness": ratio, "stealth": stealth(known.gram[: updates.n, : updates.n], bad)}


def robustness_ratio(sq_distances: Tensor) -> float | None:
    """||z - mean||^2 / variance of the honest rows x_i: 0 is their mean, 1 as far off as an honest row is on average.

    `sq_distances` (h, h + 1) holds the squared distances from each honest row to all honest rows and, in the last
    column, to the aggregate z. With variance = mean_i ||x_i - mean||^2 = sum_ij D2_ij / 2h^2, the parallel axis
    theorem gives ||z - mean||^2 = mean_i ||x_i - z||^2 - variance, which no common part of the rows can spoil. A rule
    that keeps this ratio under kappa whatever f rows do is (f, kappa)-robust (Allouah et al. 2023, def. 2). None for
    fewer than two rows or rows that are all equal.
    """
    h = len(sq_distances)
    if h < 2:
        return None
    variance = float(sq_distances[:, :h].sum()) / (2 * h * h)
    off = float(sq_distances[:, h].mean()) - variance
    return max(0.0, off) / variance if variance > 0 else None


def stealth(gram: Tensor, malicious: list[bool]) -> dict[str, float | None]:
    """Where the malicious rows stand among the honest ones: {"norm_rank", "cosine_rank"}, each in 0..1.

    `gram` (n, n) holds the inner products of all rows. A row's rank is the share of honest rows with a smaller value,
    ties counting one half; given is the mean over the malicious rows. The values are the rows' norms, and the cosines
    of each row to the mean of all other rows. 0.5 is hidden in the middle; a norm rank of 1 is longer than every honest
    row, a cosine rank of 0 points further from the others than every honest row. A zero row has cosine 0.
    """
    sums, squares = gram.sum(1), gram.diagonal().clamp_min(0)
    along = sums - squares  # <x_i, sum of the others>
    others = (gram.sum() - 2 * sums + squares).clamp_min(0)  # ||sum of the others||^2
    lengths = (squares * others).sqrt()
    cosines = torch.where(lengths > 0, along / lengths.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return {"norm_rank": auc(squares.tolist(), malicious), "cosine_rank": auc(cosines.tolist(), malicious)}


@dataclass(frozen=True)
class Breakdown:
    """Up to how many attackers of n a rule holds."""

    point: int | None  # the smallest m at which the ratio went over the limit; None where it never did
    refused: int | None  # the smallest m at which the rule gave no answer; None where it always did
    ratios: dict[int, float] = field(default_factory=dict)  # m -> mean robustness ratio of the trials


def breakdown(
    aggregate: Callable[[Tensor, int], Tensor],
    forge: Callable[[Tensor, int], Tensor],
    trials: Sequence[Tensor],
    *,
    limit: float = 1.0,
    most: int | None = None,
) -> Breakdown:
    """Sweep m = 1, 2, ... attackers of n until a rule breaks: its mean robustness ratio exceeds `limit`.

    Each of the `trials` is a set of n honest rows (n, d), the last m of which give way to the attackers'.
    `aggregate(rows, m)` is the rule's answer (d,) to n rows, `forge(honest, m)` makes (m, d) rows from (n - m, d). The
    sweep ends at `most`, by default the last m that is fewer than half of n, or where the rule refuses (DefenseError).
    The default limit is what an honest row taken at random gives on average.
    """
    if not trials:
        raise DefenseError("breakdown: trials is empty. Give at least one set of honest rows (n, d).")
    n = len(trials[0])
    ratios: dict[int, float] = {}
    for m in range(1, ((n - 1) // 2 if most is None else most) + 1):
        found = []
        for rows in trials:
            honest = rows[: n - m]
            try:
                update = aggregate(torch.cat([honest, forge(honest, m)]), m)
            except DefenseError:
                return Breakdown(None, m, ratios)
            found.append(_off(honest, update))
        ratios[m] = sum(found) / len(found)
        if not ratios[m] <= limit:
            return Breakdown(m, None, ratios)
    return Breakdown(None, None, ratios)


def _off(honest: Tensor, update: Tensor) -> float:
    """The robustness ratio; infinite for an update that is not finite, 0 for honest rows that are all equal."""
    if not bool(update.isfinite().all()):
        return float("inf")
    distances = kernels.sq_distances(UpdateMatrix.of(honest), update)
    return robustness_ratio(distances[: len(honest)]) or 0.0
