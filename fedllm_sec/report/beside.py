"""Tables beside the main one: each data attack by name, changed triggers, each client, public tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedllm_sec.errors import FedError
from fedllm_sec.report.measures import Measure, interval, name_of, plain, written
from fedllm_sec.report.runs import Run, methods, read_json
from fedllm_sec.report.tables import NOT_MEASURED, Cell, Column, Table

MOST_ROWS, MOST_COLUMNS = 60, 16
HOW = ("draws", "second", "judge_failed", "attacks")  # what makes a table by name worth its place


def tables(runs: Sequence[Run]) -> list[tuple[str, Table]]:
    """Titles and tables, those that there are."""
    found = (
        ("Attack by attack", by_name(runs)),
        ("How far the trigger carries", generalised(runs)),
        ("Client by client", each_client(runs)),
        ("Public tasks", public(runs)),
    )
    return [(title, table) for title, table in found if table is not None]


def _last(run: Run) -> Mapping[str, Any] | None:
    return next((record.attack for record in reversed(run.records) if record.attack is not None), None)


def _blocks(runs: Sequence[Run]) -> Iterator[tuple[Run, str, Mapping[str, Any]]]:
    """Of every run each data attack by name, with what was last measured of it."""
    for run in runs:
        block = _last(run)
        if block is None:
            continue
        recipe = run.recipe.get("attack")
        first = methods(recipe if isinstance(recipe, Mapping) else {}, "data")[:1]
        named = block.get("attacks") or {name_of(first[0]) if first else "attack": block}
        yield from ((run, name, own) for name, own in named.items())


def _rate(given: Any, unit: str = "percent") -> Cell:
    if isinstance(given, (int, float)):
        return Cell(f"{given:.0f}" if unit == "number" else written(float(given), unit), sort=float(given))
    if not isinstance(given, Mapping) or given.get("value") is None:
        return Cell(NOT_MEASURED)
    m = Measure(given["value"], given.get("low"), given.get("high"))
    return Cell(written(m.value, unit), interval(m, unit), m.value, m)


def _table(head: list[Column], rows: list[list[Cell]], columns: list[tuple[Column, list[Cell]]], note: str) -> Table:
    """Columns in which nothing was measured are left out."""
    kept = [(c, cells) for c, cells in columns if any(cell.text != NOT_MEASURED for cell in cells)][:MOST_COLUMNS]
    whole = [[*row, *(cells[i] for _, cells in kept)] for i, row in enumerate(rows)]
    more = len(whole) - MOST_ROWS
    return Table([*head, *(c for c, _ in kept)], whole[:MOST_ROWS], note + (f" {more} more rows." if more > 0 else ""))


HEAD = [Column("run", "run", "text"), Column("attack", "data attack", "text")]


def by_name(runs: Sequence[Run]) -> Table | None:
    """Each data attack's own rates, means over draws, and what a second judge says; None where none is asked for."""
    blocks = list(_blocks(runs))
    if not any(key in (_last(run) or {}) for run in runs for key in HOW):
        return None

    def get(own: Mapping[str, Any], *path: str) -> Any:
        for key in path:
            own = (own or {}).get(key)  # type: ignore[assignment]
        return own

    wanted = (
        ("attack success", "percent", ("asr",)),
        ("false triggers", "percent", ("false_trigger",)),
        ("attack success, mean of draws", "percent", ("draws", "asr_mean")),
        ("false triggers, mean of draws", "percent", ("draws", "false_trigger_mean")),
        ("attack success, second judge", "percent", ("second", "asr")),
        ("false triggers, second judge", "percent", ("second", "false_trigger")),
        ("judges agree", "percent", ("second", "agreement")),
        ("Cohen’s kappa", "rate", ("second", "agreement", "kappa")),
        ("answers a judge failed on", "number", ("judge_failed",)),
    )
    columns = [
        (Column(title, title, unit), [_rate(get(own, *path), unit) for _, _, own in blocks])
        for title, unit, path in wanted
    ]
    rows = [[Cell(run.name), Cell(name)] for run, name, _ in blocks]
    note = "At the last evaluation. With several draws a prompt counts where one of them is a success."
    return _table(HEAD, rows, columns, f"{note} kappa is agreement beyond chance: 1 is all, 0 is none.")


