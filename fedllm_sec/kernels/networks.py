"""Pruned sorting networks: the comparators that a column statistic needs, and no others.

A network is a fixed list of comparators (a, b): put the smaller of two rows' values at a and the larger at b. It
does the same steps for every column, so a step runs on a whole row of columns at once. Starting from Batcher's
odd-even merge sort (Batcher 1968), a walk from the end drops what cannot reach the result:

- a value whose rank is not asked for need not be written: half a comparator, or none;
- ranks that are only averaged need no order among themselves: a comparator between two of them is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

BOTH, LOW_ONLY, HIGH_ONLY = 0, 1, 2
UNUSED, SUMMED, RANKED = "unused", "summed", "ranked"


@dataclass(frozen=True)
class Network:
    """Comparators for n rows, then which ranks count: see `order_statistics`."""

    n: int
    uses: tuple[str, ...]  # (n,) what each rank is for; (): the values are sorted already
    first: int  # ranks first..last-1 are asked for
    last: int
    nearest: int = 0  # 0: their mean; else the mean of so many of them around the median

    @cached_property
    def comparators(self) -> tuple[tuple[int, int, int], ...]:
        """(row of the smaller, row of the larger, BOTH or one of them); made when first asked for: many take long."""
        return pruned(self.n, self.uses) if self.uses else ()


def batcher(n: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge sort for any n: after it, row r holds the value of rank r."""
    pairs = []
    merged = 1
    while merged < n:
        gap = merged
        while gap >= 1:
            for j in range(gap % merged, n - gap, 2 * gap):
                for i in range(min(gap, n - j - gap)):
                    if (i + j) // (2 * merged) == (i + j + gap) // (2 * merged):
                        pairs.append((i + j, i + j + gap))
            gap //= 2
        merged *= 2
    return pairs


def pruned(n: int, uses: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
    """The comparators needed where rank r is `uses[r]`: unused, summed (in any order) or ranked (in its place)."""
    use = list(uses)
    kept = []
    for a, b in reversed(batcher(n)):
        if use[a] == use[b] != RANKED:
            continue
        kept.append((a, b, LOW_ONLY if use[b] == UNUSED else HIGH_ONLY if use[a] == UNUSED else BOTH))
        use[a] = use[b] = RANKED
    return tuple(reversed(kept))


@lru_cache(maxsize=256)
def mean_of_ranks(n: int, first: int, last: int) -> Network:
    """The mean of the sorted values first..last-1 of n."""
    uses = tuple(SUMMED if first <= r < last else UNUSED for r in range(n))
    return Network(n, uses, first, last)


def median(n: int) -> Network:
    """The middle value, or the mean of the two middle ones."""
    return mean_of_ranks(n, (n - 1) // 2, n // 2 + 1)


@lru_cache(maxsize=256)
def nearest_median(n: int, k: int) -> Network:
    """The mean of the k values nearest the median: k consecutive ranks that contain the (lower) middle one."""
    low, high = (n - 1) // 2, n // 2
    first, last = max(0, low - k + 1), min(n, max(low + k, high + 1))
    uses = tuple(RANKED if first <= r < last else UNUSED for r in range(n))
    return Network(n, uses, first, last, nearest=k)
