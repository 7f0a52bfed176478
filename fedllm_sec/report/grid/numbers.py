"""From the cells of a grid to matrices attack x defense, worst cases and ranks, each number with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np

from fedllm_sec.report.grid.folder import ATTACK, BASE, DEFENSE, NONE, SEED, Cell, Grid
from fedllm_sec.report.grid.intervals import difference, over_seeds
from fedllm_sec.report.measures import ATTACK as ATTACK_KINDS
from fedllm_sec.report.measures import Kind, Measure, final, main_quality
from fedllm_sec.report.runs import Run, methods

RESAMPLES = 4000  # of the bootstrap
ASR = ATTACK_KINDS[0]


# ---------------------------------------------------------------- matrices


@dataclass(frozen=True)
class View:
    """What one matrix shows: a measure, or its change against the twin. Good is what a defender wants."""

    key: str
    title: str
    kind: Kind
    higher_is_better: bool
    explained: str
    of: Callable[[Sequence[Cell]], Measure | None]

    @property
    def unit(self) -> str:
        return self.kind.unit


@dataclass(frozen=True)
class Slot:
    """One attack against one defense: its cells (one a seed) and their mean. No cells: not in the grid."""

    cells: tuple[Cell, ...]
    mean: Measure | None

    @property
    def measured(self) -> int:
        """How many of the cells are in the mean."""
        return (self.mean.n or 0) if self.mean else 0


@dataclass(frozen=True)
class Slice:
    """The part of the grid in which all axes but attack, defense and seed are fixed."""

    fixed: tuple[tuple[str, str], ...]
    cells: tuple[Cell, ...]  # without twins that are no cell of the matrix
    twins: tuple[Cell, ...]
    attacks: tuple[str, ...]
    defenses: tuple[str, ...]

    @property
    def title(self) -> str:
        return ", ".join(f"{axis} {label}" for axis, label in self.fixed)

    def slot(self, view: View, attack: str, defense: str) -> Slot:
        cells = tuple(cell for cell in self.cells if cell.attack == attack and cell.defense == defense)
        return Slot(cells, view.of(cells))


def slices(grid: Grid) -> list[Slice]:
    """The grid split by every axis but attack, defense and seed, in the order of its labels."""
    attacks, defenses = _labels(grid, ATTACK), _labels(grid, DEFENSE)
    others = [axis for axis, labels in grid.axes.items() if axis not in (ATTACK, DEFENSE, SEED) and len(labels) > 1]
    groups: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
    for cell in grid.cells:
        groups.setdefault(tuple((axis, cell.axes.get(axis, BASE)) for axis in others), []).append(cell)

    def order(fixed: tuple[tuple[str, str], ...]) -> list[int]:
        return [
            grid.axes[axis].index(label) if label in grid.axes[axis] else len(grid.axes[axis]) for axis, label in fixed
        ]

    found = []
    for fixed in sorted(groups, key=order):
        inside = [cell for cell in groups[fixed] if cell.attack in attacks and cell.defense in defenses]
        twins = [cell for cell in groups[fixed] if cell.is_twin]
        found.append(Slice(fixed, tuple(inside), tuple(twins), attacks, defenses))
    return found


def _labels(grid: Grid, axis: str) -> tuple[str, ...]:
    """The labels of an axis, without "none" where only twins have it: they stand under the maps."""
    own = {cell.axes.get(axis, BASE) for cell in grid.cells if not cell.is_twin}
    labels = grid.axes.get(axis, (BASE,))
    return tuple(label for label in labels if label != NONE or label in own or not own)


def views(grid: Grid) -> list[View]:
    """The main quality measure, what it lost against the twin, attack success, and what that gained."""
    runs = grid.runs
    main = main_quality(runs)
    cells = {cell.folder: cell for cell in grid.cells}
    found = []
    if main is not None:
        up = main.higher_is_better is not False
        found = [
            View(main.key, main.title, main, up, f"{main.title} on clean held-out data", _mean_of(main)),
            View(
                "lost",
                f"{main.title} {'lost' if up else 'added'}",
                main,
                False,
                f"{main.title} of the twin (attack-free, undefended) minus that of the run"
                + ("" if up else ", sign turned"),
                _change_of(main, cells, 1 if up else -1),
            ),
        ]
    if any(final(run, ASR.key) is not None for run in runs):
        found.append(
            View(ASR.key, ASR.title, ASR, False, "share of triggered held-out rows with the attacker's answer",
                 _mean_of(ASR))
        )  # fmt: skip
        gained = View(
            "gained",
            f"{ASR.title} gained",
            ASR,
            False,
            f"{ASR.title} minus that of the twin on the same triggers; n/a where the twin was asked others",
            _change_of(ASR, cells, -1),
        )
        if any(gained.of([cell]) is not None for cell in grid.cells if not cell.is_twin):
            found.append(gained)
    return found


def _mean_of(kind: Kind) -> Callable[[Sequence[Cell]], Measure | None]:
    def of(cells: Sequence[Cell]) -> Measure | None:
        runs = [cell.finished for cell in cells]
        return over_seeds([m for run in runs if run is not None and (m := final(run, kind.key))], kind.unit)

    return of


def _change_of(kind: Kind, cells: Mapping[str, Cell], sign: int) -> Callable[[Sequence[Cell]], Measure | None]:
    """Twin minus cell (sign 1) or cell minus twin (sign -1), paired by seed."""

    def of(group: Sequence[Cell]) -> Measure | None:
        pairs = []
        for cell in group:
            twin = cells.get(cell.twin or "")
            if cell.finished is None or twin is None or twin.finished is None:
                continue
            own, other = final(cell.finished, kind.key), final(twin.finished, kind.key)
            if own is None or other is None or (kind == ASR and not same_probe(cell.finished, twin.finished)):
                continue
            pairs.append((other, own) if sign > 0 else (own, other))
        return difference(pairs)

    return of


def same_probe(run: Run, twin: Run) -> bool:
    """Whether both were asked for the same answer to the same trigger: their recipes name the same data attacks."""
    blocks = [r.recipe.get("attack") for r in (run, twin)]
    wanted = [methods(block, "data") if isinstance(block, Mapping) else [] for block in blocks]
    return bool(wanted[0]) and wanted[0] == wanted[1]


# ---------------------------------------------------------------- worst cases and ranks


@dataclass(frozen=True)
class Worst:
    """The attack under which a defense does worst, in which slice, and how many slots were and should be measured."""

    attack: str
    slice: Slice
    measure: Measure
    measured: int
    planned: int


def met(parts: Iterable[Slice], view: View) -> list[tuple[Slice, str]]:
    """(slice, attack) of every row that a worst case is over: attacks whose runs measure the view, or may yet.

    A row in which runs are finished and none has the measure does not measure it, such as attack success without a
    trigger: nothing is missing there.
    """
    found = []
    for part in parts:
        for attack in part.attacks:
            slots = [part.slot(view, attack, defense) for defense in part.defenses]
            finished = any(cell.finished for slot in slots for cell in slot.cells)
            if attack != NONE and (any(slot.mean for slot in slots) or not finished):
                found.append((part, attack))
    return found


def common(rows: Iterable[tuple[Slice, str]], view: View) -> list[tuple[Slice, str]]:
    """Those rows in which every defense of the grid that should meet the attack has a result."""
    found = []
    for part, attack in rows:
        slots = [slot for defense in part.defenses if (slot := part.slot(view, attack, defense)).cells]
        if slots and all(slot.mean is not None for slot in slots):
            found.append((part, attack))
    return found


def worst(rows: Iterable[tuple[Slice, str]], view: View, defense: str) -> Worst | None:
    """The worst slot of a defense over some rows, None where none has a result."""
    slots = [(attack, part, part.slot(view, attack, defense)) for part, attack in rows]
    slots = [item for item in slots if item[2].cells]
    found = [Worst(attack, part, slot.mean, 0, len(slots)) for attack, part, slot in slots if slot.mean is not None]
    if not found:
        return None
    return replace(max(found, key=lambda case: harm(case.measure.value, view)), measured=len(found))


def harm(value: float, view: View) -> float:
    """Larger is worse for the defender; what is not a number is worst."""
    return math.inf if math.isnan(value) else -value if view.higher_is_better else value


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
        drawn = np.random.default_rng(0).integers(len(whole), size=(RESAMPLES, len(whole)))
        counts = np.stack([np.bincount(row, minlength=len(whole)) for row in drawn])
        low, high = np.quantile(counts @ table / len(whole), [0.025, 0.975], axis=0)
    known = len(whole) > 1
    means = {
        name: Measure(float(table[:, i].mean()), *((float(low[i]), float(high[i])) if known else (None, None)))
        for i, name in enumerate(ranked)
    }
    return Ranks(means, len(whole), len(rows) - len(whole), tuple(n for n in defenses if n not in ranked))


def _tied_ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their places."""
    return [1 + sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def order_of(parts: Sequence[Slice], shown: Sequence[View]) -> list[str]:
    """The defenses, best first: by the mean of their mean ranks in quality and in attack success.

    Defenses without a rank come after those with one, in the grid's order.
    """
    found = [ranks(parts, view).mean for view in shown if view.key not in ("lost", "gained")]
    names = parts[0].defenses if parts else ()

    def place(name: str) -> float:
        own = [table[name].value for table in found if name in table]
        return mean(own) if own else math.inf

    return sorted(names, key=place)
