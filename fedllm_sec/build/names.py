"""Raw recipe -> checked recipe: the names and settings of methods, against the menus."""

from __future__ import annotations

from typing import Any

from fedllm_sec import algorithms, attacks, defenses, models
from fedllm_sec.data import partition
from fedllm_sec.errors import RecipeError
from fedllm_sec.recipe import reading
from fedllm_sec.recipe.resolve import Menu, check_settings, find, resolve
from fedllm_sec.recipe.sections import Recipe

# place in the recipe -> menu, kinds that may stand there
PLACES: dict[str, tuple[Menu, tuple[str, ...]]] = {
    "clients.partition": (partition.MENU, ("",)),
    "algorithm": (algorithms.MENU, ("",)),
    "attack.local": (attacks.MENU, ("local",)),
    "attack.update": (attacks.MENU, ("update",)),
    "defense.before": (defenses.MENU, ("before",)),
    "defense.rule": (defenses.MENU, ("rule",)),
    "defense.after": (defenses.MENU, ("after",)),
}

# task of the recipe -> kinds of data attacks that act on its rows
DATA_ATTACKS: dict[str, tuple[str, ...]] = {
    "causal_lm": ("data", "data_text"),
    "classify": ("data", "data_image"),
    "nas": ("data", "data_image"),
    "next_char": ("data",),
    "gan": (),
}

# task of the recipe -> kinds of client-side defenses that can act in it, where it is not only "client"
CLIENT_DEFENSES: dict[str, tuple[str, ...]] = {"classify": ("client", "client_image")}


def checked(raw: Any) -> Recipe:
    """A validated recipe, or one RecipeError that lists every mistake in keys, types, names and settings."""
    return reading.check(raw, menu_problems)


def places(task: Any) -> dict[str, tuple[Menu, tuple[str, ...]]]:
    """PLACES for one task of the recipe."""
    if task not in DATA_ATTACKS:
        return PLACES
    found = {
        **PLACES,
        "attack.data": (attacks.MENU, DATA_ATTACKS[task]),
        "defense.client": (defenses.CLIENT_MENU, CLIENT_DEFENSES.get(task, ("client",))),
    }
    return found if task == "causal_lm" else {"model": (models.MENU, (task,)), **found}


def menu_problems(raw: dict[str, Any]) -> list[str]:
    """What is wrong with the names and settings of methods in a raw recipe."""
    problems: list[str] = []
    for place, (menu, kinds) in places(raw.get("task", "causal_lm")).items():
        here: Any = raw
        for key in place.split("."):
            here = here.get(key) if isinstance(here, dict) else None
        if here is None:
            continue
        is_list = isinstance(here, list)
        for number, block in enumerate(here if is_list else [here]):
            where = f"{place}.{number}" if is_list else place
            if not isinstance(block, dict) or not isinstance(block.get("name"), str):
                problems.append(
                    f"{where}: {block!r}: must be a block with a name, e.g. {{name: {sorted(menu or ['x'])[0]}}}."
                )
                continue
            problems += _block_problems(block, menu, kinds, where)
    return problems


def _block_problems(block: dict[str, Any], menu: Menu, kinds: tuple[str, ...], where: str) -> list[str]:
    name = block["name"]
    if name in menu and menu[name].kind not in kinds:
        fitting = sorted(n for n, e in menu.items() if e.kind in kinds)
        kind = menu[name].kind
        return [
            f"{where}.name: {name} is of kind {kind!r} and cannot stand here. Fitting: {', '.join(fitting) or 'none'}."
        ]
    try:
        check_settings(find(name, menu, where), {k: v for k, v in block.items() if k != "name"}, where)
    except RecipeError as error:
        return error.problems
    return []


def make(block: dict[str, Any], menu: Menu, place: str) -> Any:
    """The method that a block {name, settings} of the recipe asks for."""
    return resolve(block["name"], {k: v for k, v in block.items() if k != "name"}, menu, place)
