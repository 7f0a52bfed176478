"""Synthetic grid folders: grid.json and cells/, with cells that failed, stopped or have not run on request."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedllm_sec.records.files import write_json
from tests.report.conftest import write_run

# what an attack does to accuracy where nothing holds it, whether it plants a trigger, and what its attackers see
ATTACKS: dict[str, tuple[float, bool, str]] = {
    "none": (0.0, False, "own"),
    "text_trigger": (0.01, True, "own"),
    "alie": (0.22, False, "cohort"),
    "ipm": (0.35, False, "cohort"),
    "min_max": (0.28, False, "cohort+defense"),
    "byzantine_flip": (0.45, False, "own"),
}
HOLDS: dict[str, float] = {  # share of the harm that a defense takes away
    "none": 0.0,
    "median": 0.6,
    "multi_krum": 0.9,
    "geometric_median": 0.5,
    "trimmed_mean": 0.55,
    "foolsgold": 0.3,
}
Labels = Mapping[str, str]


def slug(axes: Labels) -> str:
    return "-".join(axes.values()).replace(".", "_")


def write_cell(folder: Path, axes: Labels, number: int, *, rounds: int, clients: int, malicious: int) -> None:
    attack, defense = axes.get("attack", "text_trigger"), axes.get("defense", "none")
    harm, trigger, knowledge = ATTACKS.get(attack, (0.1, False, "own"))
    held = HOLDS.get(defense, 0.4)

    def change(recipe: dict[str, Any]) -> None:
        if attack != "none":
            recipe["attack"] |= {"knowledge": knowledge}
            if not trigger:
                recipe["attack"] |= {"data": [], "update": [{"name": attack}]}
        recipe["seed"] = int(axes.get("seed", 0))
        recipe["clients"]["partition"] = {"name": axes.get("partition", "iid")}

    write_run(
        folder,
        rounds=rounds,
        clients=clients,
        malicious=malicious,
        attack=attack != "none",
        rule=None if defense == "none" else defense,
        asr=0.97 * (1 - held) + 0.02 if trigger else 0.04,
        accuracy=0.71 - harm * (1 - held) - (0.04 if axes.get("partition") == "dirichlet" else 0.0),
        seed=number,
        change=change,
    )


def write_grid(
    folder: Path,
    *,
    attacks: Sequence[str] = ("text_trigger", "alie", "ipm"),
    defenses: Sequence[str] = ("none", "median", "multi_krum"),
    more: Mapping[str, Sequence[str]] | None = None,
    rounds: int = 6,
    clients: int = 10,
    malicious: int = 3,
    failed: Sequence[str] = (),
    stopped: Sequence[str] = (),
    waiting: Sequence[str] = (),
) -> Path:
    """A grid over attacks, defenses and `more` axes with its twins; slugs in `failed` etc. have no result."""
    more = {"seed": ["0", "1"]} if more is None else more
    axes = {"attack": list(attacks), "defense": list(defenses), **{axis: list(values) for axis, values in more.items()}}
    cells: list[dict[str, Any]] = []
    for rest in itertools.product(*more.values()):
        others = dict(zip(more, rest, strict=True))
        twin = {"attack": "none", "defense": "none", **others}
        cells.append({"folder": f"cells/{slug(twin)}", "axes": twin, "twin": None, "is_twin": True})
        for attack, defense in itertools.product(attacks, defenses):
            own = {"attack": attack, "defense": defense, **others}
            if own != twin:
                cells.append(
                    {"folder": f"cells/{slug(own)}", "axes": own, "twin": f"cells/{slug(twin)}", "is_twin": False}
                )
    for number, cell in enumerate(cells):
        name = cell["folder"].removeprefix("cells/")
        place = folder / cell["folder"]
        if name in waiting:
            continue
        if name in failed:
            place.mkdir(parents=True)
            message = "multi_krum: needs n >= 2f + 3 clients, got n=10, f=4. Lower f or raise clients.per_round."
            trace = 'Traceback (most recent call last):\n  File "defenses/krum.py", line 40, in krum\nDefenseError\n'
            write_json(place / "error.json", {"type": "DefenseError", "message": message, "traceback": trace})
            continue
        write_cell(place, cell["axes"], number, rounds=rounds, clients=clients, malicious=malicious)
        if name in stopped:
            (place / "summary.json").unlink()
            lines = (place / "history.jsonl").read_text().splitlines(keepends=True)
            (place / "history.jsonl").write_text("".join(lines[: rounds // 2]))
    command = "python -m fedllm_sec.benchmark recipes/grids/quick.yaml"
    write_json(
        folder / "grid.json",
        {
            "format": 1,
            "name": "quick",
            "version": version("fedllm_sec"),
            "command": command,
            "axes": axes,
            "cells": cells,
        },
    )
    return folder


def replicate(folder: Path, source: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Fill the cells of a grid by copies of one run folder, for a grid that is only large."""
    for cell in cells:
        shutil.copytree(source, folder / str(cell["folder"]))
