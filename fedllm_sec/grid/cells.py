"""Running the cells of a grid: any number of processes walk over them, each cell is run by one at a time.

A process holds a cell through a lock that the operating system takes back when the process ends, however it ends: a
killed process leaves nothing to clean up, and its cell goes on from its last whole round wherever it is found next.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from fedllm_sec.build.loaded import Loaded, measuring_key, training_key
from fedllm_sec.build.plan import planned
from fedllm_sec.build.running import make_machine, run_one
from fedllm_sec.errors import FedError, ResumeError, reason
from fedllm_sec.grid.grid import Cell, Grid
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.records import files, inventory
from fedllm_sec.records.files import write_json
from fedllm_sec.records.folder import as_words, differences, read_recipe
from fedllm_sec.rounds.sharing import FOUND, MEASURED, TAKEN, TRAINED, measured_once, shared
from fedllm_sec.rounds.store import Store

FORMAT = 1  # of grid.json
SHARED = ".rows"  # where rows and measured numbers lie while a grid runs
TOLD = "shared.jsonl"  # of each cell that was run, what was made in it and what was taken from others
WAIT = 0.5  # seconds between looks at cells that other processes run


# ---------------------------------------------------------------- where a cell stands


def status(cell: Cell) -> str:
    """done, failed, unfinished or not started, from the cell's folder alone."""
    closed, error = cell.folder / inventory.SUMMARY, cell.folder / "error.json"
    if closed.exists() and not (error.exists() and error.stat().st_mtime_ns > closed.stat().st_mtime_ns):
        return "done"
    if error.exists():
        return "failed"
    history = cell.folder / "history.jsonl"
    return "unfinished" if history.exists() and history.stat().st_size else "not started"


def error_of(cell: Cell) -> dict[str, Any]:
    """What error.json says: type, message, traceback and time."""
    try:
        content = json.loads((cell.folder / "error.json").read_text(encoding="utf-8"))
        return {**content, "time": float(content.get("time", 0.0))}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def damage(cell: Cell) -> dict[str, str]:
    """{file: what is wrong with it} of a cell that is done."""
    return inventory.damage(cell.folder) if status(cell) == "done" else {}


def settled(cell: Cell, started: float) -> bool:
    """Nothing is left to do: done, or failed since `started` (an older failure is tried again)."""
    return status(cell) == "done" or error_of(cell).get("time", 0.0) >= started


# ---------------------------------------------------------------- running


def held(grid: Path, cell: Cell) -> contextlib.AbstractContextManager[bool]:
    """Whether this process has the cell to itself; until the end of the block."""
    return files.locked(grid / ".locks" / cell.slug)


def holder(grid: Path, cell: Cell) -> int | None:
    """The process that holds the cell, or held it when it was killed."""
    return files.holder(grid / ".locks" / cell.slug)


def walk(
    grid: Path,
    cells: Sequence[Cell],
    *,
    command: str,
    started: float,
    tell: Callable[[Cell, float], None],
    most_threads: int | None = None,
    between: Callable[[], None] = lambda: None,
    share: bool = True,
) -> None:
    """Run every cell that nobody else runs, and wait for those that others do: at the end all are settled.

    `tell` hears of each cell run here and its seconds; `between` is called after every round. A cell that is done and
    was damaged comes by once more: what was lost is made again, or it fails and says what cannot be. With `share` rows
    that another cell has trained and numbers that it has measured are taken from it.
    """
    loaded, machine, configured = Loaded(), None, None
    store = Store.at(grid / SHARED) if share else None
    damaged = {cell.slug for cell in cells if damage(cell)}
    while True:
        elsewhere = False
        for cell in cells:
            if settled(cell, started) and cell.slug not in damaged:
                continue
            with held(grid, cell) as mine:
                if not mine:
                    elsewhere = True
                    continue
                damaged.discard(cell.slug)
                if settled(cell, started) and not damage(cell):
                    continue
                begun, wanted = time.monotonic(), cell.recipe.compute
                try:
                    if machine is None or wanted != configured:
                        _forget_accelerator()
                        machine, configured = make_machine(cell.recipe, grid, most_threads), wanted
                    (cell.folder / "error.json").unlink(missing_ok=True)
                    plan, ours = planned(cell.recipe), f"{command} --only {cell.slug}"
                    source, measure = _among(store, cell)
                    run_one(plan, machine, ours, loaded, lambda line: between(), grid, source, measure)
                    if store is not None:
                        tell_shared(grid, cell, store)
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # whatever a cell dies of, the others go on
                    loaded.clear()
                    record_error(cell, error)
            tell(cell, time.monotonic() - begun)
        if not elsewhere:
            return
        between()
        time.sleep(WAIT)


