"""`python -m fedllm_sec.recipe from-fedml config.yaml [--out recipe.yaml]`."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError
from fedllm_sec.fedml.notes import flatten
from fedllm_sec.fedml.translate import line, translate
from fedllm_sec.recipe import reading as recipes


def from_fedml(config: Path, out: Path | None) -> int:
    """Translate, say what became of each key, check what came out, print or write it; gives the exit code."""
    if not config.exists() or config.is_dir():
        wrong = "is a folder" if config.is_dir() else "there is no such file"
        raise RecipeError(f"{config}: {wrong}. Give the YAML that FedML is started with, usually fedml_config.yaml.")
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
        planned(checked(recipe))
    except RecipeError as error:
        return error.problems
    return []
