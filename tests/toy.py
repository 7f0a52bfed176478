"""A task small enough to check by hand: minimise the mean of 1/2 ||w - row||^2 over the rows of a shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedllm_sec.matrix import Layout


class Quadratic:
    def __init__(self, d: int) -> None:
        self.layout = Layout.single(d)
        self.model = torch.nn.Module()
        self.parameters = torch.nn.Parameter(torch.zeros(d))
        self.parameters.grad = torch.zeros(d)

    def size(self, shard: Tensor) -> int:
        return len(shard)

    def batches(self, shard: Tensor, size: int, rng: torch.Generator) -> Iterator[list[int]]:
        order = torch.randperm(len(shard), generator=rng).tolist()
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def weight(self, shard: Tensor, rows: Sequence[int]) -> float:
        return float(len(rows))

    def loss(self, shard: Tensor, rows: Sequence[int]) -> Tensor:
        return 0.5 * (self.parameters - shard[list(rows)]).square().sum(1).mean()