def record_error(cell: Cell, error: BaseException) -> None:
    """Write error.json into the cell's folder."""
    told = "".join(traceback.format_exception(error))
    write_json(
        cell.folder / "error.json",
        {"type": type(error).__name__, "message": str(error), "traceback": told, "time": time.time()},
    )


def _among(store: Store | None, cell: Cell) -> tuple[Any, Any]:
    """Where a cell takes rows and measured numbers from; None for what is made in it."""
    training, measuring = training_key(cell.recipe), measuring_key(cell.recipe)
    if store is None or training is None or measuring is None:
        return None, None
    return shared(store, training), functools.partial(measured_once, store, measuring)


def tell_shared(grid: Path, cell: Cell, store: Store) -> None:
    """Write down how many rows and passes of a cell were made in it and how many were taken, and count anew."""
    line = {"cell": cell.slug, **{what: store.counts[what] for what in (TRAINED, TAKEN, MEASURED, FOUND)}}
    store.counts.clear()
    with contextlib.suppress(OSError):
        files.append(grid / TOLD, (json.dumps(line) + "\n").encode())


def _forget_accelerator() -> None:
    """accelerate keeps one configuration for the whole process; cells may want another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)


# ---------------------------------------------------------------- before anything runs


def describe(grid: Grid, command: str) -> dict[str, Any]:
    """The content of grid.json, which the report reads."""
    return {
        "format": FORMAT,
        "name": grid.name,
        "version": _version(),
        "command": command,
        "axes": {axis: [*labels] for axis, labels in grid.axes.items()},
        "cells": [
            {
                "folder": f"cells/{cell.slug}",
                "axes": dict(cell.axes),
                "twin": None if cell.twin is None else f"cells/{cell.twin}",
                "is_twin": cell.twin is None,
                **({"also": [dict(at) for at in cell.also]} if cell.also else {}),
            }
            for cell in grid.cells
        ],
    }


def refuse_conflicts(grid: Grid) -> None:
    """An error that names everything in the grid's folder which this grid cannot go on with; nothing is written."""
    problems = _grid_conflicts(grid)
    for cell in grid.cells:
        problems += _cell_conflicts(cell)
    if problems:
        lines = "".join(f"\n  {i}. {problem}" for i, problem in enumerate(problems, 1))
        raise ResumeError(f"{grid.folder}: nothing was run and nothing changed:{lines}")


def _grid_conflicts(grid: Grid) -> list[str]:
    linked = [name for name in ("cells", ".locks") if (grid.folder / name).is_symlink()]
    if linked:
        return [f"{linked[0]} is a link to elsewhere, through which nothing is written. Move it away."]
    strange = [name for name in ("recipe.yaml", "history.jsonl", "comparison.json") if (grid.folder / name).exists()]
    if strange:
        return [f"it is the folder of another run ({strange[0]}). Give output.folder another name."]
    path = grid.folder / "grid.json"
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        made_by, layout, name = found["version"], found["format"], found["name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"grid.json cannot be read ({reason(error)}). Restore it, or remove it: it is written anew."]
    if layout != FORMAT or made_by != _version():
        return [
            f"grid.json was written by fedllm_sec {made_by} (format {layout}), this is {_version()} (format {FORMAT}). "
            "Go on with that version, or give output.folder another name."
        ]
    if name != grid.name:
        return [f"it holds the grid {name!r}, not {grid.name!r}. Give output.folder another name."]
    return []


def _cell_conflicts(cell: Cell) -> list[str]:
    folder, place = cell.folder, f"cells/{cell.slug}"
    if folder.is_symlink():
        return [f"{place} is a link to elsewhere, through which nothing is written. Move it away."]
    if not folder.exists():
        return []
    if not folder.is_dir():
        return [f"{place} is not a folder. Move it away."]
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        if status(cell) in ("done", "unfinished"):
            return [f"{place} has a history but no recipe.yaml. Restore it, or move the folder away."]
        return []
    try:
        different = differences(read_recipe(recipe), yaml.safe_load(recipes.dump(cell.recipe)))
    except FedError as error:
        return [
            f"{error} So it is not known which run {place} holds. Restore the file, or move the folder "
            f"{folder} away: then that cell is run anew, and the others stay as they are."
        ]
    different.pop("output.folder", None)  # a grid's folder may be moved
    if different:
        return [
            f"{place} was made with another recipe: {'; '.join(as_words(different)[:3])}. Undo the change, move the "
            "folder away, or give output.folder another name."
        ]
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        made_by = json.loads((folder / "environment.json").read_text(encoding="utf-8")).get("fedllm_sec")
        if made_by != _version():
            return [
                f"{place} was made by fedllm_sec {made_by}, this is {_version()}. Go on with that version, move the "
                "folder away, or give output.folder another name."
            ]
    return []


def _version() -> str | None:
    try:
        return version("fedllm_sec")
    except PackageNotFoundError:
        return None
