"""The runs of a grid as compact data that the page draws when one is opened: small, and text only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm_sec.records.outcomes import lifespan, means_under_attack
from fedllm_sec.report.decided import clients_of, decisions_say, malicious_of, who_first
from fedllm_sec.report.grid.folder import Cell, Grid
from fedllm_sec.report.grid.tables import measured, number
from fedllm_sec.report.grid.views import ASR, View
from fedllm_sec.report.measures import detection_mean, flat, kinds, percent, plain, plural, series, written
from fedllm_sec.report.pairs import asked_alike
from fedllm_sec.report.plots import ends
from fedllm_sec.report.runs import Run, command_of
from fedllm_sec.report.tables import remarks, worst_class
from fedllm_sec.report.terms import as_yaml

CURVE_POINTS = 60
TOTAL_LETTERS = 3_000_000  # all decision maps of a page together, one letter a client and round
LARGEST_MAP = 6000
MOST_CLIENTS = 120
MOST_DIFFERENCES, MOST_INCIDENTS, LONGEST_VALUE = 40, 12, 300


def details(grid: Grid, shown: Sequence[View]) -> list[dict[str, Any]]:
    """One entry a cell, in the grid's order; what is not there is left out."""
    letters = min(LARGEST_MAP, TOTAL_LETTERS // max(1, len(grid.cells)))
    base = next((cell.run for cell in grid.cells if cell.run is not None), None)
    basis = dict(flat(base.recipe)) if base else {}
    places = {cell.folder: place for place, cell in enumerate(grid.cells)}
    runs = {cell.folder: cell.finished for cell in grid.cells}
    return [_entry(cell, shown, basis, letters, places, runs.get(cell.twin or "")) for cell in grid.cells]


def _entry(
    cell: Cell,
    shown: Sequence[View],
    basis: Mapping[str, Any],
    letters: int,
    places: Mapping[str, int],
    twin: Run | None,
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "slug": cell.slug,
        "axes": cell.shown_axes,
        "state": cell.state,
        "reason": cell.reason,
        "trace": cell.trace,
        "twin": places.get(cell.twin or ""),
        "is_twin": cell.is_twin,
    }
    if cell.run is None:
        return {key: value for key, value in entry.items() if value not in ("", None)}
    run = cell.run
    entry |= {
        "measures": _measures(cell, shown, twin),
        "remarks": remarks([run]),
        "curves": _curves(run),
        "decisions": decisions(run, letters),
        "incidents": _incidents(run),
        "differs": _differences(run, basis),
        "command": command_of(run),
        "warnings": list(run.warnings),
    }
    return {key: value for key, value in entry.items() if value not in ("", None, [])}


def _short(value: float | None) -> float | str | None:
    """Four digits; JSON has no NaN or infinity."""
    return None if value is None else float(f"{value:.4g}") if math.isfinite(value) else str(value)


def _measures(cell: Cell, shown: Sequence[View], twin: Run | None) -> list[list[str]]:
    """[title, value, interval] of everything measured when it was last taken."""
    views = [view for view in shown if cell.finished and view.key != ASR.key]  # that one is written as it is, below
    rows = [[view.title, *_pair(measured(view, [cell]))] for view in views]
    run = cell.run
    if run is None:
        return rows
    known = {view.key for view in views}
    quality, attack = kinds([run])
    for kind in (*quality, *attack):
        points = series(run, kind.key)
        if points and kind.key not in known:
            rows.append([kind.title, *_pair(number(points[-1], kind.unit))])
    worst = worst_class(run)
    if worst.measure is not None:
        rows.append(["accuracy of the worst class", *_pair(worst)])
    shares = (("tpr", "malicious dropped"), ("weight_share", "malicious weight share"), ("fpr", "honest dropped"))
    for key, title in shares:
        m = detection_mean(run, key)
        if m is not None:
            rows.append([title, percent(m.value), ""])
    area = detection_mean(run, "auc")
    if area is not None:
        rows.append(["AUC of its scores", written(area.value, "rate"), ""])
    return rows + _outcomes(run, twin)


def _outcomes(run: Run, twin: Run | None) -> list[list[str]]:
    """What the attack did to the aggregate, how well it hid, and how long a backdoor outlived it; means of rounds."""
    means = means_under_attack(run.records, run.attacked)
    stealth = means["stealth"] or {}
    rows = [
        [title, plain(value), ""]
        for title, value in (
            ("robustness ratio", means["robustness"]),
            ("norm rank of malicious rows", stealth.get("norm_rank")),
            ("cosine rank of malicious rows", stealth.get("cosine_rank")),
        )
        if value is not None
    ]
    stop = run.attack.get("stop")
    clean = twin.records if twin is not None and asked_alike(run, twin) else None
    lived = lifespan(run.records, stop, clean) if isinstance(stop, int) and clean is not None else None
    return [*rows, ["rounds the backdoor outlived the attack", lived_says(lived), ""]] if lived is not None else rows


def lived_says(lived: Mapping[str, Any]) -> str:
    """The bounds of a lifespan; the true number lies above the first and at or under the second."""
    if lived["value"] is None:
        return f"{lived['at_least']} or more: not fallen when last measured"
    return "0" if lived["value"] == 0 else f"{lived['at_least']} to {lived['value']}"


def _pair(entry: Any) -> list[str]:
    return [entry.text, entry.interval]


def _curves(run: Run) -> list[dict[str, Any]]:
    """Every measure that was taken more than once, thinned to CURVE_POINTS."""
    quality, attack = kinds([run])
    found = []
    for kind in (*attack, *quality):
        taken = series(run, kind.key)
        points = [m for m in taken if math.isfinite(m.value)]
        if len(taken) < 2 or len(points) < 1 or kind.key == "perplexity":
            continue
        step = math.ceil(len(points) / CURVE_POINTS)
        points = points[::-1][::step][::-1]  # the last is kept
        curve: dict[str, Any] = {
            "title": kind.title,
            "unit": kind.unit,
            "rounds": [m.round for m in points],
            "values": [_short(m.value) for m in points],
            "says": f"{kind.title}, round {taken[0].round} to {taken[-1].round}: {ends(taken, kind.unit)}.",
        }
        if all(m.low is not None for m in points):
            curve |= {"low": [_short(m.low) for m in points], "high": [_short(m.high) for m in points]}
        found.append(curve)
    return found


def decisions(run: Run, letters: int) -> dict[str, Any] | None:
    """What became of every client's row, one letter a round: k kept, d dropped, q quarantined, . took no part.

    For rules that weigh, a digit instead: 0 no weight, 5 an equal share, 9 nearly two or more. Rounds and honest
    clients are thinned where the map would have more than `letters`; `says` is about all of them and the true weights.
    None where the rule told neither.
    """
    selects = any(record.kept is not None for record in run.rounds)
    if not selects and not any(record.weights for record in run.rounds):
        return None
    everyone, bad = clients_of(run), malicious_of(run)
    ids = everyone[:MOST_CLIENTS] if len(bad) < MOST_CLIENTS else everyone[: 2 * MOST_CLIENTS : 2]
    step = math.ceil(len(ids) * len(run.rounds) / max(letters, len(ids)))
    records = run.rounds[step - 1 :: step] or run.rounds[-1:]

    def letter(record: Any, i: str) -> str:
        if i in record.quarantined:
            return "q"
        if i not in record.cohort:
            return "."
        if record.kept is not None:
            return "k" if i in record.kept else "d"
        weight = (record.weights or {}).get(i)
        if weight is None or not math.isfinite(weight):
            return "."
        return str(max(0, min(9, round(5 * weight * len(record.weights)))))

    rows = ["".join(letter(record, i) for record in records) for i in ids]
    out = sum(len(record.quarantined) for record in run.rounds)
    return {
        "ids": [i[:40] for i in ids],
        "malicious": sum(i in bad for i in ids),
        "who": who_first(run),
        "rounds": [record.round for record in records],
        "rows": rows,
        "of": len(everyone),
        "of_rounds": len(run.rounds),
        "selects": selects,
        "says": decisions_say(run) + (f" {plural(out, 'row')} quarantined in all rounds." if out else ""),
    }


def _incidents(run: Run) -> list[str]:
    found = [
        f"round {record.round}, client {i}: {reason}"[:LONGEST_VALUE]
        for record in run.records
        for i, reason in record.quarantined.items()
    ]
    found += [
        f"round {record.round} skipped: {record.skipped}"[:LONGEST_VALUE]
        for record in run.records
        if record.skipped is not None
    ]
    more = [f"and {len(found) - MOST_INCIDENTS} more in history.jsonl"] if len(found) > MOST_INCIDENTS else []
    return found[:MOST_INCIDENTS] + more


def _differences(run: Run, basis: Mapping[str, Any]) -> list[list[str]]:
    """The recipe keys in which this run differs from the grid's first one."""
    own = dict(flat(run.recipe))
    keys = [key for key in dict.fromkeys((*own, *basis)) if key.split(".")[0] != "output"]
    keys = [key for key in keys if own.get(key, "–") != basis.get(key, "–")]
    return [[key, _value(own, key)[:LONGEST_VALUE]] for key in keys[:MOST_DIFFERENCES]]


def _value(recipe: Mapping[str, Any], key: str) -> str:
    return as_yaml(recipe[key]) if key in recipe else "–"
