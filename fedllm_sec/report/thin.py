"""What a picture draws of very many rounds: some of them, and its caption says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
MOST = 1_000  # rounds: a picture has no more columns


def thin(rounds: Sequence[T], most: int = MOST) -> Sequence[T]:
    """At most about so many of them, at equal distances, and the last."""
    step = -(-len(rounds) // most)
    return [*rounds[:-1:step], rounds[-1]] if step > 1 else rounds


def thinned(rounds: int, most: int = MOST) -> str:
    """What `thin` leaves out, for a caption; empty where it leaves out nothing."""
    step = -(-rounds // most)
    return f" One of {step} rounds is drawn, of {rounds:,}; the numbers are of all." if step > 1 else ""
