"""A grid: one base recipe and axes along which it varies -> the cells, each a complete recipe with its own folder.

    base: ../quickstart.yaml            # a recipe, relative to this file; or the recipe itself
    overrides: {rounds: 4}              # laid over the base
    axes:
      attack: {none: , flip: {update: [{name: byzantine_flip}]}}   # label -> what is laid over the `attack` block
      defense: {none: , median: {rule: {name: median}}}
      seed: [0, 1, 2]                   # a recipe key -> its values
    exclude: [{attack: flip, seed: [1, 2]}]

For every combination of the other axes there is a twin, the run without attack and defense: what the cells are
measured against. It is added where the axes do not name it.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm_sec.build.loaded import data_key
from fedllm_sec.build.names import checked, outside
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError
from fedllm_sec.grid.axes import NONE, SWITCHED, Axis, matches, read_axes, read_rules
from fedllm_sec.recipe import places, shipped
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.recipe.overrides import refuse_undone
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.recipe.sections import Attack, Malicious, Recipe

KEYS = ("name", "base", "overrides", "axes", "exclude")
LONGEST = 100  # characters of a folder's name


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    slug: str  # name of its folder under cells/
    axes: Mapping[str, str]  # axis -> label
    recipe: Recipe
    twin: str | None  # slug of the run without attack and defense, None for such a run itself
    also: Sequence[Mapping[str, str]] = ()  # the labels of other combinations that come to this very run

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output.folder)


@dataclass(frozen=True)
class Grid:
    name: str
    folder: Path
    axes: Mapping[str, Sequence[str]]  # axis -> labels in order
    cells: Sequence[Cell]

    def run_order(self) -> list[Cell]:
        """The cells, those with equal data and model next to each other, so that each is loaded once.

        Where clean rounds come before them, the first of each group comes first: processes make those side by side. In
        a group those that nobody attacks come first: others train the same until their attack begins.
        """
        groups: dict[str, list[Cell]] = {}
        for cell in sorted(self.cells, key=lambda cell: cell.axes.get("attack", NONE) != NONE):
            groups.setdefault(data_key(cell.recipe) + repr(cell.recipe.model), []).append(cell)
        first = [group[0] for group in groups.values() if group[0].recipe.pretrain is not None]
        begun = {cell.slug for cell in first}
        return first + [cell for group in groups.values() for cell in group if cell.slug not in begun]


def is_grid(raw: Any) -> bool:
    """Whether a YAML file holds a grid rather than a recipe."""
    return isinstance(raw, dict) and "axes" in raw


# ---------------------------------------------------------------- reading


def load(path: Path | None, overrides: Sequence[str] = (), allow_code: bool = True) -> Grid:
    """The grid of a file; every mistake in it and in its cells' recipes is reported at once.

    `overrides` are `key.sub=value` for the base recipe, or `axes.NAME=value` for a whole axis. Without `allow_code` a
    cell that names code from outside is a mistake, and the code is not imported.
    """
    path = shipped.find(path, "grid", "python -m fedllm_sec.benchmark grids/quick")
    raw = recipes.read(path)
    refuse_undone(overrides)
    own = [o for o in overrides if o.partition("=")[0].partition(".")[0] not in ("axes", "exclude")]
    for text in (o for o in overrides if o not in own):
        place, _, value = text.partition("=")
        section, _, name = place.partition(".")
        parsed = recipes.parse(value, f"override {place}")
        if section == "axes" and name:
            raw["axes"] = {**(raw.get("axes") or {}), name: parsed}
            if parsed is None:
                del raw["axes"][name]
        else:
            raw[section] = parsed
    return make(raw, path, own, allow_code)


def make(raw: Mapping[str, Any], path: Path, overrides: Sequence[str] = (), allow_code: bool = True) -> Grid:
    """The grid of a raw mapping; `path` is where it was read, for its name and its base."""
    if "axes" not in raw and "base" not in raw:
        raise RecipeError(
            f"{path}: has neither base nor axes, so it is no grid. Run a recipe with fedllm_sec.train; a grid "
            "of it says base: RECIPE and axes: {seed: [0, 1, 2]}."
        )
    problems = [f"{key}: no key of a grid.{did_you_mean(str(key), KEYS)}" for key in raw if key not in KEYS]
    name = str(raw.get("name") or path.stem)
    if not re.fullmatch(r"[\w.+ -]+", name):
        problems.append(f"name: {name!r}: letters, digits, '.', '+', '-' and '_' only; it names a folder.")
    base = _base(raw, path, overrides)
    folder = Path(places.home(str((base.get("output") or {}).get("folder") or "runs/{name}").replace("{name}", name)))
    axes, found = read_axes(raw.get("axes"), base)
    problems += [*found, *filter(None, [places.folder_problem(str(folder))])]
    if problems:
        raise RecipeError(problems)
    rules = read_rules(raw.get("exclude"), axes)
    combinations = [
        dict(zip(axes, labels, strict=True)) for labels in itertools.product(*(a.values for a in axes.values()))
    ]
    combinations = [c for c in combinations if not any(matches(c, rule) for rule in rules)]
    if not combinations:
        raise RecipeError("exclude: leaves no cell, so there is nothing to run. Remove a rule, or add a label.")
    cells = _cells(base, axes, combinations, folder, allow_code)
    labels = {a.name: [*a.values] for a in axes.values()}
    for axis in SWITCHED:  # a twin's label, where the axes do not name it
        if any(c.axes[axis] == NONE for c in cells) and NONE not in labels[axis]:
            labels[axis].insert(0, NONE)
    return Grid(name, folder, labels, cells)


def _base(raw: Mapping[str, Any], path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The raw base recipe with the grid's and the command line's overrides, without variants and output folder."""
    base = raw.get("base")
    if isinstance(base, str):
        base = recipes.read(path.parent / places.home(base))
    if not isinstance(base, dict):
        raise RecipeError(f"base: {base!r}: must be the path of a recipe, relative to {path}, or a recipe itself.")
    if is_grid(base):
        raise RecipeError(f"base: {raw['base']} is a grid; a grid varies a recipe. Give its base instead.")
    changes = raw.get("overrides") or {}
    if not isinstance(changes, dict):
        raise RecipeError(f"overrides: {changes!r}: must be a block of recipe keys, e.g. {{rounds: 4}}.")
    for axis in map(str, raw.get("axes") or {}):
        if axis not in SWITCHED and _holds(changes, axis.split(".")):
            raise RecipeError(f"overrides.{axis}: {axis} is an axis of this grid, which would overwrite it. Remove it.")
    if "variants" in changes:
        raise RecipeError("overrides.variants: a grid has axes in place of variants. Remove it.")
    base = {key: value for key, value in base.items() if key != "variants"}
    if isinstance(base.get("output"), dict):
        base["output"] = {key: value for key, value in base["output"].items() if key != "folder"}
    base = recipes.merge(base, changes)
    for assignment in overrides:
        key = assignment.partition("=")[0]
        for axis in raw.get("axes") or {}:
            if key == axis or (str(axis) not in SWITCHED and key.startswith(f"{axis}.")):
                raise RecipeError(
                    f"override {key}: {axis} is an axis of this grid, which would overwrite it. Give axes.{axis}=[...] "
                    "to change the axis, or axes.{axis}=null to drop it.".replace("{axis}", str(axis))
                )
        recipes.override(base, assignment)
    return base


