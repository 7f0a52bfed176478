"""What a grid's files say, worked out anew in a few lines each and without the report's code: the other opinion.

Only files are read: grid.json, recipe.yaml, history.jsonl. Formulas are those that docs/report.md names.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import yaml
from scipy.stats import t as student

Z = 1.959963984540054


class Rate(NamedTuple):
    """A number, and of how many rows it is a rate; None for what is no rate."""

    value: float
    n: int | None


class Shown(NamedTuple):
    value: float
    low: float | None
    high: float | None


class Run:
    """One cell, from its files."""

    def __init__(self, grid: Path, cell: dict[str, Any]) -> None:
        self.folder = grid / cell["folder"]
        self.slug = self.folder.name
        self.places = [cell["axes"], *cell.get("also", [])]
        self.twin, self.is_twin = cell["twin"], cell["is_twin"]
        self.done = (self.folder / "summary.json").exists()
        self.recipe, self.lines = {}, []
        if self.done:
            self.recipe = yaml.load((self.folder / "recipe.yaml").read_text(), Loader=yaml.CSafeLoader)
            self.lines = [json.loads(line) for line in (self.folder / "history.jsonl").read_text().splitlines()]
        self.attacked = self.recipe.get("enable_attack", False)
        self.rule = (self.recipe.get("defense") or {}).get("rule", {}).get("name") or "mean"

    def last(self, key: str) -> Rate | None:
        """A measure when it was last taken."""
        for line in reversed(self.lines):
            for block in (line["quality"] or {}, line["attack"] or {}):
                given = block.get(key)
                if given is not None:
                    whole = isinstance(given, dict)
                    return Rate(float(given["value"] if whole else given), given["n"] if whole else None)
        return None

    def judged(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["attacking"] or not self.attacked]

    def mean_of(self, block: str, key: str | None = None) -> float | None:
        values = [line[block] if key is None else (line[block] or {}).get(key) for line in self.judged()]
        known = [value for value in values if value is not None]
        return mean(known) if known else None

    def asked(self) -> Any:
        return ((self.recipe.get("attack") or {}).get("data") or [None])[0]


def runs_of(grid: Path) -> list[Run]:
    return [Run(grid, cell) for cell in json.loads((grid / "grid.json").read_text())["cells"]]


# ---------------------------------------------------------------- intervals


def wilson(p: float, n: int) -> tuple[float, float]:
    middle, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, min(p, (middle - half) / (1 + Z * Z / n))), min(1.0, max(p, (middle + half) / (1 + Z * Z / n)))


def half_width(values: Sequence[float]) -> float:
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def pooled(rates: Sequence[Rate]) -> tuple[float, float, float] | None:
    if not all(rate.n for rate in rates):
        return None
    n = sum(rate.n or 0 for rate in rates)
    p = sum(rate.value * (rate.n or 0) for rate in rates) / n
    return p, *wilson(p, n)


def over_seeds(rates: Sequence[Rate]) -> Shown | None:
    """Mean; the wider of Student's t and the pooled rows' Wilson; a share in 0..1, a loss above 0."""
    if not rates:
        return None
    middle, rows = mean(rate.value for rate in rates), pooled(rates)
    if not math.isfinite(middle) or (len(rates) == 1 and rows is None):
        return Shown(middle, None, None)
    ends = [rows[1:]] if rows else []
    if len(rates) > 1:
        half = half_width([rate.value for rate in rates])
        ends.append((middle - half, middle + half))
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    return Shown(middle, max(0.0, low), min(1.0, high) if rows else high)


def gap(pairs: Sequence[tuple[Rate, Rate]]) -> Shown | None:
    """Mean of first minus second; the wider of Student's t over the pairs and Newcombe's method 10."""
    if not pairs:
        return None
    gaps = [a.value - b.value for a, b in pairs]
    middle, ends = mean(gaps), []
    if not math.isfinite(middle):
        return Shown(middle, None, None)
    if len(gaps) > 1:
        ends.append((middle - half_width(gaps), middle + half_width(gaps)))
    one, two = pooled([a for a, _ in pairs]), pooled([b for _, b in pairs])
    if one and two:
        ends.append((middle - math.hypot(one[0] - one[1], two[2] - two[0]),
                     middle + math.hypot(one[2] - one[0], two[0] - two[1])))  # fmt: skip
        ends = [(max(-1.0, low), min(1.0, high)) for low, high in ends]
    if not ends:
        return Shown(middle, None, None)
    return Shown(middle, min(low for low, _ in ends), max(high for _, high in ends))


def apart(pairs: Sequence[tuple[Rate, Rate]]) -> bool:
    if all(a.value == b.value or (math.isnan(a.value) and math.isnan(b.value)) for a, b in pairs):
        return False
    found = gap(pairs)
    return found is None or found.low is None or found.low > 0 or found.high < 0  # type: ignore[operator]


# ---------------------------------------------------------------- what a text shows

NUMBER = r"-?(?:\d[\d.]*(?:e[+-]\d+)?|inf)|nan"


def agrees(text: str, true: float, times: float = 1.0) -> bool:
    """Whether a number is the true one to the digit it shows, and is nothing or all only where that is."""
    if not math.isfinite(true):
        return text == str(true)
    mantissa, _, power = text.partition("e")
    step = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    if text.startswith("-") and float(text) == 0:
        return False
    return abs(float(text) - times * true) <= 0.5 * step * (1 + 1e-9) + 1e-9


def holds(text: str, true: Shown | None) -> bool:
    """Whether "0.71 [0.66, 0.76]", "97 % [93, 99]" or "n/a" shows this, the interval around its own value."""
    if true is None:
        return text == "n/a"
    found = re.match(rf"({NUMBER})( %)?(?: \[({NUMBER}), ({NUMBER})\])?", text)
    if found is None or (found[3] is None) != (true.low is None):
        return False
    times = 100.0 if found[2] else 1.0
    whole = {0.0, times}
    if times == 100.0 and float(found[1]) in whole and abs(times * true.value - float(found[1])) > 1e-9:
        return False  # "0 %" of what is not nothing
    limits = [] if true.low is None else [(found[3], true.low), (found[4], true.high)]
    around = true.low is None or float(found[3]) <= float(found[1]) <= float(found[4])
    return around and all(agrees(shown, value, times) for shown, value in [(found[1], true.value), *limits])  # type: ignore[arg-type]


# ---------------------------------------------------------------- a grid


class Part(NamedTuple):
    """All axes but attack, defense and seed fixed: (attack, defense) -> its runs by seed."""

    title: str
    slots: dict[tuple[str, str], dict[str, Run]]
    twins: dict[str, Run]


def parts_of(grid: Path, runs: Iterable[Run]) -> tuple[list[str], list[str], list[Part]]:
    """The attacks and the defenses of the maps, and the parts, in the grid's order."""
    axes = json.loads((grid / "grid.json").read_text())["axes"]
    places = [(run, at) for run in runs for at in run.places]
    own = {axis: {at[axis] for run, at in places if not run.is_twin} for axis in ("attack", "defense")}
    attacks, defenses = ([label for label in axes[axis] if label in own[axis]] for axis in ("attack", "defense"))
    others = [axis for axis in axes if axis not in ("attack", "defense", "seed") and len(axes[axis]) > 1]
    parts = []
    for labels in itertools.product(*(axes[axis] for axis in others)):
        fixed = dict(zip(others, labels, strict=True))
        inside = [(run, at) for run, at in places if all(at[axis] == label for axis, label in fixed.items())]
        slots: dict[tuple[str, str], dict[str, Run]] = {}
        for run, at in inside:
            if at["attack"] in attacks and at["defense"] in defenses:
                slots.setdefault((at["attack"], at["defense"]), {})[at.get("seed", "")] = run
        twins = {at.get("seed", ""): run for run, at in inside if run.is_twin}
        parts.append(Part(", ".join(f"{axis} {label}" for axis, label in fixed.items()), slots, twins))
    return attacks, defenses, parts