def generalised(runs: Sequence[Run]) -> Table | None:
    """Attack success by how the trigger was changed at test time, and by how many turns ago it was."""
    blocks = [(run, name, own, _ways(own)) for run, name, own in _blocks(runs) if _ways(own)]
    ways = list(dict.fromkeys(way for *_, own in blocks for way in own))
    if not ways:
        return None
    columns = [(Column("asr", "as trained", "percent"), [_rate(own.get("asr")) for _, _, own, _ in blocks])]
    columns += [(Column(way, way, "percent"), [_rate(own.get(way)) for *_, own in blocks]) for way in ways]
    rows = [[Cell(run.name), Cell(name)] for run, name, *_ in blocks]
    note = "Attack success where the trigger was changed in the held-out prompts alone, or where turns lie behind it."
    return _table(HEAD, rows, columns, note)


def _ways(own: Mapping[str, Any]) -> dict[str, Any]:
    """How the trigger was changed, or how many turns ago it was -> attack success."""
    turns = {f"{turns} turns later" if turns != "0" else "in the last turn": rate
             for turns, rate in (own.get("turns_since") or {}).items()}  # fmt: skip
    return {**(own.get("generalise") or {}), **turns}


def each_client(runs: Sequence[Run]) -> Table | None:
    """The last model with what each client keeps: running statistics (model.buffers: local), B (average: share_a)."""
    blocks = []
    for run in runs:
        quality = next((record.quality for record in reversed(run.records) if record.quality is not None), None)
        rates, hits = _per_client(quality), _per_client(_last(run))
        blocks += [(run, id, {**rates.get(id, {}), **hits.get(id, {})}) for id in {**rates, **hits}]
    if not blocks:
        return None
    wanted = (
        ("accuracy", "rate", "accuracy"), ("exact match", "rate", "exact_match"), ("attack success", "percent", "asr"),
        ("false triggers", "percent", "false_trigger"),
    )  # fmt: skip
    columns = [
        (Column(key, title, unit), [_rate(own.get(key), unit) for *_, own in blocks])
        for title, unit, key in wanted
        if key != "exact_match" or any(key in own for *_, own in blocks)
    ]
    rows = [[Cell(run.name), Cell(id)] for run, id, _ in blocks]
    note = (
        "After the last round, on the same held-out rows: the global model with the running statistics or B factors "
        "that the client keeps as its own. A malicious client keeps some too."
    )
    return _table([HEAD[0], Column("client", "client", "text")], rows, columns, note)


def _per_client(block: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    found = (block or {}).get("per_client")
    return {id: own for id, own in found.items() if isinstance(own, Mapping)} if isinstance(found, Mapping) else {}


def public(runs: Sequence[Run]) -> Table | None:
    """lm-evaluation-harness before the first round and after the last, from harness.json."""
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for run in runs:
        try:
            file = read_json(run.folder / "harness.json")
        except FedError:
            continue
        before, after = (_flat(file.get(when)) for when in ("before", "after"))
        found[run.name] = {key: (before.get(key), after.get(key)) for key in {**before, **after}}
    keys = list(dict.fromkeys(key for own in found.values() for key in own))
    if not keys:
        return None
    columns = [(Column(key, key, "number"), [_pair(own.get(key)) for own in found.values()]) for key in keys]
    note = "lm-evaluation-harness: before the first round → after the last, ± standard error of the latter."
    return _table([Column("run", "run", "text")], [[Cell(name)] for name in found], columns, note)


def _flat(block: Any) -> dict[str, Mapping[str, Any]]:
    """ "task metric" -> {value, stderr}, of what is of its kind."""
    tasks = block.items() if isinstance(block, Mapping) else ()
    return {
        f"{task} {metric}": m
        for task, metrics in tasks
        if isinstance(metrics, Mapping)
        for metric, m in metrics.items()
        if isinstance(m, Mapping) and type(m.get("value")) in (int, float)
    }


def _pair(given: tuple[Any, Any] | None) -> Cell:
    before, after = given or (None, None)
    if before is None and after is None:
        return Cell(NOT_MEASURED)
    texts = [NOT_MEASURED if m is None else plain(float(m["value"])) for m in (before, after)]
    error = after.get("stderr") if after is not None else None
    shown = f"± {plain(float(error))}" if isinstance(error, (int, float)) else ""
    return Cell(" → ".join(texts), shown, float((after or before)["value"]))
