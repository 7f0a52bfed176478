"""Raw recipe -> checked recipe: the names and settings of methods, against the menus."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from fedllm_sec import algorithms, attacks, defenses, models
from fedllm_sec.build.called import need_to_fit
from fedllm_sec.data import partition
from fedllm_sec.errors import FedError, RecipeError
from fedllm_sec.evaluation import judges
from fedllm_sec.models import pretrained
from fedllm_sec.recipe import reading
from fedllm_sec.recipe.places import TEXT_TASKS
from fedllm_sec.recipe.resolve import Menu, check_settings, did_you_mean, find, resolve
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.tasks.buffers import MODES

# place in the recipe -> menu, kinds that may stand there
PLACES: dict[str, tuple[Menu, tuple[str, ...]]] = {
    "clients.partition": (partition.MENU, ("",)),
    "algorithm": (algorithms.MENU, ("",)),
    "attack.local": (attacks.MENU, ("local",)),
    "attack.update": (attacks.MENU, ("update",)),
    "defense.before": (defenses.MENU, ("before",)),
    "defense.rule": (defenses.MENU, ("rule",)),
    "defense.after": (defenses.MENU, ("after",)),
    "defense.repair": (defenses.REPAIR_MENU, ("repair",)),
}

# the same in the recipe of a language model
OF_TEXT = {"evaluate.judge": (judges.MENU, ("",)), "evaluate.second_judge": (judges.MENU, ("",))}

# task of the recipe -> kinds of data attacks that act on its rows
DATA_ATTACKS: dict[str, tuple[str, ...]] = {
    "causal_lm": ("data", "data_text"),
    "classify_text": ("data", "data_text"),
    "classify": ("data", "data_image"),
    "nas": ("data", "data_image"),
    "next_char": ("data",),
    "gan": (),
}

# task of the recipe -> kinds of privacy attacks that can read what its clients send
PRIVACY: dict[str, tuple[str, ...]] = {
    "classify": ("images", "labels"),
    "causal_lm": ("membership", "canary", "tokens"),
}

# task of the recipe -> kinds of client-side defenses that can act in it, where it is not only "client"
CLIENT_DEFENSES: dict[str, tuple[str, ...]] = {
    "classify": ("client", "client_rows", "client_image"),
    "classify_text": ("client", "client_rows"),
    "causal_lm": ("client", "client_rows"),
}


def checked(raw: Any, allow_code: bool = True) -> Recipe:
    """A validated recipe, or one RecipeError that lists every mistake in keys, types, names and settings.

    Without `allow_code` nothing that a recipe names as "package.module:name" is imported, nor are its settings checked.
    """
    return reading.check(raw, lambda raw: menu_problems(raw, allow_code))


def places(task: Any) -> dict[str, tuple[Menu, tuple[str, ...]]]:
    """PLACES for one task of the recipe."""
    if not isinstance(task, str) or task not in DATA_ATTACKS:
        return PLACES
    found = {
        **PLACES,
        "attack.data": (attacks.MENU, DATA_ATTACKS[task]),
        "attack.privacy": (attacks.PRIVACY_MENU, PRIVACY.get(task, ())),
        "defense.client": (defenses.CLIENT_MENU, CLIENT_DEFENSES.get(task, ("client",))),
    }
    if task in TEXT_TASKS:  # whose models are in no menu
        return {**found, **OF_TEXT} if task == "causal_lm" else found
    return {"model": (models.MENU, (task,)), **found}


def _blocks(raw: dict[str, Any]) -> Iterator[tuple[str, Any, Menu, tuple[str, ...]]]:
    """Each block of a raw recipe that is to name a method: place, block, menu, kinds that may stand there."""
    for place, (menu, kinds) in places(raw.get("task", "causal_lm")).items():
        here: Any = raw
        for key in place.split("."):
            here = here.get(key) if isinstance(here, dict) else None
        if isinstance(here, list):
            yield from ((f"{place}.{number}", block, menu, kinds) for number, block in enumerate(here))
        elif here is not None:
            yield place, model_block(here) if place == "model" and isinstance(here, dict) else here, menu, kinds


def menu_problems(raw: dict[str, Any], allow_code: bool = True) -> list[str]:
    """What is wrong with the names and settings of methods in a raw recipe."""
    problems: list[str] = []
    code = [] if allow_code else [where for where, _ in outside(raw)]
    for where, block, menu, kinds in _blocks(raw):
        if not isinstance(block, dict) or not isinstance(block.get("name"), str):
            fitting = sorted(name for name, entry in menu.items() if not kinds or entry.kind in kinds)
            example = block if block in fitting else (fitting or ["x"])[0]
            problems.append(f"{where}: {block!r}: must be a block with a name, e.g. {{name: {example}}}.")
        elif where not in code:
            problems += _block_problems(block, menu, kinds, where)
        elif block["name"].count(":") > 1 or not all(map(str.isidentifier, re.split("[.:]", block["name"]))):
            problems.append(f"{where}.name: {block['name']!r}: is no package.module:name.")
    return problems


# ---------------------------------------------------------------- code from outside


def outside(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """Place and name of each method of a raw recipe that is code from outside: importing it runs it."""
    return [
        (where, block["name"])
        for where, block, menu, _ in _blocks(raw)
        if isinstance(block, dict) and isinstance(name := block.get("name"), str) and ":" in name and name not in menu
    ]


def without_code(recipe: Recipe) -> Recipe:
    """The recipe with a plain method, or none, in every place that names code from outside: what else it says."""
    code = {where for where, _ in outside(recipe.model_dump())}
    changed: dict[str, Any] = {}
    if "algorithm" in code:
        changed["algorithm"] = {"name": "fedavg"}
    if "clients.partition" in code:
        changed["clients"] = recipe.clients.model_copy(update={"partition": {"name": "iid"}})
    if unread := {key.split(".")[1]: None for key in OF_TEXT if key in code}:
        changed["evaluate"] = recipe.evaluate.model_copy(update=unread)
    for block in ("attack", "defense"):
        if any(where.startswith(f"{block}.") for where in code):  # its methods work together: none of them is tried
            changed[f"enable_{block}"] = False
    return recipe.model_copy(update=changed)


# ---------------------------------------------------------------- one block


def _block_problems(block: dict[str, Any], menu: Menu, kinds: tuple[str, ...], where: str) -> list[str]:
    name = block["name"]
    if name in menu and menu[name].kind not in kinds:
        fitting = sorted(n for n, e in menu.items() if e.kind in kinds)
        kind = menu[name].kind
        return [
            f"{where}.name: {name} is of kind {kind!r} and cannot stand here. Fitting: {', '.join(fitting) or 'none'}."
        ]
    try:
        check_settings(find(name, menu, where), _settings(block, where), where)
        if where == "model":
            need_buffers(block, name in menu, kinds)
            if not isinstance(block.get("start"), (str, type(None))):
                raise RecipeError(f"model.start: {block['start']!r}: must be the path of a folder or a file.")
        if name == pretrained.NAME and where == "model":
            pretrained.need_folder(block["folder"])
    except RecipeError as error:
        return error.problems
    return []


def need_buffers(block: dict[str, Any], shipped: bool, kinds: tuple[str, ...]) -> None:
    """An error where `buffers` of a small model's block is no way for them to travel, or the model has none."""
    mode = block.get("buffers")
    if mode is not None and mode not in MODES:
        raise RecipeError(
            f"model.buffers: {mode!r}: must be one of {', '.join(MODES)}.{did_you_mean(str(mode), MODES)}"
        )
    if mode is not None and not {"classify", "nas"} & {*kinds}:
        raise RecipeError(f"model.buffers: {mode}: acts where task is classify or nas, not {kinds[0]}. Remove it.")
    if mode is not None and shipped and block["name"] != pretrained.NAME and block.get("norm") != "batch":
        raise RecipeError(
            f"model.buffers: {mode}: {block['name']} keeps no running statistics. Remove it, or choose a model with "
            "BatchNorm (resnet and resnet18 with norm: batch, or your own)."
        )


