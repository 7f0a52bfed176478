"""The results of a grid as tidy tables: a row for every cell, and a row for every cell over its seeds.

A cell that failed or was not reached is a row with its status and no measures: nothing is left out.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fedllm_sec.errors import FedError
from fedllm_sec.grid.axes import SWITCHED
from fedllm_sec.grid.cells import error_of, status
from fedllm_sec.grid.grid import Cell, Grid
from fedllm_sec.grid.seeds import over_seeds
from fedllm_sec.records.files import write_atomic
from fedllm_sec.records.history import DETAILS, RoundRecord, read_history
from fedllm_sec.records.outcomes import (
    DETECTION,
    STEALTH,
    lifespan,
    means_under_attack,
    numbers,
    quality_drop,
    same_probe,
    worst_classes,
)
from fedllm_sec.report.measures import written

ATTACK = ("asr", "false_trigger")


def write(grid: Grid) -> list[Path]:
    """results.csv, results.parquet and results_by_cell.csv in the grid's folder."""
    rows = table(grid)
    made = {
        "results.csv": as_csv(rows),
        "results.parquet": as_parquet(rows),
        "results_by_cell.csv": as_csv(over_seeds(rows, grid.axes)),
    }
    for name, data in made.items():
        write_atomic(grid.folder / name, data)
    return [grid.folder / name for name in made]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV: what was not measured is empty, what was measured and is not a number says nan, inf or -inf."""
    text = io.StringIO()
    made = csv.writer(text, lineterminator="\n")
    made.writerow(rows[0] if rows else ())
    made.writerows(row.values() for row in rows)
    return text.getvalue().encode()


def as_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as Parquet: what was not measured is null, and NaN is NaN; a column of several types is text."""
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, Any] = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pyarrow.array(values, from_pandas=False)
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------- a row for every cell


def table(grid: Grid) -> list[dict[str, Any]]:
    """One row a cell, in the grid's order; every row has every column.

    Measures are those of the last evaluated round of a cell that is done. `X_drop` is what a quality measure lost
    against the twin (above 0: worse, also for loss), `asr_rise` and `false_trigger_rise` what the attack gained where
    both were asked the same. An axis that a cell does not have, such as the setting of a defense that is off, is
    empty; a measure that has the name of an axis or of a recipe key stands as measured.NAME.
    """
    done, cells = {cell.slug: _finished(cell) for cell in grid.cells}, {cell.slug: cell for cell in grid.cells}
    varied = varying_keys(grid)
    rows = []
    for cell in grid.cells:
        settings, run = _settings(cell), done[cell.slug]
        flat, state, why = flatten(settings), status(cell), None
        found: dict[str, Any] = {}
        if state == "done" and run is None:
            state = "unfinished"
        elif state == "done":
            twin = cells[cell.twin] if cell.twin is not None else None
            try:
                found = _found(cell, run, twin, None if twin is None else done[twin.slug])
            except NOT_A_RUN as error:  # one cell does not take the table from the others
                state, why = "damaged", str(error)
        elif state == "failed":
            told = error_of(cell)
            why = f"{told.get('type', 'error')}: {told.get('message', '')}"
        row: dict[str, Any] = {"cell": cell.slug, "status": state, "error": why, "is_twin": cell.twin is None}
        row |= {axis: label_in(cell, axis, settings) for axis in grid.axes}
        row |= {key: flat.get(key) for key in varied if key not in row}
        taken = {*row}
        row |= {f"measured.{name}" if name in taken else name: value for name, value in found.items()}
        rows.append(row)
    columns = list(dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row))
    return [{column: row.get(column) for column in columns} for row in rows]


Finished = tuple[Mapping[str, Any], Sequence[RoundRecord]]  # summary.json and the records
NOT_A_RUN = (ValueError, TypeError, LookupError, AttributeError, RecursionError)  # what strange content can raise


