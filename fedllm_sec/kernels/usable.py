"""Which rows are numbers that can be added up: what the server's screen lets through and all that attackers look at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.matrix import UpdateMatrix

# float32 ends at 3.4e38. A row shorter than this can be added, clipped and mixed without overflow, and no training
# step that is any use comes near it.
LONGEST = 1e36


def lengths(updates: UpdateMatrix) -> Tensor:
    """Length of each row in float64, NaN or infinite exactly where a value is: (n,)."""
    if updates.picked is not None:
        return kernels.row_norms(updates)
    squares = torch.zeros(updates.n, dtype=torch.float64)  # truly mixed rows: look at what they come to
    for _, block in updates.blocks():
        squares += block.double().square().sum(1).cpu()
    return squares.sqrt()


def usable(updates: UpdateMatrix) -> list[bool]:
    """Whether each row is finite and no longer than 1e36, and its claimed count finite and positive: n answers."""
    found = zip(lengths(updates).tolist(), updates.counts, strict=True)
    return [length <= LONGEST and math.isfinite(count) and count > 0 for length, count in found]  # NaN is not <=
