"""Grids whose recipes are real and whose histories are made up: schedules, redraw, quarantine, NaN, ties, odd names."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from fedllm_sec.evaluation.detection import detection
from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.grid import cells, grid
from fedllm_sec.recipe import reading
from fedllm_sec.records.files import plain, write_json
from fedllm_sec.records.history import RoundRecord, record_line, timing_line
from fedllm_sec.records.inventory import sealed
from fedllm_sec.records.summary import summary

BASE: dict[str, Any] = {
    "rounds": 6,
    "task": "classify",
    "model": {"name": "logistic"},
    "data": {"name": "digits"},
    "clients": {"total": 6, "local_steps": 2, "batch_size": 8, "lr": 1e-2},
    "attack": {"malicious": {"count": 2}, "update": [{"name": "byzantine_flip", "scale": 5.0}]},
    "defense": {"rule": {"name": "krum", "f": 1}},
}
ENVIRONMENT = json.dumps({"fedllm_sec": version("fedllm_sec"), "command": "train made_up.yaml"})
FLIP: dict[str, Any] = {"flip": {}}
TRIGGER = {"update": [], "data": [{"name": "pixel_trigger", "target": 0}]}
OTHER = {"update": [], "data": [{"name": "pixel_trigger", "target": 7}]}
NONE, MEDIAN = {"none": None}, {"median": {"rule": {"name": "median"}}}
KRUM = {"krum": {"rule": {"name": "multi_krum", "f": 1}}}
WEIGHS = {"foolsgold": {"rule": {"name": "foolsgold"}}}
SCHEDULE = {"start": 2, "stop": 4, "every": 2}
BACKDOOR = {"attack": {"update": [], "data": TRIGGER["data"]}}  # so that attack-free runs are asked too
BYZANTINE = {"data": [], "update": BASE["attack"]["update"]}
SHAPES: dict[str, dict[str, Any]] = {
    "seeds": {"axes": {"attack": FLIP, "defense": {**NONE, **KRUM}, "seed": [0, 1, 2, 3, 4]}},
    "two seeds": {"axes": {"attack": {**FLIP, "bd": TRIGGER}, "defense": {**NONE, **KRUM}, "seed": [0, 1]}},
    "two triggers": {
        "overrides": BACKDOOR,
        "axes": {"attack": {"flip": BYZANTINE, "bd": {}, "bd7": OTHER}, "defense": {**NONE, **MEDIAN, **KRUM}},
    },
    "exclusions": {
        "axes": {"attack": {**FLIP, "bd": TRIGGER}, "defense": {**NONE, **MEDIAN, **KRUM}, "seed": [0, 1]},
        "exclude": [{"attack": "bd", "defense": "krum"}],
    },
    "a sweep over a defense's setting": {
        "axes": {"attack": FLIP, "defense": {**NONE, **KRUM}, "defense.rule.f": [1, 2], "seed": [0, 1]},
    },
    "a sweep over the attackers": {
        "axes": {"attack": {**NONE, **FLIP}, "defense": {**NONE, **MEDIAN}, "attack.malicious.count": [1, 2, 3]},
    },
    "odd names": {
        "axes": {
            "attack": {'a, "b" | <i>': {}, "50 % & $x^2$": TRIGGER},
            "defense": {**NONE, "*krum_*": KRUM["krum"], "[x]~\\": MEDIAN["median"]},
            "Größe": {"klein, fein": {"clients": {"total": 6}}, "groß | <b>": {"clients": {"total": 7}}},
        },
    },
    "schedules": {
        "overrides": BACKDOOR,
        "axes": {"attack": {"bd": {**TRIGGER, **SCHEDULE}}, "defense": {**NONE, **KRUM, **WEIGHS}, "seed": [0, 1, 2]},
    },
    "redraw and sampling": {
        "axes": {
            "attack": {"bd": {**TRIGGER, **SCHEDULE, "malicious": {"count": 2, "redraw": True}}},
            "defense": {**NONE, **KRUM, **WEIGHS},
            "clients.per_round": [None, 4],
        },
    },
}


@dataclass(frozen=True)
class Fate:
    """What happens in the histories of a grid."""

    seed: int = 0
    rows: int = 200  # held-out rows of each rate
    ties: bool = False  # few different values
    nan: float = 0.0  # chance that a run diverges, of its rounds one
    quarantine: float = 0.0  # chance of each row
    skipped: float = 0.0  # chance of each round
    evaluate_every: int = 1
    failed: float = 0.0  # chance that a run is not there
    per_class: bool = False
    labelled: bool = True  # whether there is an accuracy; else the loss is what counts


@cache
def shape(name: str) -> grid.Grid:
    """The grid of a shape; whether its recipes could run is tested elsewhere."""
    with mock.patch("fedllm_sec.grid.grid.planned"):
        return grid.make({"base": BASE, **SHAPES[name]}, Path("made up.yaml"))


@cache
def texts(name: str) -> dict[str, str]:
    """recipe.yaml of every cell of a shape."""
    return {cell.slug: reading.dump(cell.recipe) for cell in shape(name).cells}


def write_grid(folder: Path, name: str, fate: Fate) -> grid.Grid:
    """The grid's folder, with every run that its fate lets be, and the grid as the benchmark has it."""
    base = shape(name)
    made = grid.Grid("made up", folder, base.axes, [_moved(cell, folder) for cell in base.cells])
    write_json(folder / "grid.json", cells.describe(made, "benchmark made_up.yaml"))
    rng = random.Random(fate.seed)
    for cell in made.cells:
        if rng.random() >= fate.failed:
            write_cell(cell, texts(name)[cell.slug], fate, random.Random(rng.random()))
        elif rng.random() < 0.5:
            error = {"type": "DefenseError", "message": "krum: too few | <clients>", "traceback": "", "time": 0.0}
            write_json(cell.folder / "error.json", error)
    return made


