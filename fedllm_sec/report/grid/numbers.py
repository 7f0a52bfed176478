"""From the cells of a grid to matrices attack x defense and worst cases, each number with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedllm_sec.report.grid.folder import ATTACK, BASE, DEFENSE, NONE, SEED, Cell, Grid
from fedllm_sec.report.grid.intervals import told_apart
from fedllm_sec.report.grid.views import Parts, View
from fedllm_sec.report.measures import Measure

# ---------------------------------------------------------------- matrices


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
    """The grid split by every axis but attack, defense and seed, in the order of its labels.

    A run that is several combinations, such as the undefended one in a sweep over a defense's setting, is in every
    part that it stands for.
    """
    attacks, defenses = _labels(grid, ATTACK), _labels(grid, DEFENSE)
    others = [axis for axis, labels in grid.axes.items() if axis not in (ATTACK, DEFENSE, SEED) and len(labels) > 1]
    groups: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
    for cell in [at for one in grid.cells for at in one.stands_for]:
        groups.setdefault(tuple((axis, cell.axes.get(axis, BASE)) for axis in others), []).append(cell)

    def order(fixed: tuple[tuple[str, str], ...]) -> list[int]:
        return [
            grid.axes[axis].index(label) if label in grid.axes[axis] else len(grid.axes[axis]) for axis, label in fixed
        ]

    found = []
    for fixed in sorted(groups, key=order):
        inside = [cell for cell in groups[fixed] if cell.attack in attacks and cell.defense in defenses]
        twins = {cell.folder: cell for cell in groups[fixed] if cell.is_twin}
        found.append(Slice(fixed, tuple(inside), tuple(twins.values()), attacks, defenses))
    return found


def _labels(grid: Grid, axis: str) -> tuple[str, ...]:
    """The labels of an axis, without "none" where only twins have it: they stand under the maps."""
    own = {at.axes.get(axis, BASE) for cell in grid.cells if not cell.is_twin for at in cell.stands_for}
    labels = grid.axes.get(axis, (BASE,))
    return tuple(label for label in labels if label != NONE or label in own or not own)


# ---------------------------------------------------------------- worst cases


@dataclass(frozen=True)
class Worst:
    """The attacks under which a defense does worst, in which slices, and how many rows were met of how many."""

    rows: tuple[tuple[Slice, str], ...]  # several where they share the value
    slot: Slot  # of the first of them
    measure: Measure
    measured: int
    planned: int


def met(parts: Iterable[Slice], view: View) -> list[tuple[Slice, str]]:
    """(slice, attack) of every row that a worst case is over: attacks whose runs measure the view, or may yet.

    A row that the grid leaves out for all defenses is none. One in which runs are finished and none has the measure
    does not measure it, such as attack success without a trigger: nothing is missing there.
    """
    found = []
    for part in parts:
        for attack in part.attacks:
            slots = [part.slot(view, attack, defense) for defense in part.defenses]
            finished = any(cell.finished for slot in slots for cell in slot.cells)
            there = attack != NONE and any(slot.cells for slot in slots)
            if there and (any(slot.mean for slot in slots) or not finished):
                found.append((part, attack))
    return found


def common(rows: Iterable[tuple[Slice, str]], view: View) -> list[tuple[Slice, str]]:
    """Those rows in which every defense of the grid met the attack, and lacks no seed: over them all are comparable."""
    found = []
    for part, attack in rows:
        slots = [part.slot(view, attack, defense) for defense in part.defenses if defense != NONE]
        if slots and all(slot.cells and slot.measured == len(slot.cells) for slot in slots):
            found.append((part, attack))
    return found


def excluded(rows: Iterable[tuple[Slice, str]], view: View) -> bool:
    """Whether some defense does not meet some attack because the grid leaves that combination out."""
    return any(not part.slot(view, attack, defense).cells for part, attack in rows for defense in part.defenses)


def planned(parts: Sequence[Slice]) -> tuple[list[str], list[str]]:
    """The attacks and the defenses that some cell has, in the grid's order, without "none"."""
    cells = [cell for part in parts for cell in part.cells]
    attacks, defenses = {cell.attack for cell in cells}, {cell.defense for cell in cells}
    return (
        [name for name in parts[0].attacks if name != NONE and name in attacks],
        [name for name in parts[0].defenses if name != NONE and name in defenses],
    )


def worst(rows: Sequence[tuple[Slice, str]], view: View, defense: str) -> Worst | None:
    """The worst slot of a defense over some rows, None where none has a result."""
    slots = [((part, attack), part.slot(view, attack, defense)) for part, attack in rows]
    found = [(row, slot, slot.mean) for row, slot in slots if slot.mean is not None]
    if not found:
        return None
    most = max(badness(m.value, view) for _, _, m in found)
    shared = [(row, slot, m) for row, slot, m in found if badness(m.value, view) == most]
    return Worst(tuple(row for row, _, _ in shared), shared[0][1], shared[0][2], len(found), len(rows))


def best_worst(cases: Mapping[str, Worst], view: View) -> tuple[list[str], list[str]]:
    """The defenses whose worst case is best, and those that cannot be told apart from the first of them.

    Two worst cases are compared seed by seed, also where they are under different attacks: the interval of their
    difference must leave out 0. Where they have no seed in common, nothing is said.
    """
    least = min(badness(case.measure.value, view) for case in cases.values())
    best = [name for name, case in cases.items() if badness(case.measure.value, view) == least]
    first = cases[best[0]]
    near = [
        name
        for name, case in cases.items()
        if name not in best
        and (shared := _by_seed(case.slot, first.slot, view))  # without a common seed nothing is known
        and not told_apart(shared, view.unit, (*view.signs, *(-sign for sign in view.signs)))
    ]
    return best, near


def _by_seed(slot: Slot, other: Slot, view: View) -> list[Parts]:
    """What the runs of two slots measured with the same seeds, as counted by each run: the parts of both in a row."""
    taken = [{cell.seed: m for cell in each.cells if (m := view.parts(cell)) is not None} for each in (slot, other)]
    return [(*taken[0][seed], *taken[1][seed]) for seed in taken[0] if seed in taken[1]]


def harm(value: float, view: View) -> float:
    """Larger is worse for the defender; what is not a number is worst."""
    return math.inf if math.isnan(value) else -value if view.higher_is_better else value


def badness(value: float, view: View) -> tuple[float, bool]:
    """Orders values from the best to the worst: what is not a number comes after what is infinite."""
    return harm(value, view), math.isnan(value)
