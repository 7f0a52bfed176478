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

    def answered(self) -> tuple[Rate, Rate] | None:
        """Attack success and false triggers, where both were last measured in one round."""
        for line in reversed(self.lines):
            given = [(line["attack"] or {}).get(key) for key in ("asr", "false_trigger")]
            if None not in given:
                success, anyway = (Rate(float(rate["value"]), rate["n"]) for rate in given)
                return success, anyway
        return None

    def parts(self, key: str) -> tuple[Rate, ...] | None:
        """What a view is made of: (success, false triggers) for "beyond", success alone where there are none."""
        if key == "beyond":
            return self.answered()
        rate = self.last(key)
        return None if rate is None or (key == "asr" and self.answered() is not None) else (rate,)

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


def less(added: Sequence[Rate], taken: Sequence[Rate]) -> float:
    """Sum minus sum; equal decimals give equal differences."""
    return round(sum(rate.value for rate in added) - sum(rate.value for rate in taken), 12)


def gap(rows: Sequence[Sequence[Rate]], taken: Sequence[int] = (1,)) -> Shown | None:
    """Mean of the rates minus those at the places `taken`, one row a seed; the wider of t and Newcombe's method 10."""
    if not rows:
        return None
    added = [i for i in range(len(rows[0])) if i not in taken]
    gaps = [less([row[i] for i in added], [row[i] for i in taken]) for row in rows]
    middle, ends = mean(gaps), []
    if not math.isfinite(middle):
        return Shown(middle, None, None)
    if len(gaps) > 1:
        ends.append((middle - half_width(gaps), middle + half_width(gaps)))
    all_rows = [pooled([row[i] for row in rows]) for i in range(len(rows[0]))]
    if all(all_rows):
        down = sum((all_rows[i][0] - all_rows[i][1]) ** 2 for i in added)  # type: ignore[index]
        down += sum((all_rows[i][2] - all_rows[i][0]) ** 2 for i in taken)  # type: ignore[index]
        up = sum((all_rows[i][2] - all_rows[i][0]) ** 2 for i in added)  # type: ignore[index]
        up += sum((all_rows[i][0] - all_rows[i][1]) ** 2 for i in taken)  # type: ignore[index]
        ends.append((middle - math.sqrt(down), middle + math.sqrt(up)))
        most = len(added)
        ends = [(max(-most, low), min(most, high)) for low, high in ends]
    if not ends:
        return Shown(middle, None, None)
    return Shown(middle, min(low for low, _ in ends), max(high for _, high in ends))


def apart(rows: Sequence[Sequence[Rate]], taken: Sequence[int] = (1,)) -> bool:
    def alike(row: Sequence[Rate]) -> bool:
        sides = [sum(row[i].value for i in range(len(row)) if (i in taken) is side) for side in (False, True)]
        return sides[0] == sides[1] or abs(sides[0] - sides[1]) < 5e-13 or all(map(math.isnan, sides))

    if all(map(alike, rows)):
        return False
    found = gap(rows, taken)
    return found is None or found.low is None or found.low > 0 or found.high < 0  # type: ignore[operator]


# ---------------------------------------------------------------- what a text shows

NUMBER = r"-?(?:\d+(?:\.\d+)?(?:e[+-]\d+)?|inf)|nan"


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
