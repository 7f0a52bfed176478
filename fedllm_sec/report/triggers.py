"""What an image attack puts in, and what the models say to it: from trigger.json of the run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm_sec.report import pairs
from fedllm_sec.report.privacy import is_png
from fedllm_sec.report.runs import ReportError, Run, read_json
from fedllm_sec.report.said import chosen, what_it_is

NAME = "trigger.json"
MOST = 8  # images that are shown
LARGEST = 16 * 2**20  # bytes of a file that is read
PARTS = ("clean", "triggered", "difference")


@dataclass(frozen=True)
class Said:
    """What one model says to an image, without and with the trigger; `kind` is bad where the trigger wins.

    `own`: with the trigger that was learnt against this model, which is not the one that is shown.
    """

    clean: str
    triggered: str
    kind: str
    own: bool = False


@dataclass(frozen=True)
class Image:
    """An image in its three forms, PNG files in base 64, with its class, the wanted one, and each model's answers."""

    files: tuple[str, str, str]
    right: str
    wanted: str
    cells: list[Said | None]


@dataclass(frozen=True)
class Shown:
    """The models' names and what they are, and the images."""

    names: list[tuple[str, str]]
    images: list[Image]


def triggers(runs: Sequence[Run]) -> Shown | None:
    """The images of one federation's runs side by side; None where no run drew any."""
    read = {run.name: _rows(run.folder) for group in pairs.federations(runs)[:1] for run in chosen(group)}
    there = [run for run in runs if read.get(run.name)]
    if not there:
        return None
    first = max(there, key=lambda run: (run.attacked, not run.defended))
    known = {run.name: {row[part]: row for part in ("clean", "triggered") for row in read[run.name]} for run in there}
    images = [
        Image(
            files=tuple(row[part] for part in PARTS),  # type: ignore[arg-type]
            right=str(row["right"]),
            wanted=str(row["wanted"]),
            cells=[_said(known[run.name], row) for run in there],
        )
        for row in read[first.name][:MOST]
    ]
    return Shown([(run.name, what_it_is(run)) for run in there], images)


def _rows(folder: Path) -> list[Mapping[str, Any]]:
    """What of the file is as a run writes it, whoever wrote it."""
    path = folder / NAME
    if not path.is_file() or path.stat().st_size > LARGEST:
        return []
    try:
        found = read_json(path).get("images")
    except (ReportError, OSError):
        return []
    return [row for row in found if _fits(row)] if isinstance(found, list) else []


def _fits(row: Any) -> bool:
    numbers = ("right", "wanted", "said", "said_triggered")
    return (
        isinstance(row, Mapping)
        and all(type(row.get(name)) is int for name in numbers)
        and all(is_png(row.get(part)) for part in PARTS)
    )


def _said(known: Mapping[str, Mapping[str, Any]], shown: Mapping[str, Any]) -> Said | None:
    """What a model whose rows are `known` by their pictures says to the one that is shown."""
    row = known.get(shown["triggered"])
    if row is None and shown.get("learnt") is True:
        row = known.get(shown["clean"])
        row = row if row is not None and row.get("learnt") is True else None
    if row is None:
        return None
    kind = "bad" if row["said_triggered"] == row["wanted"] else "other"
    kind = "good" if row["said_triggered"] == row["right"] else kind
    return Said(_class(row["said"]), _class(row["said_triggered"]), kind, row["triggered"] != shown["triggered"])


def _class(number: int) -> str:
    return "nothing" if number < 0 else str(number)
