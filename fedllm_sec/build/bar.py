"""How far a round is, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator


def bar_of(show: bool, round: Callable[[], int], rounds: int) -> Callable[[Iterator[int], int], Iterator[int]]:
    """A bar over the clients of a round; those that other processes train count too."""
    from tqdm import tqdm

    hide = not (show and sys.stderr.isatty())

    def bar(turns: Iterator[int], n: int) -> Iterator[int]:
        with tqdm(total=n, desc=f"round {round()}/{rounds}", unit="client", leave=False, disable=hide) as shown:
            for place in turns:
                shown.update(place - shown.n)
                yield place

    return bar
