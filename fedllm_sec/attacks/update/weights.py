"""What the server weighs rows by and multiplies updates by, as far as attackers know it; what they assume is said."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedllm_sec.kernels.claims import CAP, capped, midpoint
from fedllm_sec.protocols import ThreatView

Weighing = Literal["counts", "uniform"]


@dataclass(frozen=True)
class RowWeights:
    """Weights of the round's rows; only their ratios mean something."""

    own: Tensor  # (m,) float64, of the attackers' rows
    others: float  # of all other rows together


def row_weights(view: ThreatView, weighing: Weighing, attack: str) -> RowWeights:
    """Weights as the default rule, `mean`, has them: claimed counts, each cut to 3 median claims; or all equal.

    Others' counts that are not granted are taken to be the median of the attackers' own, and a warning says so.
    """
    m = len(view.own)
    rest = view.cohort_size - m if view.others is None else len(view.others)
    claims = [c for c in view.own_counts if math.isfinite(c) and c > 0]
    middle = midpoint(torch.tensor(claims, dtype=torch.float64)) if claims else 1.0
    # a row whose count cannot be used is set aside whatever it holds
    own = [c if math.isfinite(c) and c > 0 else middle for c in view.own_counts]
    others = view.other_counts
    if weighing == "uniform":
        own, others = [1.0] * m, (1.0,) * rest
    elif others is None:
        others = (middle,) * rest
        if rest:
            warnings.warn(
                f"{attack}: the counts that the other {rest} clients claim are not granted; assumed are {middle:g} "
                "examples each, the median of the attackers' own. Set attack.knowledge: cohort, or the strength.",
                stacklevel=4,
            )
    weights = capped([*own, *others], CAP)
    return RowWeights(weights[:m], float(weights[m:].sum()))


def server_lr(view: ThreatView, attack: str) -> float:
    """By how much the server multiplies the defended update; 1 where that is no one number, and a warning says so."""
    if view.server_lr is not None:
        return view.server_lr
    warnings.warn(
        f"{attack}: the server does not multiply updates by one number; it is assumed to add them as they are. Set the "
        "strength itself where that is too far off.",
        stacklevel=4,
    )
    return 1.0
