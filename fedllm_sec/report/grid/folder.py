"""A grid folder as the report reads it: grid.json and its cells, whatever state each of them is in."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from fedllm_sec.errors import FedError
from fedllm_sec.report import pairs
from fedllm_sec.report.measures import plural
from fedllm_sec.report.runs import VERSION, ReportError, Run, read_json, read_run

FORMAT = 1
ATTACK, DEFENSE, SEED = "attack", "defense", "seed"
BASE = "as in the base recipe"  # the label of an axis that the grid does not vary
NONE = "none"  # the label of an attack or defense that is switched off
ABSENT = "–"  # in place of what a cell does not have
LONGEST_REASON, LONGEST_TRACE = 600, 4000  # characters that a page repeats from an error.json
MOST_TOLD, MOST_ROWS = 10_000_000, 10**9  # characters of shared.jsonl that are read, rows that a line may tell of

DONE, PARTIAL, FAILED, WAITING, UNREADABLE = "done", "stopped", "failed", "not run", "unreadable"


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `run` is what could be read of it: always there if done, in part if stopped or failed."""

    folder: str  # as grid.json names it: cells/SLUG
    axes: Mapping[str, str]
    twin: str | None  # folder of the attack-free undefended run with the same other axes
    is_twin: bool
    state: str
    reason: str = ""  # why it is not done
    trace: str = ""
    run: Run | None = None
    also: tuple[Mapping[str, str], ...] = ()  # the labels of other combinations that are this very run

    @property
    def shown_axes(self) -> dict[str, str]:
        """Its labels, ABSENT where several come to this run: it does not have what they set."""
        shared = {axis for axis, label in self.axes.items() if all(at.get(axis) == label for at in self.also)}
        return {axis: label if axis in shared else ABSENT for axis, label in self.axes.items()}

    @property
    def stands_for(self) -> list[Cell]:
        """The cell once for each combination of labels that it is."""
        return [self, *(replace(self, axes=at) for at in self.also)]

    @property
    def slug(self) -> str:
        return PurePosixPath(self.folder).name

    @property
    def attack(self) -> str:
        return self.axes.get(ATTACK, BASE)

    @property
    def defense(self) -> str:
        return self.axes.get(DEFENSE, BASE)

    @property
    def seed(self) -> str:
        return self.axes.get(SEED, "")

    @property
    def finished(self) -> Run | None:
        """The run, if its numbers are final: a run stopped half-way counts in no mean."""
        return self.run if self.state == DONE else None


@dataclass(frozen=True)
class Shared:
    """How many clients' rows cells trained and took, and passes over held-out rows they made and took."""

    trained: int
    taken: int
    measured: int = 0
    found: int = 0

    def in_words(self, others: str) -> dict[str, str]:
        """What was taken from the `others`, where something was; a run may also repeat a pass of its own."""
        rows = f"{self.trained:,} trained, {self.taken:,} taken from {others}" if self.taken else ""
        passes = f"{self.measured:,} made, {self.found:,} not made again" if self.found else ""
        said = {"clients' rows": rows, "passes over held-out rows": passes}
        return {what: words for what, words in said.items() if words}


