"""A pass over held-out rows that says all it depends on, so that nobody need make the same one twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Repeatable:
    """`score(batch)` gives numbers that follow from the model in memory, the batches and `of`: from nothing else.

    It draws no random numbers, asks no judge and writes nothing: what does stays outside of it. `of` begins with a word
    for what is asked; of records, tensors, lists and numbers it can be told whether they are equal (rounds/store.py).
    """

    score: Callable[[Any], Tensor]  # batch -> (b, width) float64
    of: tuple[Any, ...]

    def __call__(self, batch: Any) -> Tensor:
        return self.score(batch)