def _holds(block: Any, keys: Sequence[str]) -> bool:
    """Whether nested mappings have a value at these keys."""
    return not keys or (isinstance(block, Mapping) and keys[0] in block and _holds(block[keys[0]], keys[1:]))


# ---------------------------------------------------------------- cells


def _cells(
    base: dict[str, Any],
    axes: Mapping[str, Axis],
    combinations: Iterable[dict[str, str]],
    folder: Path,
    allow_code: bool = True,
) -> list[Cell]:
    """A cell for each combination and its twin; combinations that come to the same recipe are one cell."""
    problems: dict[str, list[str]] = {}  # problem -> where
    recipe_of: dict[tuple[str, ...], Recipe] = {}
    rehearsed: dict[str, list[str]] = {}

    def settled(labels: Mapping[str, str]) -> Recipe | None:
        key = tuple(labels.values())
        if key not in recipe_of:
            raw = base
            try:
                for axis in axes.values():
                    if labels[axis.name] in axis.values:
                        raw = axis.lay(raw, labels[axis.name])
                    else:  # a twin's label that the axes do not name
                        raw = {**raw, f"enable_{axis.name}": False}
                if code := [] if allow_code else outside(raw):
                    unread = "code, which is not run to list a grid. Add --allow-code."
                    raise RecipeError([f"{where}: {name} is {unread}" for where, name in code])
                recipe = settle(checked(raw))
                planned(recipe, rehearsed)  # whether it can work; the process that runs the cell plans it again
                recipe_of[key] = recipe
            except RecipeError as error:
                for problem in error.problems:
                    problems.setdefault(problem, []).append(_slug(labels, labels))
                return None
        return recipe_of[key]

    runs: dict[str, tuple[Recipe, list[dict[str, str]], str | None]] = {}  # recipe -> it, its combinations, its twin
    for labels in combinations:
        twin, recipe = settled(off := {**labels, "attack": NONE, "defense": NONE}), settled(labels)
        if twin is None or recipe is None:
            continue
        for made, at, other in ((twin, off, None), (recipe, labels, twin)):
            key = made.model_dump_json()
            known = runs.setdefault(
                key, (made, [], None if other is None or other == made else other.model_dump_json())
            )
            if at not in known[1]:
                known[1].append(at)
    if problems:
        raise RecipeError([f"{problem} {_where(places)}" for problem, places in problems.items()])
    _refuse_idle_axes(axes, recipe_of)
    slugs = {key: _slug(places[0], _varied(places, axes)) for key, (_, places, _) in runs.items()}
    _refuse_equal_folders(slugs, runs)
    return [
        Cell(
            slugs[key],
            places[0],
            recipe.model_copy(
                update={"output": recipe.output.model_copy(update={"folder": str(folder / "cells" / slugs[key])})}
            ),
            None if twin is None else slugs[twin],
            tuple(places[1:]),
        )
        for key, (recipe, places, twin) in runs.items()
    ]


