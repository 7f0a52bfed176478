"""The cells that differ in their seed only, as one row: means and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedllm_sec.evaluation.intervals import bootstrap, wilson

COUNTS = ("rounds", "skipped_rounds", "quarantined", "defense_peak_mb")  # and seconds: averaged without an interval
SCORES = "leak_"  # means of images and audits: their n counts what was scored, not tries with a rate
SEED = "seed"


def over_seeds(rows: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """A row for the cells that differ in the seed only: the mean of every measure with its interval.

    `seeds` of them exist and `done` are in the means. With two or more, X_low and X_high are a bootstrap interval of
    the mean over seeds; with one, they are the Wilson interval of that run's rate, and say nothing about other seeds.
    X_pooled_low and X_pooled_high are the Wilson interval of the rows of all seeds together: how well they were
    counted, not how much seeds differ; scores of privacy attacks are no rates and have none.
    """
    names = [axis for axis in axes if axis != SEED]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    fixed = {"cell", "status", "error", "is_twin", SEED, *names}
    numeric = [key for key in (rows[0] if rows else ()) if key not in fixed and "." not in key and _measured(rows, key)]
    made = []
    for labels, members in groups.items():
        done = [row for row in members if row["status"] == "done"]
        found: dict[str, Any] = {**dict(zip(names, labels, strict=True)), "seeds": len(members), "done": len(done)}
        found["failed"] = sum(row["status"] == "failed" for row in members)
        for key in numeric:
            if not key.endswith(("_low", "_high", "_n")):
                found |= _averaged(key, done)
        made.append(found)
    columns = sorted({key: None for row in made for key in row}, key=lambda key: _place(key, [*made[0], *numeric]))
    return [{column: row.get(column) for column in columns} for row in made]


def _place(column: str, order: Sequence[str]) -> tuple[int, str]:
    """A measure's mean, then its intervals and count, where its mean stands."""
    stem = column
    while stem not in order and "_" in stem:
        stem = stem.rpartition("_")[0]
    return order.index(stem) if stem in order else len(order), column


def _measured(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(isinstance(row[key], (int, float)) and not isinstance(row[key], bool) for row in rows)


def _averaged(key: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = [row for row in rows if row[key] is not None]
    values = [float(row[key]) for row in known]
    found: dict[str, Any] = {key: fmean(values) if values else None}
    if key in COUNTS or key.endswith("_seconds"):
        return found
    if len(values) > 1:
        found[f"{key}_low"], found[f"{key}_high"] = bootstrap(values)
    elif f"{key}_n" in (rows[0] if rows else {}):
        found |= {f"{key}_{part}": known[0][f"{key}_{part}"] if known else None for part in ("low", "high")}
    counted = all(row.get(f"{key}_n") and math.isfinite(row[key]) for row in known)
    if len(values) > 1 and counted and not key.startswith(SCORES):
        n = sum(int(row[f"{key}_n"]) for row in known)
        pooled = wilson(round(sum(row[key] * row[f"{key}_n"] for row in known)), n)
        found |= {f"{key}_pooled_{part}": (pooled or {}).get(part) for part in ("low", "high")} | {f"{key}_n": n}
    return found
