"""Medians, and claimed example counts cut to a multiple of theirs: what a server weighs rows by, and attackers know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CAP = 3.0  # a claim counts for at most so many median claims, where a rule weighs by counts and is told nothing else


def midpoint(values: Tensor) -> float:
    """The median of some numbers, halfway between the two middle ones for an even number; torch's is the lower one."""
    ordered = values.detach().to("cpu", torch.float64).flatten().sort().values
    return float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)


def capped(counts: Sequence[float] | Tensor, cap: float = CAP) -> Tensor:
    """min(count, cap * median of the counts above 0) for claimed counts (n,), of which one is above 0: (n,) float64."""
    claimed = torch.as_tensor(counts, dtype=torch.float64, device="cpu")
    return claimed.clamp(max=cap * midpoint(claimed[claimed > 0]))
