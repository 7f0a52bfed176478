"""Reading recipes: one YAML file, strict and typed, with `key.sub=value` overrides after it.

What may stand in it is in `fedllm_sec.recipe.sections`; `task` chooses which of the recipe classes there applies.
Unknown keys, wrong types and contradictions are all reported together, with the place, the value and a way out, before
any model is loaded. `fedllm_sec.build.names` adds what only the menus know (names and settings of methods).
"""

from __future__ import annotations

import copy
import re
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import pydantic
from pydantic import BaseModel

from fedllm_sec.errors import RecipeError, reason
from fedllm_sec.recipe import plainyaml
from fedllm_sec.recipe.attackers import attack_problems
from fedllm_sec.recipe.numbers import key_as_written
from fedllm_sec.recipe.overrides import refuse_undone
from fedllm_sec.recipe.places import TEXT_TASKS, is_local, lost_family, lost_model
from fedllm_sec.recipe.plainyaml import parse
from fedllm_sec.recipe.resolve import did_you_mean, type_problems
from fedllm_sec.recipe.sections import TASKS, CharRecipe, Data, LabelledTextRecipe, Recipe, TextRecipe

MOST_BYTES = 4 * plainyaml.MOST_CHARACTERS  # of a file
MOST_VARIANTS = 200

# ---------------------------------------------------------------- reading


def override(raw: dict[str, Any], assignment: str) -> None:
    """Apply one `key.sub=value` to the raw recipe; a number in the key picks from a list."""
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f'override "{assignment}": write key.sub=value, e.g. clients.lr=1e-3.')
    assign(raw, key, parse(text, f"override {key}"))


