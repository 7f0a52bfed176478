"""How strong an attack may be before a known rule stops following it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fedllm_sec.errors import AttackError, CohortError, DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.storage import new_rows
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


def received(view: ThreatView, forged: Tensor) -> UpdateMatrix:
    """The round as the server would get it if the attackers sent `forged` (m, d): its rows, ids, counts and order.

    This is what `view.defense` is asked about: rules remember by id and weigh by count. A new (n, d) matrix, so write
    other forged rows into it instead of making one for each try.
    """
    if view.others is None:
        raise AttackError("received: what the others send is not granted. Set attack.knowledge: cohort+defense.")
    h, m = len(view.others), len(view.own)
    known = {id: i for i, id in enumerate((*view.other_ids, *view.own_ids))}
    order = [known[id] for id in view.order] if view.order else list(range(h + m))  # whose row the server has i-th
    rows = new_rows(h + m, view.others.shape[1], dtype=view.others.dtype, device=view.others.device)
    for i, place in enumerate(order):
        rows[i] = view.others[place] if place < h else forged[place - h]
    counts = (*(view.other_counts or (1.0,) * h), *view.own_counts)
    return UpdateMatrix.of(
        rows,
        ids=view.order or (*view.other_ids, *view.own_ids) or None,
        counts=[counts[i] for i in order],
        layout=view.layout,
    )


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

    The rule decides on the round as the server would get it, with ids, counts and order. Both vectors are taken through
    the server's step and what follows it (`Decision.step`) where that is known, so it is the model that is moved.
    Half of the evaluations walk up from `first` by doubling, the rest halve the neighbourhood of the best. A rule's
    response to strength rises and then falls, so this finds its top to a few percent; where the rule refuses a try
    (DefenseError), the try counts as harmless.
    """
    rule = known_rule(view, name)[0]
    if evaluations < 4:
        raise AttackError(f"{name}.evaluations: {evaluations}: needs at least 4.")
    cohort = received(view, view.own)
    known = {id: i for i, id in enumerate(cohort.ids)}
    mine = [known[id] for id in view.own_ids] if view.own_ids else list(range(cohort.n))[-len(view.own) :]

    def damage(strength: float) -> float:
        cohort.rows[mine] = row_at(strength).to(cohort.rows)
        try:
            decision = rule(cohort)
            moved, expected = decision.update.to(honest_mean), honest_mean
            if decision.step is not None:
                moved, expected = decision.step(moved), decision.step(expected)
        except DefenseError:
            return -1.0
        return float((moved - expected).double().norm())

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
