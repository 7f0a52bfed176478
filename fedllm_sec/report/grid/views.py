"""What the matrices of a grid show: each a measure of a run, or a difference of two measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedllm_sec.records.history import RoundRecord
from fedllm_sec.report.grid.folder import Cell, Grid
from fedllm_sec.report.grid.intervals import DIFFERENCE, difference, over_seeds
from fedllm_sec.report.measures import ATTACK as ATTACK_KINDS
from fedllm_sec.report.measures import (
    Kind,
    Measure,
    answered,
    final,
    finally_answered,
    main_quality,
    measure,
    percent,
    two_rates,
)
from fedllm_sec.report.pairs import asked_alike
from fedllm_sec.report.runs import Run

ASR = ATTACK_KINDS[0]
AGAINST_TWINS = ("lost", "gained")  # views that are no measure of a run alone
Parts = tuple[Measure, ...]


@dataclass(frozen=True)
class View:
    """What one matrix shows: a measure, or a difference of two. Good is what a defender wants.

    `parts` are what it is made of in one run, when they were last taken, and `signs` how: (1,) the measure itself,
    (1, -1) the first minus the second. `at` are the same of one round, None for what takes a twin.
    """

    key: str
    title: str
    kind: Kind
    higher_is_better: bool
    explained: str
    parts: Callable[[Cell], Parts | None]
    signs: tuple[int, ...] = (1,)
    at: Callable[[RoundRecord], Parts | None] | None = None

    @property
    def unit(self) -> str:
        return self.kind.unit

    def mean(self, rows: Sequence[Parts]) -> Measure | None:
        """Over one row of parts for each seed, with its interval; None without any."""
        if self.signs == (1,):
            return over_seeds([m for (m,) in rows], self.unit, self.kind.bounds[0])
        return difference(rows, self.unit, self.signs)

    def of(self, cells: Iterable[Cell]) -> Measure | None:
        return self.mean([row for cell in cells if (row := self.parts(cell)) is not None])

    def rates(self, cells: Iterable[Cell]) -> tuple[float, float] | None:
        """Attack success and false triggers over the cells that count here: what stands beside any attack success."""
        if self.kind != ASR:
            return None
        both = [
            found
            for cell in cells
            if self.parts(cell) and cell.finished and (found := finally_answered(cell.finished)) is not None
        ]
        if not both:
            return None
        return sum(a.value for a, _ in both) / len(both), sum(b.value for _, b in both) / len(both)

    def beside(self, cells: Iterable[Cell]) -> str:
        """Those two in brackets, as squares and tables have them: (93 / 91 %)."""
        rates = self.rates(cells)
        return "" if rates is None else f"({two_rates(*rates)})"

    def in_words(self, cells: Iterable[Cell]) -> str:
        """The same for a sentence."""
        rates = self.rates(cells)
        if rates is None:
            return ""
        return f"({percent(rates[0])} with the trigger, {percent(rates[1])} without)"


def views(grid: Grid) -> list[View]:
    """The main quality measure, what it lost against the twin, attack success beyond false triggers, what that gained.

    Where a run has no false triggers (no held-out row is clean), its attack success stands in a matrix of its own.
    """
    runs = grid.runs
    main = main_quality(runs)
    cells = {cell.folder: cell for cell in grid.cells}
    found = []
    if main is not None:
        up = main.higher_is_better is not False
        found = [
            _measured(main.title, main, up, main.explained or f"{main.title} on held-out data"),
            View(
                "lost",
                f"{main.title} {'lost' if up else 'added'}",
                main,
                False,
                f"{main.title} of the twin (attack-free, undefended) minus that of the run"
                + ("" if up else ", sign turned"),
                _change_of(main, cells, 1 if up else -1),
                DIFFERENCE,
            ),
        ]
    if any(finally_answered(run) for run in runs):
        text = (
            f"{ASR.title} minus false triggers in the same runs: what the trigger adds to how often the attacker's "
            "answer comes anyway; in brackets the two rates"
        )
        title = f"{ASR.title} beyond false triggers"
        of = _of_finished(finally_answered)
        found.append(View("beyond", title, ASR, False, text, of, DIFFERENCE, answered))
    if any(_success_alone(run) for run in runs):
        found.append(
            View(
                ASR.key,
                f"{ASR.title}, false triggers unknown",
                ASR,
                False,
                f"{ASR.explained}, of runs in which false triggers are n/a",
                _of_finished(_success_alone),
                at=_alone_at,
            )
        )
    gained = View(
        "gained",
        f"{ASR.title} gained",
        ASR,
        False,
        f"{ASR.title} minus that of the twin on the same triggers; n/a where the twin was asked others; in brackets "
        "the run's attack success and false triggers",
        _change_of(ASR, cells, -1),
        DIFFERENCE,
    )
    return found + ([gained] if any(gained.parts(cell) for cell in grid.cells if not cell.is_twin) else [])


def judged(shown: Iterable[View]) -> list[View]:
    """The views that defenses are ranked by."""
    return [view for view in shown if view.key not in AGAINST_TWINS]


def _of_finished(of: Callable[[Run], Parts | None]) -> Callable[[Cell], Parts | None]:
    return lambda cell: None if cell.finished is None else of(cell.finished)


def _measured(title: str, kind: Kind, higher_is_better: bool, explained: str) -> View:
    """A measure of a run as it is."""

    def of(run: Run) -> Parts | None:
        m = final(run, kind.key)
        return None if m is None else (m,)

    def at(record: RoundRecord) -> Parts | None:
        m = measure(record, kind.key)
        return None if m is None else (m,)

    return View(kind.key, title, kind, higher_is_better, explained, _of_finished(of), at=at)


def _success_alone(run: Run) -> Parts | None:
    """Attack success of a run that has it, and false triggers in no round that has it."""
    m = final(run, ASR.key)
    return None if m is None or finally_answered(run) is not None else (m,)


def _alone_at(record: RoundRecord) -> Parts | None:
    m = measure(record, ASR.key)
    return None if m is None or answered(record) is not None else (m,)


def _change_of(kind: Kind, cells: Mapping[str, Cell], sign: int) -> Callable[[Cell], Parts | None]:
    """(twin, cell) where sign is 1, (cell, twin) where it is -1, of the same seed."""

    def of(cell: Cell) -> Parts | None:
        twin = cells.get(cell.twin or "")
        if cell.finished is None or twin is None or twin.finished is None:
            return None
        own, other = final(cell.finished, kind.key), final(twin.finished, kind.key)
        if own is None or other is None or (kind == ASR and not asked_alike(cell.finished, twin.finished)):
            return None
        return (other, own) if sign > 0 else (own, other)

    return of
