"""`python -m fedllm_sec.recipe from-fedml config.yaml [--out recipe.yaml]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from fedllm_sec.build.federation import menu_problems, rehearse
from fedllm_sec.errors import FedError, RecipeError
from fedllm_sec.fedml.notes import flatten
from fedllm_sec.fedml.translate import line, translate
from fedllm_sec.recipe import reading as recipes


def main(argv: Sequence[str] | None = None) -> int:
    """0: all of it is in the recipe; 1: something asked for has no equivalent; 2: it cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m fedllm_sec.recipe", description="What can be done with recipes.")
    commands = parser.add_subparsers(required=True, metavar="command")
    fedml = commands.add_parser(
        "from-fedml",
        help="turn a FedML security YAML into a recipe",
        description="Prints the recipe, and to the error output what became of each key. Exits with 1 if something "
        "asked for has no equivalent.",
    )
    fedml.add_argument("config", type=Path, help="FedML's YAML, with train_args, attack_args, defense_args, ...")
    fedml.add_argument("--out", type=Path, metavar="RECIPE", help="write the recipe to this new file instead")
    options = parser.parse_args(argv)
    try:
        return from_fedml(options.config, options.out)
    except FedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def from_fedml(config: Path, out: Path | None) -> int:
    """Translate, say what became of each key, check what came out, and print or write it."""
    raw = recipes.read(config)
    if out is not None and out.exists():
        raise RecipeError(f"--out: {out} exists. Choose another name, or remove it.")
    recipe, notes = translate(raw)
    places = flatten(raw).places
    for note in notes:
        print(line(note, places), file=sys.stderr)
    problems = problems_of(recipe)
    for problem in problems:
        print(f"{'TO BE CHANGED':<14}{problem}", file=sys.stderr)
    absent = sum(note.kind == "missing" for note in notes)
    if absent:
        print(
            f"{absent} of {len(notes)} keys have no equivalent: the recipe is not the whole of {config}.",
            file=sys.stderr,
        )
    text = f"# From {config.name} by fedllm_sec.recipe from-fedml.\n"
    text += yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
    return 1 if absent or problems else 0


def problems_of(recipe: dict[str, object]) -> list[str]:
    """What our own checker says about it."""
    try:
        rehearse(recipes.check(recipe, menu_problems))
    except RecipeError as error:
        return error.problems
    return []
