"""What a step's loss is made of where it is random or a sum of means: cut alike for micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Drawn:
    """Rows of a batch over which a loss takes one mean, and the random numbers drawn for each; cut together."""

    rows: Any  # (b,) row numbers
    numbers: tuple[Tensor, ...] = ()  # each (b, ...)

    def every(self, first: int, step: int) -> Drawn:
        """One row in `step`, from row `first` on."""
        return Drawn(self.rows[first::step], tuple(t[first::step] for t in self.numbers))


class Draws(Protocol):
    """What a task has besides whose loss is random, or the sum of several means.

    Micro-batches and ranks get parts of what is drawn here for the whole batch, so that their gradients add up to its.
    Numbers that layers draw inside the model (dropout) are none of them.
    """

    def draw(self, shard: Any, rows: Sequence[int]) -> list[Drawn]: ...  # the means whose sum is the loss
    def loss(self, shard: Any, rows: Sequence[int], *numbers: Tensor) -> Tensor: ...  # of such rows, with their numbers
