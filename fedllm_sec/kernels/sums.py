"""Running sums of clients' rows, for rules that remember: (t, m, TILE) float32, tile by tile of all m clients.

What is added in one round then lies together: a pass over it is as quick as one over a plain array, where m rows of
millions of values each are m places in memory at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 512  # columns


def tiles(d: int) -> int:
    """How many tiles hold d values."""
    return (d + TILE - 1) // TILE


def new_sums(m: int, d: int, device: torch.device | str = "cpu") -> Tensor:
    """Zeros for m clients of d values; the last tile is padded. More clients: torch.cat along dimension 1."""
    return torch.zeros(tiles(d), m, TILE, device=device)


def plain_rows(sums: Tensor, d: int) -> Tensor:
    """The sums as rows (m, d), copied."""
    return sums.transpose(0, 1).reshape(sums.shape[1], -1)[:, :d]
