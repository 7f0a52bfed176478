"""The recipes that come with the package, by name: "quickstart", "llm/ag_news_backdoor", "grids/quick"."""

from __future__ import annotations

import os
from pathlib import Path

from fedllm_sec.errors import RecipeError
from fedllm_sec.recipe.resolve import did_you_mean

# In a wheel they lie beside this file, in a checkout at its top (pyproject.toml puts them into the wheel).
_PLACES = (Path(__file__).parent / "shipped", Path(__file__).parents[2] / "recipes")


def folder() -> Path:
    """Where they lie."""
    for place in _PLACES:
        if (place / "quickstart.yaml").is_file():
            return place
    raise RecipeError("the shipped recipes are missing from this installation. Install the package again.")


def names() -> list[str]:
    """All names, the short ones first."""
    top = folder()
    found = (path.relative_to(top).with_suffix("").as_posix() for path in top.rglob("*.yaml"))
    return sorted(found, key=lambda name: (name.count("/"), name))


def find(path: Path | None, kind: str = "recipe", example: str = "python -m fedllm_sec.train quickstart") -> Path:
    """The path itself where there is such a file or where it is no name; else the shipped recipe of that name."""
    if path is None:
        raise RecipeError(f"no {kind} is given. Give its path or the name of a shipped one, e.g. {example}.")
    path = Path(os.path.expanduser(path))
    if "=" in path.name and not path.exists():
        raise RecipeError(
            f'{kind}: "{path}" is an override, and stands where the {kind} belongs, e.g. {example} {path}.'
        )
    if path.exists() or path.suffix in (".yaml", ".yml") or path.is_absolute():
        return path
    return file_of(path.as_posix())


def file_of(name: str) -> Path:
    """The file of a shipped recipe."""
    if name not in names():
        raise RecipeError(f'recipe: there is no file and no shipped recipe "{name}".{did_you_mean(name, names())}')
    return folder() / f"{name}.yaml"
