"""The axes of a grid: what varies, under which labels, and which combinations are left out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from fedllm_sec.errors import RecipeError
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.recipe.sections import TASKS

SWITCHED = ("attack", "defense")  # axes that may have the label `none`: switched off
NONE = "none"
# Columns of results.csv; an axis with a name of your own may have none of them.
COLUMNS = (
    *("cell", "status", "error", "is_twin", "done", "failed", "seeds", "rounds", "robustness", "quarantined"),
    *("accuracy", "worst_class_accuracy", "exact_match", "token_overlap", "loss", "perplexity", "asr", "false_trigger"),
    *("skipped_rounds", "defense_peak_mb"),
)
COLUMN_STARTS = ("client_", "detection_", "stealth_", "lifespan_")
COLUMN_ENDS = ("_low", "_high", "_n", "_drop", "_rise", "_seconds")


@dataclass(frozen=True)
class Axis:
    """What varies: at `key` of the recipe, or anywhere (None), the value of each label."""

    name: str
    key: str | None
    values: Mapping[str, Any]

    def lay(self, raw: dict[str, Any], label: str) -> dict[str, Any]:
        """`raw` with this label's value laid over it; blocks are merged as a recipe's variants are."""
        value = self.values[label]
        if self.key is None:
            return recipes.merge(raw, value)
        if self.name in SWITCHED:
            raw = {**raw, f"enable_{self.name}": label != NONE}
        return raw if value is None and self.name in SWITCHED else recipes.put(raw, self.key, value)


def read_axes(given: Any, base: dict[str, Any]) -> tuple[dict[str, Axis], list[str]]:
    """The axes by name, with `attack` and `defense` among them, and what is wrong with them."""
    if not isinstance(given, dict) or not given:
        return {}, ["axes: a grid needs at least one axis, e.g. {seed: [0, 1, 2]}; it has no cells."]
    axes: dict[str, Axis] = {}
    problems: list[str] = []
    for axis in SWITCHED:
        if axis not in given:
            block = base.get(axis) if base.get(f"enable_{axis}") is True else None
            axes[axis] = Axis(axis, axis, {NONE if block is None else label_of(block): None})
    for name, labels in given.items():
        try:
            axes[str(name)] = _axis(str(name), labels, base)
        except RecipeError as error:
            problems += error.problems
    order = [*SWITCHED, *(name for name in axes if name not in SWITCHED)]
    return {name: axes[name] for name in order if name in axes}, problems


def _axis(name: str, given: Any, base: dict[str, Any]) -> Axis:
    place = f"axes.{name}"
    if not isinstance(given, (dict, list)):
        raise RecipeError(f"{place}: {given!r}: must be a list of values, or a map from labels to blocks.")
    if not given:
        raise RecipeError(f"{place}: has no label, which makes a grid of zero cells. Add one or remove the axis.")
    if name in ("enable_attack", "enable_defense", "output", "output.folder", "variants"):
        raise RecipeError(f"{place}: cannot be an axis. To switch an attack or a defense off, label it `none`.")
    unknown = _unknown_key(name, str(base.get("task", "causal_lm")))
    if isinstance(given, list):
        if unknown is not None:
            raise RecipeError(f"{place}: names no recipe key.{unknown}")
        pairs = [(label_of(value), value) for value in given]
        twice = {label for label, _ in pairs if [other for other, _ in pairs].count(label) > 1}
        if twice:
            raise RecipeError(f"{place}: {min(twice)} stands there twice. Remove one, or give a map with labels.")
        values = dict(pairs)
    else:
        values = {label_of(label): value for label, value in given.items()}
    if name in SWITCHED:
        wrong = [label for label, value in values.items() if label != NONE and not isinstance(value, dict)]
        if wrong:
            raise RecipeError(f"{place}.{wrong[0]}: {values[wrong[0]]!r}: must be a block laid over `{name}`.")
        if values.get(NONE) not in (None, {}, NONE):
            raise RecipeError(f"{place}.none: means switched off and takes no settings. Give it another label.")
        values = {label: None if label == NONE else value for label, value in values.items()}
    elif unknown is not None:
        if name in COLUMNS or name.startswith(COLUMN_STARTS) or name.endswith(COLUMN_ENDS):
            raise RecipeError(f"{place}: is the name of a column of results.csv. Give it another one, e.g. my_{name}.")
        kind = TASKS.get(str(base.get("task", "causal_lm")), TASKS["causal_lm"])
        for label, block in values.items():
            block = values[label] = {} if block is None else block
            if not isinstance(block, dict):
                raise RecipeError(f"{place}: names no recipe key.{unknown}")
            strange = [key for key in block if key not in kind.model_fields]
            if strange:
                raise RecipeError(
                    f"{place}: names no recipe key,{unknown} If {name} is a name of your own, each of its labels must "
                    f"hold recipe keys, and {label} holds {strange[0]}."
                )
        return Axis(name, None, values)
    return Axis(name, name, values)


def _unknown_key(key: str, task: str) -> str | None:
    """None for a key that a recipe of this task may have, else what was probably meant."""
    model: type[BaseModel] = TASKS.get(task, TASKS["causal_lm"])
    for part in key.split("."):
        if part not in model.model_fields:
            return did_you_mean(part, model.model_fields)
        annotation = model.model_fields[part].annotation
        sections = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not sections:
            return None  # a value, or a method's settings: checked against its signature in each cell
        model = sections[0]
    return None


def label_of(value: Any) -> str:
    """How a value is called in tables and folder names: 0.1, dirichlet(alpha=0.1), text_trigger+model_replacement."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        if "name" in value:
            rest = ", ".join(f"{key}={label_of(item)}" for key, item in value.items() if key != "name")
            return f"{value['name']}({rest})" if rest else str(value["name"])
        lists = [value.get(kind) for kind in ("data", "local", "update", "before", "rule", "after", "client", "repair")]
        blocks = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in lists if v)
        names = [str(block.get("name")) for block in blocks if isinstance(block, dict)]
        return "+".join(names) or ", ".join(f"{key}={label_of(item)}" for key, item in value.items())
    return ",".join(map(label_of, value)) if isinstance(value, list) else str(value)


def read_rules(given: Any, axes: Mapping[str, Axis]) -> list[dict[str, list[str]]]:
    """`exclude`: axis -> the labels that it matches, for each rule."""
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(rule, dict) and rule for rule in given):
        raise RecipeError(f"exclude: {given!r}: must be a list of maps from axes to labels, e.g. [{{attack: flip}}].")
    rules, problems = [], []
    for number, rule in enumerate(given):
        made = {}
        for name, labels in rule.items():
            if name not in axes:
                problems.append(f"exclude.{number}: there is no axis {name}.{did_you_mean(str(name), axes)}")
                continue
            if labels == []:
                problems.append(f"exclude.{number}.{name}: names no label, so the rule leaves nothing out. Name one.")
            made[str(name)] = [label_of(label) for label in (labels if isinstance(labels, list) else [labels])]
            problems += [
                f"exclude.{number}.{name}: there is no label {label}.{did_you_mean(label, axes[name].values)}"
                for label in made[str(name)]
                if label not in axes[name].values
            ]
        rules.append(made)
    if problems:
        raise RecipeError(problems)
    return rules


def matches(labels: Mapping[str, str], rule: Mapping[str, Sequence[str]]) -> bool:
    return all(labels[axis] in wanted for axis, wanted in rule.items())
