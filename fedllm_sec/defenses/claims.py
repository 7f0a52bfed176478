"""Claimed example counts as row weights. They are claims, so they are capped before they weigh anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.defenses.checks import need
from fedllm_sec.kernels.claims import capped


def capped_shares(counts: Sequence[float], cap: float, rule: str) -> Tensor:
    """Weights (n,) float64 that sum to 1, in proportion to min(count, cap * median count).

    With the default cap of 3 in the rules, one client of ten that claims a billion examples weighs 3 / 12,
    not 1.
    """
    need(cap >= 1, rule, "cap >= 1 (times the median claim)", "Raise cap.", cap=cap)
    claimed = torch.tensor(counts, dtype=torch.float64, device="cpu")  # also where a rehearsal makes others on "meta"
    usable = bool(torch.isfinite(claimed).all()) and bool((claimed >= 0).all())
    need(usable, rule, "finite claimed counts >= 0", "Screen the updates first.", counts=tuple(counts))
    need(
        bool((claimed > 0).any()),
        rule,
        "claimed counts with a sum above 0",
        "Use weights: uniform.",
        counts=counts,
    )
    weights = capped(claimed, cap)
    return weights / weights.sum()


def capped_count(counts: Sequence[float], cap: float) -> int:
    """How many claims are above the cap, for the record."""
    shares = torch.tensor(counts, dtype=torch.float64)
    return int((shares > capped(shares, cap)).sum())


def row_weights(counts: Sequence[float], weights: str, cap: float, rule: str) -> Tensor:
    """(n,) float64 with sum 1: equal for "uniform", capped claims for "counts"."""
    if weights == "uniform":
        return torch.full((len(counts),), 1.0 / len(counts), dtype=torch.float64)
    return capped_shares(counts, cap, rule)


def client_shares(rule: Callable[..., Any], counts: Mapping[str, float], ids: Sequence[str]) -> Tensor:
    """What the clients `ids` weigh in the mean that `rule` stands for, of all N that `counts` names: (n,) float64.

    By counts, capped among all N, where the rule's setting `weights` is "counts"; else 1 / N each.
    """
    settings = {name: known.default for name, known in inspect.signature(rule).parameters.items()}
    weights = "counts" if settings.get("weights") == "counts" else "uniform"
    shares = row_weights(list(counts.values()), weights, settings.get("cap", 3.0), "clients")
    place = {id: i for i, id in enumerate(counts)}
    return shares[[place[id] for id in ids]]
