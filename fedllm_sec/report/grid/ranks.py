"""Ranks of the defenses over the blocks of a grid, with a bootstrap over the blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean
from typing import Any

import numpy as np

from fedllm_sec.report.grid.folder import NONE
from fedllm_sec.report.grid.numbers import Slice, harm
from fedllm_sec.report.grid.views import View, judged
from fedllm_sec.report.measures import Measure

RESAMPLES = 4000  # of the bootstrap


@dataclass(frozen=True)
class Ranks:
    """Mean rank of every defense (1 is best) over blocks in which all were measured; `left_out` blocks were not."""

    mean: Mapping[str, Measure]
    blocks: int
    left_out: int
    unranked: tuple[str, ...]  # defenses that were measured nowhere


def ranks(parts: Iterable[Slice], view: View) -> Ranks:
    """Rank the defenses in every block (slice, attack, seed) by a view; ties share their mean rank.

    The interval is a bootstrap over the blocks (percentiles 2.5 and 97.5 of 4,000 resamples, drawn by a fixed seed).
    """
    rows: list[dict[str, float]] = []
    defenses: tuple[str, ...] = ()
    for part in parts:
        defenses = part.defenses
        for attack in part.attacks:
            cells = [cell for cell in part.cells if cell.attack == attack and attack != NONE]
            for seed in dict.fromkeys(cell.seed for cell in cells):
                block = [(cell.defense, view.of([cell])) for cell in cells if cell.seed == seed]
                rows.append({name: harm(m.value, view) for name, m in block if m is not None})
    rows = [row for row in rows if row]
    ranked = [name for name in defenses if any(name in row for row in rows)]
    whole = [row for row in rows if all(name in row for name in ranked)]
    if not whole or len(ranked) < 2:
        return Ranks({}, 0, len(rows), tuple(name for name in defenses if name not in ranked))
    table = np.array([_tied_ranks([row[name] for name in ranked]) for row in whole])  # (blocks, defenses)
    low = high = np.full(len(ranked), np.nan)
    if len(whole) > 1:
        low, high = np.quantile(_resampled(len(whole)) @ table / len(whole), [0.025, 0.975], axis=0)
    known = len(whole) > 1
    means = {
        name: Measure(float(table[:, i].mean()), *((float(low[i]), float(high[i])) if known else (None, None)))
        for i, name in enumerate(ranked)
    }
    return Ranks(means, len(whole), len(rows) - len(whole), tuple(n for n in defenses if n not in ranked))


@lru_cache(maxsize=8)
def _resampled(blocks: int) -> Any:
    """How often each block is in each resample: (RESAMPLES, blocks)."""
    drawn = np.random.default_rng(0).integers(blocks, size=(RESAMPLES, blocks))
    flat = (drawn + blocks * np.arange(RESAMPLES)[:, None]).ravel()
    return np.bincount(flat, minlength=RESAMPLES * blocks).reshape(RESAMPLES, blocks)


def _tied_ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their places."""
    return [1 + sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def order_of(parts: Sequence[Slice], shown: Sequence[View]) -> list[str]:
    """The defenses, best first: by the mean of their mean ranks in quality and in attack success.

    Defenses without a rank come after those with one, in the grid's order.
    """
    found = [ranks(parts, view).mean for view in judged(shown)]
    names = parts[0].defenses if parts else ()

    def place(name: str) -> float:
        own = [table[name].value for table in found if name in table]
        return mean(own) if own else math.inf

    return sorted(names, key=place)
