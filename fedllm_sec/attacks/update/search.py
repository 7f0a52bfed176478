"""How strong an attack may be before a known rule stops following it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedllm_sec.errors import AttackError, CohortError, DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, ThreatView


def known_rule(view: ThreatView, name: str) -> tuple[Callable[[UpdateMatrix], Decision], Tensor]:
    """The server's rule and the honest rows (h, d), if knowledge grants both."""
    if view.others is None or view.defense is None:
        raise AttackError(
            f"{name}: searches its strength against the known defense. Set attack.knowledge: cohort+defense."
        )
    if len(view.others) == 0:
        raise CohortError(f"{name}: no honest client is in this round, so there is nothing to search with.")
    return view.defense, view.others


def strongest(
    view: ThreatView,
    name: str,
    row_at: Callable[[float], Tensor],
    honest_mean: Tensor,
    *,
    first: float,
    evaluations: int = 20,
) -> float:
    """The strength s at which ||rule(honest rows and m times row_at(s)) - honest mean|| is largest.

    Half of the evaluations walk up from `first` by doubling, the rest halve the neighbourhood of the best.
    A rule's response to strength rises and then falls, so this finds its top to a few percent; where the
    rule refuses a try (DefenseError), the try counts as harmless.
    """
    rule, others = known_rule(view, name)
    if evaluations < 4:
        raise AttackError(f"{name}.evaluations: {evaluations}: needs at least 4.")
    m = len(view.own)
    h = len(others)
    cohort = torch.empty(h + m, others.shape[1], device=others.device)
    cohort[:h] = others

    def damage(strength: float) -> float:
        cohort[h:] = row_at(strength)
        try:
            answer = rule(UpdateMatrix.of(cohort, layout=view.layout)).update
        except DefenseError:
            return -1.0
        return float((answer.to(honest_mean) - honest_mean).double().norm())

    tried: dict[float, float] = {}
    for step in range(evaluations // 2):
        tried[first * 2.0**step] = damage(first * 2.0**step)
    best = max(tried, key=lambda s: tried[s])
    low, high = best / 2, best * 2
    for _ in range((evaluations - len(tried)) // 2):
        for strength in ((low + best) / 2, (best + high) / 2):
            tried[strength] = damage(strength)
        top = max(tried, key=lambda s: tried[s])
        around = sorted(tried)
        at = around.index(top)
        low = around[at - 1] if at > 0 else top / 2
        high = around[at + 1] if at + 1 < len(around) else top * 2
        best = top
    return best