def _finished(cell: Cell) -> Finished | FedError | None:
    """What a cell that is done left, or why its history cannot be read."""
    summary = _summary(cell)
    if summary is None or status(cell) != "done":
        return None
    try:
        return summary, read_history(cell.folder)
    except FedError as error:
        return error


def _found(cell: Cell, run: Finished | FedError | None, twin: Cell | None, other: Any) -> dict[str, Any]:
    """What a cell that is done measured, also against its twin where that one can be read."""
    if not isinstance(run, tuple):
        raise run or FedError("it has no results")
    return measures(cell, *run) | (against(cell, run, twin, other) if twin and isinstance(other, tuple) else {})


def _summary(cell: Cell) -> dict[str, Any] | None:
    try:
        found = json.loads((cell.folder / "summary.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def _settings(cell: Cell) -> dict[str, Any]:
    """The recipe that acts: of an attack that is off, only the data attack that is asked for."""
    settings = cell.recipe.model_dump(mode="json", exclude={"output", "variants", "enable_attack", "enable_defense"})
    if not cell.recipe.enable_attack and settings["attack"] is not None:
        settings["attack"] = {"data": settings["attack"]["data"]}
    return dict(settings)


def label_in(cell: Cell, axis: str, settings: Mapping[str, Any]) -> Any:
    """What a cell has on an axis: the setting's value, else its label; None where it has no such setting.

    A cell that stands for several labels of an axis is one for which it makes no difference.
    """
    label = cell.axes[axis]
    if axis in SWITCHED:
        return label
    if any(at[axis] != label for at in cell.also):
        return None
    path = axis.split(".")
    if path[0] not in settings:  # a name of one's own
        return label
    here: Any = settings
    for part in path:
        here = here.get(part) if isinstance(here, Mapping) else None
    return label if isinstance(here, (Mapping, list)) else here


def varying_keys(grid: Grid) -> list[str]:
    """The recipe keys in which at least two cells differ."""
    flat = [flatten(_settings(cell)) for cell in grid.cells]
    keys = dict.fromkeys(key for row in flat for key in row)
    return [key for key in keys if len({json.dumps(row.get(key)) for row in flat}) > 1]


def flatten(value: Any, place: str = "") -> dict[str, Any]:
    """Leaves by their place: {"clients.lr": 0.001, "attack.update.0.name": "alie"}; None and empty blocks have none."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        parts = enumerate(value)  # type: ignore[assignment]
    elif isinstance(value, list):
        return {place: ", ".join(map(str, value))} if value else {}
    else:
        return {} if value is None else {place: value}
    return {k: v for key, part in parts for k, v in flatten(part, f"{place}.{key}" if place else str(key)).items()}


def measures(cell: Cell, summary: Mapping[str, Any], records: Sequence[RoundRecord]) -> dict[str, Any]:
    """Numbers of one run by column."""
    row: dict[str, Any] = {"rounds": summary.get("rounds")}
    for name, given in {**(summary.get("quality") or {}), **(summary.get("attack") or {})}.items():
        if name in DETAILS:
            continue
        if isinstance(given, Mapping):
            row[name] = _number(given.get("value"))
            row |= {f"{name}_{part}": _number(given.get(part)) for part in ("low", "high", "n")}
        elif given is not None:
            row[name] = _number(given)
    worst = worst_classes(summary.get("quality"))
    row["worst_class_accuracy"] = None if worst is None else _number(worst[1]["value"])
    means = means_under_attack(records, cell.recipe.attacked)
    row |= {f"detection_{name}": (means["detection"] or {}).get(name) for name in DETECTION}
    row["robustness"] = means["robustness"]
    row |= {f"stealth_{name}": (means["stealth"] or {}).get(name) for name in STEALTH}
    row |= _lived(cell, records, None)
    row["skipped_rounds"], row["quarantined"] = summary.get("skipped_rounds"), summary.get("quarantined")
    row |= {f"{name}_seconds": seconds for name, seconds in (summary.get("seconds") or {}).items()}
    peaks = [float(r.memory_mb["defense"]) for r in records if "defense" in r.memory_mb]
    row["defense_peak_mb"] = max(peaks, default=None)
    return row | leaks(summary)


def leaks(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What each privacy attack of a run has learnt: a column for each score, and how many observations gave none.

    A method that stands several times in a recipe is told by those of its settings that are words.
    """
    found: dict[str, Any] = {}
    for attack in summary.get("leakage") or []:
        words = [value for value in attack["settings"].values() if isinstance(value, str)]
        name = "_".join(["leak", attack["name"], *words])
        for score, given in attack["scores"].items():
            values = given if isinstance(given, Mapping) else {"value": given}
            found[f"{name}_{score}"] = _number(values.get("value"))
            found |= {
                f"{name}_{score}_{part}": _number(values[part]) for part in ("low", "high", "n") if part in values
            }
        found[f"{name}_not_applicable"] = attack["not_applicable"]
    return found


def _lived(cell: Cell, records: Sequence[RoundRecord], clean: Sequence[RoundRecord] | None) -> dict[str, Any]:
    """Against the attack-free run that was asked the same; empty without one, so that a column holds one kind."""
    attack = cell.recipe.attack if cell.recipe.enable_attack and clean is not None else None
    found = lifespan(records, attack.stop if attack is not None else None, clean) or {}
    return {f"lifespan_{name}": found.get(name) for name in ("value", "at_least")}


def against(cell: Cell, run: Finished, twin: Cell, other: Finished) -> dict[str, Any]:
    """What a run lost, and its attack gained, against its twin."""
    found: dict[str, Any] = {f"{name}_drop": value for name, value in quality_drop(run[0], other[0]).items()}
    asked = [None if c.recipe.attack is None else c.recipe.attack.model_dump() for c in (cell, twin)]
    if not same_probe(*asked):
        return found
    own, base = (numbers(summary.get("attack")) for summary, _ in (run, other))
    found |= {f"{name}_rise": own[name] - base[name] for name in ATTACK if name in own and name in base}
    return found | _lived(cell, run[1], other[1])


def _number(value: Any) -> Any:
    """JSON has no infinity; the history writes it as text."""
    return float(value) if isinstance(value, str) else value


def _mean(values: Any) -> float | None:
    known = [float(value) for value in values if value is not None]
    return fmean(known) if known else None


# ---------------------------------------------------------------- on the terminal


def as_text(grid: Grid) -> str:
    """Attack by defense: the main quality measure, attack success, false triggers, as means over the rest."""
    rows = table(grid)
    quality = next((q for q in ("accuracy", "exact_match", "loss") if any(r.get(q) is not None for r in rows)), None)
    if quality is None:
        return "no cell is done yet."
    attacks, defenses = grid.axes["attack"], grid.axes["defense"]

    def cell(attack: str, defense: str) -> str:
        members = [row for row in rows if row["attack"] == attack and row["defense"] == defense]
        done = [row for row in members if row["status"] == "done"]
        if not members:
            return ""
        if not done:
            return members[0]["status"]
        found = [(key, _mean(row.get(key) for row in done)) for key in (quality, *ATTACK)]
        if found[1][1] is None:  # no attack success: no trigger
            del found[1:]
        units = ((value, "number" if key == "loss" else "rate") for key, value in found)
        text = " / ".join("n/a" if value is None else written(value, unit) for value, unit in units)
        return text if len(done) == len(members) else f"{text} ({len(done)} of {len(members)})"

    title = f"{quality} / attack success / false triggers"
    lines = [[title, *defenses], *([attack, *(cell(attack, d) for d in defenses)] for attack in attacks)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(f"{part:<{w}}" for part, w in zip(line, widths, strict=True)).rstrip() for line in lines)