def _moved(cell: grid.Cell, folder: Path) -> grid.Cell:
    output = cell.recipe.output.model_copy(update={"folder": str(folder / "cells" / cell.slug)})
    return replace(cell, recipe=cell.recipe.model_copy(update={"output": output}))


def write_cell(cell: grid.Cell, text: str, fate: Fate, rng: random.Random) -> None:
    """A run folder; `text` is its recipe.yaml, in which the folder may be another."""
    folder, recipe = cell.folder, cell.recipe
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    (folder / "environment.json").write_text(ENVIRONMENT)
    records = list(history(recipe, fate, rng))
    (folder / "history.jsonl").write_text("".join(map(record_line, records)))
    (folder / "timings.jsonl").write_text("".join(map(timing_line, records)))
    attack = recipe.attack if recipe.enable_attack else None
    stop = attack.stop if attack is not None else None
    found = summary(folder, "train", attacked=attack is not None, stop=stop)
    (folder / "summary.json").write_bytes(sealed({**plain(found), "made": {}}))


def history(recipe: Any, fate: Fate, rng: random.Random) -> Any:
    ids = [f"c{i:02d}" for i in range(recipe.clients.total)]
    attack = recipe.attack if recipe.enable_attack else None
    count = (attack.malicious.count or 1) if attack is not None else 0
    bad = set(rng.sample(ids, count))
    diverges = rng.randrange(1, recipe.rounds + 1) if rng.random() < fate.nan else None
    level = rng.choice([0.2, 0.8]) if fate.ties else rng.random()
    for r in range(1, recipe.rounds + 1):
        cohort = sorted(rng.sample(ids, recipe.clients.per_round or len(ids)))
        if attack is not None and attack.malicious.redraw:
            bad = set(rng.sample(ids, count))
        attacking = attack is not None and _active(attack, r)
        measured = r % fate.evaluate_every == 0 or r == recipe.rounds
        yield _round(recipe, fate, rng, r, cohort, bad & set(cohort), attacking, measured, level, diverges)


def _active(attack: Any, r: int) -> bool:
    return attack.start <= r <= (attack.stop or r) and (r - attack.start) % attack.every == 0


def _round(
    recipe: Any,
    fate: Fate,
    rng: random.Random,
    r: int,
    cohort: list[str],
    bad: set[str],
    attacking: bool,
    measured: bool,
    level: float,
    diverges: int | None,
) -> RoundRecord:
    def rate(around: float) -> dict[str, float] | None:
        near = around if fate.ties else min(1.0, max(0.0, around + rng.gauss(0, 0.02)))
        return wilson(round(near * fate.rows), fate.rows)

    quarantined = {i: "not finite" for i in cohort if rng.random() < fate.quarantine}
    seen = [i for i in cohort if i not in quarantined]
    skipped = "no row left" if not seen or rng.random() < fate.skipped else None
    rule = recipe.defense.rule["name"] if recipe.enable_defense else "mean"
    kept = weights = scores = None
    if skipped is None and rule in ("krum", "multi_krum"):
        kept = sorted(rng.sample(seen, rng.randint(1, len(seen))))
        scores = {i: rng.choice([1.0, rng.random()]) for i in seen}
    elif skipped is None and rule == "foolsgold":
        drawn = {i: rng.choice([0.0, rng.random(), 9.0]) for i in seen}
        total = math.fsum(drawn.values()) or 1.0
        weights = {i: value / total for i, value in drawn.items()}
    judged = skipped is None and (attacking or not recipe.enable_attack)
    quality = success = None
    if measured:
        lost = diverges is not None and r >= diverges
        quality = {"loss": math.nan if lost else round(rng.uniform(0.01, 3.0), rng.choice([1, 6])), "perplexity": None,
                   "accuracy": rate(0.1 if lost else level) if fate.labelled else None, "per_class": None}  # fmt: skip
        if fate.per_class:
            quality["per_class"] = {str(c): wilson(rng.choice([0, 9, 10, 20]), 20) for c in range(3)}
        if recipe.attack is not None and recipe.attack.data:
            success = {"asr": rate(rng.choice([0.0, 1.0, level]) if recipe.enable_attack else 0.05)}
            empty = rng.random() < 0.2
            success |= {"false_trigger": None if empty else rate(0.02), "left_out": {"carry the trigger": 3}}
            success["reasons"] = {"false_trigger": "no row is clean"} if empty else {}
    return RoundRecord(
        round=r, cohort=cohort, malicious=sorted(bad), attacking=attacking, losses=dict.fromkeys(cohort, 1.0),
        norms={i: math.inf if i in quarantined else rng.uniform(0.5, 2.0) for i in cohort}, quarantined=quarantined,
        weights=weights, kept=kept, scores=scores, notes={}, update_norm=0.1, skipped=skipped, lora_gap=None,
        detection=detection(kept, scores, seen, bad) if judged else None, quality=quality, attack=success,
        robustness=rng.random() if judged and bad else None,
        stealth={"norm_rank": rng.random(), "cosine_rank": None} if judged and bad else None,
        seconds={"train": 1.0, "defense": 0.01}, memory_mb={"defense": 12.0 + rng.random()},
    )  # fmt: skip
