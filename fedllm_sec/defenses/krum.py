"""Rules that score each row by its distance to its nearest rows: Krum, Multi-Krum, Bulyan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import lowest, need, need_f
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext


def krum_scores(sq_distances: Tensor, neighbours: int) -> Tensor:
    """Sum of the `neighbours` smallest squared distances of each row to the others: (n,) from (n, n)."""
    others = sq_distances.clone().fill_diagonal_(float("inf"))
    return others.sort(dim=1).values[:, :neighbours].sum(1)


def krum(updates: UpdateMatrix, ctx: RoundContext, *, f: int) -> Decision:
    """The one row with the lowest sum of squared distances to its n - f - 2 nearest rows.

    Blanchard et al. 2017; equal scores go to the smallest client id. Needs n >= 2f + 3.
    """
    return multi_krum_of("krum", updates, f, 1)


def multi_krum(updates: UpdateMatrix, ctx: RoundContext, *, f: int, m: int | None = None) -> Decision:
    """The uniform mean of the `m` rows with the lowest Krum scores, m = n - f unless set.

    Blanchard et al. 2017 ("Multi-Krum"): all rows are scored once. Needs n >= 2f + 3.
    """
    return multi_krum_of("multi_krum", updates, f, updates.n - f if m is None else m)


def multi_krum_of(rule: str, updates: UpdateMatrix, f: int, m: int) -> Decision:
    """Mean of the m rows with the lowest Krum scores."""
    n = updates.n
    need_f(rule, n, f, n >= 2 * f + 3, "n >= 2f + 3 clients")
    need(1 <= m <= n, rule, "1 <= m <= n rows to keep", "Change m.", m=m, n=n)
    scores = krum_scores(kernels.sq_distances(updates), n - f - 2)
    kept = torch.zeros(n, dtype=torch.bool)
    kept[lowest(scores, m, updates.ids)] = True
    return Decision.keep(updates, kept, scores=scores)


def bulyan_selection(sq_distances: Tensor, f: int, ids: Sequence[str]) -> list[int]:
    """The n - 2f rows that Krum picks one after another, each time among the rows that remain.

    With r rows left, a score sums over max(1, r - f - 2) neighbours.
    """
    n = len(sq_distances)
    left = list(range(n))
    picked: list[int] = []
    for _ in range(n - 2 * f):
        if len(left) == 1:
            picked.append(left.pop())
            continue
        here = torch.tensor(left)
        scores = krum_scores(sq_distances[here][:, here], max(1, len(left) - f - 2))
        picked.append(left.pop(lowest(scores, 1, [ids[i] for i in left])[0]))
    return picked


def bulyan(updates: UpdateMatrix, ctx: RoundContext, *, f: int) -> Decision:
    """Krum n - 2f times without replacement, then per coordinate the mean of the n - 4f most central values.

    El Mhamdi et al. 2018. Scores are the Krum scores over all rows. Needs n >= 4f + 3.
    """
    n = updates.n
    need_f("bulyan", n, f, n >= 4 * f + 3, "n >= 4f + 3 clients")
    distances = kernels.sq_distances(updates)
    picked = sorted(bulyan_selection(distances, f, updates.ids))
    kept = torch.zeros(n, dtype=torch.bool)
    kept[picked] = True
    update = kernels.mean_around_median(updates.select(picked), n - 4 * f)
    return Decision(update, kept=kept, scores=krum_scores(distances, n - f - 2))