def assign(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set the place `key.sub` of the raw recipe; a number in the key picks from a list."""
    parts = key.split(".")
    here: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                raise RecipeError(f'override {key}: "{part}" is no place in a list of {len(here)}.')
            if last:
                here[int(part)] = value
            else:
                here = here[int(part)]
        elif isinstance(here, dict):
            if last:
                here[part] = value
            else:
                if here.get(part) is None:
                    here[part] = {}
                here = here[part]
        else:
            raise RecipeError(f'override {key}: "{".".join(parts[:depth])}" is {here!r}, which has no parts.')


def put(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `raw` with `value` at the place `key.sub`; a block is merged with the one that stands there."""
    made = copy.deepcopy(raw)
    here: Any = made
    for part in key.split("."):
        if isinstance(here, dict):
            here = here.get(part)
        elif isinstance(here, list) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        else:
            here = None
    assign(made, key, merge({"": here}, {"": copy.deepcopy(value)})[""])
    return made


def merge(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`raw` with nested `changes` laid over it; lists, and blocks that name another method, are replaced whole."""
    merged = dict(raw)
    for key, value in changes.items():
        old = merged.get(key)
        another = (
            isinstance(value, dict) and isinstance(old, dict) and value.get("name", old.get("name")) != old.get("name")
        )
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) and not another else value
    return merged


def _keys_at(kind: type[Recipe], place: tuple[Any, ...]) -> Iterable[str]:
    """The keys that the section at `place` knows."""
    model: Any = kind
    for part in place:
        if isinstance(part, int) or not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        sections = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = sections[0] if sections else model
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else ()


def _schema_problems(error: pydantic.ValidationError, kind: type[Recipe]) -> list[str]:
    problems, of_type = [], []
    for e in error.errors():
        place = ".".join(str(part) for part in e["loc"])
        if e["type"] == "invalid_key":  # {true: 1}: a key that is no text
            place = ".".join([*map(str, e["loc"][:-1]), key_as_written(e["input"])])
            problems.append(f"{place}: unknown key.{did_you_mean(place, _keys_at(kind, e['loc'][:-1]))}")
        elif e["type"] == "extra_forbidden":
            problems.append(f"{place}: unknown key.{did_you_mean(str(e['loc'][-1]), _keys_at(kind, e['loc'][:-1]))}")
        elif e["type"] == "missing":
            problems.append(f"{place}: is needed and has no default.")
        else:
            of_type.append(e)
    return problems + type_problems(of_type)


def _contradictions(recipe: Recipe) -> list[str]:
    """What the types alone cannot say."""
    found = []
    clients, attack = recipe.clients, recipe.attack
    if clients.per_round is not None and clients.per_round > clients.total:
        found.append(f"clients.per_round: {clients.per_round} is more than clients.total={clients.total}. Lower it.")
    if (clients.local_steps is None) == (clients.local_epochs is None):
        found.append("clients: give either local_steps or local_epochs, and only one of them.")
    if clients.betas is not None and clients.optimizer != "adamw":
        found.append(f"clients.betas: {clients.optimizer} has none. Drop them, or set clients.optimizer: adamw.")
    if clients.momentum and clients.optimizer != "sgd":
        found.append(f"clients.momentum: {clients.optimizer} has betas. Drop it, or set clients.optimizer: sgd.")
    if clients.nesterov and not clients.momentum:
        found.append("clients.nesterov: true: there is no momentum to look ahead by. Set clients.momentum, or drop it.")
    if recipe.enable_attack and attack is None:
        found.append("enable_attack: true, but there is no attack block. Add one or set it to false.")
    if recipe.enable_defense and recipe.defense is None:
        found.append("enable_defense: true, but there is no defense block. Add one or set it to false.")
    if attack is not None and recipe.enable_attack:
        found += attack_problems(recipe, attack)
    if isinstance(recipe, TextRecipe):
        found += _template_problems(recipe.data)
        if recipe.data.canaries is not None and recipe.data.canaries.client >= clients.total:
            found.append(
                f"data.canaries.client: {recipe.data.canaries.client} is not one of the clients 0 to "
                f"{clients.total - 1}."
            )
    if recipe.task in TEXT_TASKS:
        found += filter(None, [lost_family(recipe.data.name)])
    if isinstance(recipe, LabelledTextRecipe) and is_local(recipe.model.name):
        found += filter(None, [lost_model(recipe.model.name)])
    if isinstance(recipe, CharRecipe):
        found += _text_problems(recipe)
    return found


def _template_problems(data: Data) -> list[str]:
    if data.template == "chat":
        usual = type(data).model_fields  # a recipe that was written out has every default in it
        mine = [n for n in ("template_with_context", "answer") if n in usual]
        given = [n for n in mine if getattr(data, n) != usual[n].default]
        return [f"data.{name}: the chat template writes the whole row (template: chat). Remove it." for name in given]
    found = [
        f"data.{name}: is for the model's own chat template. Set data.template: chat, or remove it."
        for name in ("system", "chat_template")
        if getattr(data, name) is not None
    ]
    for name in ("template", "template_with_context", "answer"):
        text = getattr(data, name)
        if text is None:
            continue
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            found.append(f"data.{name}: {text!r}: {error}. Write a brace that is text twice: {{{{ or }}}}.")
            continue
        fields = [(field, spec, conversion) for _, field, spec, conversion in parts if field is not None]
        used = {field for field, spec, conversion in fields if not spec and conversion is None}
        odd = [field for field, spec, conversion in fields if spec or conversion is not None]
        if odd:
            found.append(f"data.{name}: {text!r}: {{{odd[0]}}} is to be formatted. Write the name alone.")
        allowed = {"response"} if name == "answer" else {"text", "context"}
        if not used <= allowed:
            found.append(f"data.{name}: uses {sorted(used - allowed)}; it may use {sorted(allowed)}.")
        if name == "answer" and used != {"response"}:
            found.append('data.answer: must contain {response}, e.g. " {response}".')
        if name != "answer" and "text" not in used:
            found.append(f"data.{name}: must contain {{text}}, where triggers go.")
    shown = f"{data.template}{data.template_with_context or ''}"
    if data.columns.context is not None and "{context}" not in shown:
        found.append(
            f'data.columns.context: "{data.columns.context}": no template shows {{context}}, so nobody would read it. '
            "Write {context} in data.template or data.template_with_context, or remove the column."
        )
    return found


def _text_problems(recipe: CharRecipe) -> list[str]:
    found = []
    if not recipe.data.name:
        found.append("data.name: is needed: the path of a text file.")
    if recipe.clients.partition.get("name") == "by_speaker" and not recipe.data.by_speaker:
        found.append(
            "clients.partition: by_speaker needs sequences that each hold one speaker's words. "
            "Set data.by_speaker: true, or use {name: by_block}."
        )
    if recipe.enable_attack and recipe.attack is not None:
        found += [
            f"attack.data.{i}.name: {block.get('name')!r} does not act on characters. Use label_flip, e.g. "
            "{name: label_flip, mapping: {e: a}}, or an update attack."
            for i, block in enumerate(recipe.attack.data)
            if block.get("name") != "label_flip"
        ]
    return found


RESERVED = {  # files and folders of a run or of a comparison, in which variants lie
    *("adapter", "model", "report.html", "comparison.json", "history.jsonl", "summary.json", "recipe.yaml"),
    *("environment.json", "checkpoint.safetensors", "timings.jsonl", "answers.jsonl", "harness.json", "trigger.json"),
    *("observed", "privacy.json", "audit.html"),
}


def variants(given: Any) -> dict[str, dict[str, Any]]:
    """The variants of a recipe: name -> overrides; "" stands for the recipe itself where it has none.

    A name is the name of one folder: two that a file system takes for one, or that lead elsewhere, are refused.
    """
    if given is None or given == {}:
        return {"": {}}
    if isinstance(given, dict) and len(given) > MOST_VARIANTS:
        raise RecipeError(
            f"variants: {len(given):,} of them; a recipe has at most {MOST_VARIANTS}. Make a grid (docs/benchmark.md)."
        )
    if not isinstance(given, dict) or not all(isinstance(block, dict) for block in given.values()):
        raise RecipeError("variants: must map names to blocks of overrides, e.g. {defended: {enable_defense: true}}.")
    problems = [
        f"variants.{str(name)[:40]!r}: must be text that names one folder: letters, digits, blanks, '.', '+', '-', '_'."
        for name in given
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+ -]*", name) or name[-1] in ". "
    ]
    known: dict[str, str] = {}
    for name in given if not problems else ():
        block = given[name]
        if name.casefold() in RESERVED or re.match(r"(?i)(adapter|model)-round-", name):
            problems.append(f"variants.{name}: what a run leaves behind has this name. Choose another.")
        if "variants" in block:
            problems.append(f"variants.{name}.variants: a variant has none of its own. Write them side by side.")
        if isinstance(block.get("output"), dict) and "folder" in block["output"]:
            problems.append(
                f"variants.{name}.output.folder: a variant lies in the run's folder, under its name. Remove it."
            )
        if (twin := known.setdefault(name.casefold(), name)) != name:
            problems.append(f"variants.{name}: some file systems take it for {twin!r}. Choose another name.")
    if problems:
        raise RecipeError(problems)
    return given


def check(raw: Any, menu_problems: Callable[[dict[str, Any]], list[str]]) -> Recipe:
    """A validated recipe, or one RecipeError that lists every mistake."""
    if not isinstance(raw, dict):
        raise RecipeError(f"the recipe must be a mapping of sections, got {type(raw).__name__}.")
    problems: list[str] = []
    recipe: Recipe | None = None
    task = raw.get("task", "causal_lm")
    if not isinstance(task, str) or task not in TASKS:
        problems.append(f'task: there is no "{task}".{did_you_mean(str(task), TASKS)}')
        task = "causal_lm"
        raw = {key: value for key, value in raw.items() if key not in ("task", "model", "data", "evaluate")}
    kind = TASKS[task]
    try:
        recipe = kind.model_validate(raw)
        problems += _contradictions(recipe)
    except pydantic.ValidationError as error:
        problems += _schema_problems(error, kind)
    of_menus = menu_problems(raw)
    told = {problem.partition(": ")[0] for problem in of_menus}
    problems = [problem for problem in problems if problem.partition(": ")[0] not in told] + of_menus
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The raw recipe: the file with its overrides, not yet validated."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)  # whatever it is, no more of it is held
        text = data[:MOST_BYTES].decode()
    except FileNotFoundError as error:
        known = "Give the path of one, or the name of a recipe that is shipped: `fedllm-sec recipe list`."
        raise RecipeError(f"{path}: there is no such file. {known}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({reason(error)}). Give a recipe's file, UTF-8 text.") from error
    if len(data) > MOST_BYTES:
        raise RecipeError(f"{path}: is longer than {MOST_BYTES:,} bytes. A recipe has a few thousand.")
    raw = parse(text, str(path))
    if raw is None:
        raise RecipeError(
            f"{path}: is empty. Write a recipe into it, or begin with a copy of a shipped one: "
            "`fedllm-sec recipe show quickstart`."
        )
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: must be a mapping of sections, got {type(raw).__name__}.")
    refuse_undone(overrides)
    for assignment in overrides:
        override(raw, assignment)
    return raw


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default, but for columns that were not given: a format finds its own by that."""
    said = recipe.model_dump(mode="json")
    if (columns := getattr(recipe.data, "columns", None)) is not None:
        said["data"]["columns"] = {key: said["data"]["columns"][key] for key in sorted(columns.model_fields_set)}
    return plainyaml.dump(said)