@dataclass(frozen=True)
class Grid:
    name: str
    folder: Path
    version: str  # of fedllm_sec, as grid.json says
    command: str
    axes: Mapping[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    warnings: tuple[str, ...] = ()
    shared: Shared | None = None  # what cells took from one another

    def in_state(self, *states: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.state in states]

    @property
    def runs(self) -> list[Run]:
        """The finished runs."""
        return [cell.run for cell in self.cells if cell.finished is not None and cell.run is not None]


def is_grid(folder: Path) -> bool:
    """Whether this is a grid folder, whole or not."""
    return (folder / "grid.json").is_file() or ((folder / "cells").is_dir() and not (folder / "history.jsonl").exists())


def read_grid(folder: Path) -> Grid:
    """The grid with all its cells; a cell that failed, stopped or has not run stays in it and says why.

    Errors: no grid.json, one of another format, or one that does not hold what it must.
    """
    path = folder / "grid.json"
    if not path.is_file():
        raise ReportError(
            f"{folder}: a half-written grid folder: it has cells/ but no grid.json. "
            "Start the benchmark again with the same command; it writes grid.json and skips the cells that are done."
        )
    try:
        content = read_json(path)
    except ReportError as error:
        raise ReportError(f"{error} Remove it, and start the benchmark again: it writes grid.json anew.") from error
    version = str(content.get("version", "unknown"))
    if content.get("format") != FORMAT:
        raise ReportError(
            f"{path}: has format {str(content.get('format'))[:40]}, written by fedllm_sec {version[:40]}; this is "
            f"fedllm_sec {VERSION}, which reads format {FORMAT}. Make the report with the version that wrote it."
        )
    cells = [_cell(folder, given, f"{path}, cells[{place}]") for place, given in enumerate(_listed(content, path))]
    _check(cells, path)
    warnings = [f"written by fedllm_sec {version}; this is {VERSION}."] if version != VERSION else []
    warnings += pairs.versions([cell.run for cell in cells if cell.run]) if version == VERSION else []
    warnings += [f"{cell.slug}: {text}" for cell in cells if cell.run for text in cell.run.warnings]
    warnings += _strangers(folder, cells)
    return Grid(
        name=str(content.get("name") or folder.resolve().name),
        folder=folder,
        version=version,
        command=_command(content.get("command")),
        axes=_axes(content.get("axes"), cells, path),
        cells=tuple(cells),
        warnings=tuple(warnings),
        shared=read_shared(folder),
    )


def read_shared(folder: Path) -> Shared | None:
    """What the cells made and took from one another, by shared.jsonl; None where it says nothing."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "shared.jsonl").read_text(encoding="utf-8")[:MOST_TOLD].splitlines():
            with contextlib.suppress(ValueError, LookupError, TypeError, OverflowError, RecursionError):
                told = json.loads(line)
                rows, passes = (told["trained"], told["taken"]), (told.get("measured", 0), told.get("found", 0))
                found.append([min(MOST_ROWS, max(0, int(count))) for count in (*rows, *passes)])
    return Shared(*map(sum, zip(*found, strict=True))) if found else None


def _command(given: Any) -> str:
    return " ".join(str(part) for part in given) if isinstance(given, list) else str(given or "")


def _listed(content: Mapping[str, Any], path: Path) -> list[Any]:
    cells = content.get("cells")
    if not isinstance(cells, list):
        raise ReportError(f'{path}: must hold {{"cells": [...]}}, got {type(cells).__name__}.')
    if not cells:
        raise ReportError(f"{path}: a grid of zero cells; there is nothing to report. Give its axes some values.")
    return cells


def _cell(grid: Path, given: Any, place: str) -> Cell:
    """One entry of grid.json with what its folder holds."""
    if not isinstance(given, dict) or not isinstance(given.get("folder"), str):
        raise ReportError(f'{place}: must be {{"folder": "cells/NAME", "axes": {{...}}}}, got {str(given)[:60]}.')
    folder = PurePosixPath(given["folder"])
    if folder.is_absolute() or ".." in folder.parts or len(folder.parts) < 1:
        raise ReportError(f"{place}: the folder {given['folder'][:80]!r} does not lie inside the grid folder.")
    twin, also = given.get("twin"), given.get("also", [])
    if not isinstance(also, list):
        raise ReportError(f"{place}.also: must be a list of {{axis: label}}, got {str(also)[:60]}.")
    axes = _labels_of(given.get("axes"), f"{place}.axes")
    if twin is not None and not isinstance(twin, str):
        raise ReportError(f"{place}.twin: must be the folder of another cell or null, got {str(twin)[:60]}.")
    cell = Cell(
        folder=str(folder),
        axes=axes,
        twin=twin,
        is_twin=given.get("is_twin") is True,
        state=WAITING,
        reason="the benchmark's command, started again, runs it",
        also=tuple(_labels_of(at, f"{place}.also[{number}]") for number, at in enumerate(also)),
    )
    return _look(cell, grid / Path(*folder.parts))


def _labels_of(given: Any, place: str) -> dict[str, str]:
    if not isinstance(given, dict):
        raise ReportError(f"{place}: must be {{axis: label}}, got {str(given)[:60]}.")
    return {str(axis): _label(label, f"{place}.{axis}") for axis, label in given.items()}


def _label(given: Any, place: str) -> str:
    if isinstance(given, (dict, list)):
        raise ReportError(f"{place}: a label must be text or a number, got {str(given)[:60]}.")
    return NONE if given is None else str(given)


def _look(cell: Cell, folder: Path) -> Cell:
    """The cell with its run and its state."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return cell
    run, trouble = None, ""
    try:
        run = read_run(folder)
    except FedError as error:
        trouble = str(error)
    planned = run.recipe.get("rounds") if run else None
    whole = run is not None and (run.records[-1].round >= planned if isinstance(planned, int) else False)
    closed = (folder / "summary.json").is_file()
    if (folder / "error.json").is_file() and not (whole and closed):
        reason, trace = _error(folder / "error.json")
        return replace(cell, state=FAILED, reason=reason, trace=trace, run=run)
    if run is None:
        begun = any((folder / name).is_file() for name in ("history.jsonl", "summary.json"))
        empty = begun and (folder / "history.jsonl").is_file() and not (folder / "history.jsonl").stat().st_size
        if not begun or empty:
            return replace(
                cell, state=WAITING, reason="it was started, but no round is recorded yet; the same command goes on"
            )
        return replace(cell, state=UNREADABLE, reason=trouble[:LONGEST_REASON])
    if not (whole or (closed and not isinstance(planned, int))):
        reason = f"after round {run.records[-1].round} of {planned}; the same command goes on from there"
        return replace(cell, state=PARTIAL, reason=reason, run=replace(run, warnings=()))
    if (folder / "error.json").is_file():
        run = replace(run, warnings=(*run.warnings, "error.json of an earlier try still lies in the folder."))
    return replace(cell, state=DONE, reason="", run=run)


def _error(path: Path) -> tuple[str, str]:
    """(type: message, traceback) of an error.json, as far as it can be read."""
    try:
        content = read_json(path)
    except FedError as error:
        return f"failed, and its reason cannot be read: {error}"[:LONGEST_REASON], ""
    kind, message = str(content.get("type") or "error"), str(content.get("message") or "no message")
    return f"{kind}: {message}"[:LONGEST_REASON], str(content.get("traceback") or "")[-LONGEST_TRACE:]


def _check(cells: Sequence[Cell], path: Path) -> None:
    """Cells are told apart by their folders and by their axes, and their twins are cells too."""
    folders = [cell.folder for cell in cells]
    twice = (
        next((name for name in folders if folders.count(name) > 1), None) if len(set(folders)) < len(cells) else None
    )
    if twice is not None:
        raise ReportError(f"{path}: two cells have the folder {twice!r}; each needs its own.")
    seen: dict[tuple[Any, ...], str] = {}
    for cell in [at for one in cells for at in one.stands_for]:
        key = (cell.is_twin, *sorted(cell.axes.items()))
        if key in seen:
            raise ReportError(
                f"{path}: {seen[key]} and {cell.folder} have the same axes; a cell must differ in one of them."
            )
        seen[key] = cell.folder
    known = set(folders)
    lost = next((cell for cell in cells if cell.twin is not None and cell.twin not in known), None)
    if lost is not None:
        raise ReportError(f"{path}: the twin of {lost.folder} is {str(lost.twin)[:80]!r}, which is no cell.")


def _axes(given: Any, cells: Sequence[Cell], path: Path) -> dict[str, tuple[str, ...]]:
    """The labels of every axis: in the order of grid.json, then those that only cells have."""
    if not isinstance(given, dict):
        raise ReportError(f'{path}: must hold {{"axes": {{axis: [labels]}}}}, got {type(given).__name__}.')
    axes: dict[str, tuple[str, ...]] = {}
    for axis, labels in given.items():
        if not isinstance(labels, list):
            raise ReportError(f"{path}, axes.{axis}: must be a list of labels, got {str(labels)[:60]}.")
        axes[str(axis)] = tuple(_label(label, f"{path}, axes.{axis}") for label in labels)
    everything = [at for cell in cells for at in cell.stands_for]
    for axis in (*axes, *dict.fromkeys(name for at in everything for name in at.axes)):
        # the twin's "none" is not an attack of the grid unless other cells or the axis itself name it
        used = dict.fromkeys(at.axes[axis] for at in everything if axis in at.axes and not at.is_twin)
        axes[axis] = tuple(dict.fromkeys((*axes.get(axis, ()), *used)))
    return axes


def _strangers(folder: Path, cells: Sequence[Cell]) -> list[str]:
    """Folders in cells/ that grid.json does not name."""
    if not (folder / "cells").is_dir():
        return []
    known = {cell.folder for cell in cells}
    found = sorted(p.name for p in (folder / "cells").iterdir() if p.is_dir() and f"cells/{p.name}" not in known)
    if not found:
        return []
    names = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
    return [f"cells/ holds {plural(len(found), 'folder')} that grid.json does not name, left out: {names}."]