BESIDE = {  # place -> keys of its block that are no settings of the method, as docs/recipe_keys.md has them
    "model": {
        "buffers": f"{', '.join(f'`{mode}`' for mode in MODES)}: how running statistics of BatchNorm travel "
        "(`classify` and `nas`; null: `average`)",
        "start": "a run folder, or a safetensors file of a state dict, to train on; null: anew",
    }
}


def model_block(block: dict[str, Any]) -> dict[str, Any]:
    """The block of a small model; one that names a folder or a hub name is that of a classifier to be found there."""
    folder = block.get("name")
    return {**block, "name": pretrained.NAME, "folder": folder} if pretrained.is_folder(folder) else block


def _settings(block: dict[str, Any], place: str) -> dict[str, Any]:
    return {k: v for k, v in block.items() if k not in ("name", *BESIDE.get(place, ()))}


def make(block: dict[str, Any], menu: Menu, place: str) -> Any:
    """The method that a block {name, settings} of the recipe asks for."""
    made = resolve(block["name"], _settings(block, place), menu, place)
    if block["name"] not in menu:
        need_to_fit(made, block["name"], place)
    return made


@contextlib.contextmanager
def told_in_a_line(block: dict[str, Any], place: str) -> Iterator[None]:
    """Whatever code from outside raises is a mistake in the recipe that names it, not a fault of this program."""
    try:
        yield
    except FedError:
        raise
    except Exception as error:
        if ":" not in block["name"]:
            raise
        why = " ".join(str(error).split())[:300]
        raise RecipeError(f"{place}.name: {block['name']}: {type(error).__name__}: {why}. Mend it.") from error
