"""Running sums of clients' rows, for rules that remember: (t, m, TILE) float32, tile by tile of all m clients.

What is added in one round then lies together: a pass over it is as quick as one over a plain array, where m rows of
millions of values each are m places in memory at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm_sec.matrix.storage import new_rows

TILE = 512  # columns


def tiles(d: int) -> int:
    """How many tiles hold d values."""
    return (d + TILE - 1) // TILE


def new_sums(m: int, d: int, device: torch.device | str = "cpu") -> Tensor:
    """Zeros for m clients of d values; the last tile is padded."""
    return new_rows(tiles(d), m, TILE, device=device).zero_()


def joined(sums: Tensor, more: Tensor) -> Tensor:
    """The sums of further clients beside those that there are, where the further ones lie."""
    out = new_rows(sums.shape[0], sums.shape[1] + more.shape[1], TILE, device=more.device)
    return torch.cat([sums.to(more.device), more], dim=1, out=out)


def plain_rows(sums: Tensor, d: int) -> Tensor:
    """The sums as rows (m, d), copied."""
    return sums.transpose(0, 1).reshape(sums.shape[1], -1)[:, :d]