def settle(recipe: Recipe) -> Recipe:
    """The recipe without what is switched off, so that runs that are the same have the same recipe.

    Of an attack that is off, the first data attack stays: its probe measures the base rate of the clean model.
    """
    changes: dict[str, Any] = {}
    if not recipe.enable_attack and recipe.attack is not None:
        data = recipe.attack.data[:1]
        changes["attack"] = Attack(malicious=Malicious(count=1), data=data) if data else None
    if not recipe.enable_defense:
        changes["defense"] = None
    return recipe.model_copy(update={**changes, "output": recipe.output.model_copy(update={"folder": ""})})


def _where(places: Sequence[str]) -> str:
    return f"(cell {places[0]})" if len(places) == 1 else f"({len(places)} cells, first {places[0]})"


def _varied(places: Sequence[Mapping[str, str]], axes: Mapping[str, Axis]) -> dict[str, str]:
    """The labels of the axes that say which run it is: not those of which several come to this very run."""
    return {name: places[0][name] for name in axes if len({at[name] for at in places}) == 1}


def _slug(labels: Mapping[str, str], used: Mapping[str, str]) -> str:
    """attack__defense__key-label..., made of characters that every file system takes."""
    parts = [
        labels[axis] if axis in SWITCHED else f"{axis.split('.')[-1]}-{labels[axis]}" for axis in labels if axis in used
    ]
    slug = "__".join(re.sub(r"[^A-Za-z0-9._+=-]+", "-", part).strip("-") for part in parts)
    if len(slug) <= LONGEST:
        return slug
    return f"{slug[:LONGEST]}-{hashlib.sha256(slug.encode()).hexdigest()[:8]}"


def _refuse_idle_axes(axes: Mapping[str, Axis], recipe_of: Mapping[tuple[str, ...], Recipe]) -> None:
    """Two labels of an axis that come to the same recipe in every combination: one of them cannot act."""
    names, problems = list(axes), []
    for place, axis in enumerate(axes.values()):
        for a, b in itertools.combinations(axis.values, 2):
            pairs = [
                (recipe, recipe_of[(*key[:place], b, *key[place + 1 :])])
                for key, recipe in recipe_of.items()
                if key[place] == a and (*key[:place], b, *key[place + 1 :]) in recipe_of
            ]
            if pairs and all(one == other for one, other in pairs):
                problems.append(
                    f"axes.{names[place]}: {a} and {b} come to the same recipe in every cell. Remove one, or switch on "
                    "what it sets (enable_attack, enable_defense)."
                )
    if problems:
        raise RecipeError(problems)


def _refuse_equal_folders(
    slugs: Mapping[str, str], runs: Mapping[str, tuple[Recipe, list[dict[str, str]], Any]]
) -> None:
    taken: dict[str, str] = {}
    problems = []
    for key, slug in slugs.items():
        other = taken.setdefault(slug.casefold(), key)
        if other != key:
            a, b = (", ".join(f"{k}={v}" for k, v in runs[which][1][0].items()) for which in (other, key))
            problems.append(f"axes: two cells would have the folder cells/{slug}: {a} and {b}. Rename a label.")
    if problems:
        raise RecipeError(problems)
