"""docs/recipe_keys.md, made from fedllm_sec/recipe/sections.py: `python scripts/make_recipe_keys.py`.

The comment beside a field is its description, the docstring of a section its first sentence.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

import annotated_types
import yaml
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fedllm_sec.build.names import BESIDE  # noqa: E402
from fedllm_sec.recipe import adversary, classifier, defense, language_model, machines, sections  # noqa: E402
from fedllm_sec.recipe.places import home  # noqa: E402
from fedllm_sec.recipe.sections import TASKS, Recipe, Section  # noqa: E402

PAGE = ROOT / "docs" / "recipe_keys.md"
INTRO = """# Recipe keys

<!-- Made by scripts/make_recipe_keys.py from fedllm_sec/recipe/sections.py: change that file and run the script. -->

Every key that a recipe may hold, its values and its default. A key that is not here is an error, and so is one that
cannot act. On the command line the same key is `clients.lr=1e-3`. A *method* is a name of the menu with its settings,
such as `{name: krum, f: 2}`: `python -m fedllm_sec.menu` lists them. Where null stands for a value, the last column
says which. Paths lead from the working directory, whether the command runs a recipe or a grid, and `~` is the home
folder; only `base:` of a grid, which names another recipe file, is relative to the grid's own file.
"""


def comments() -> dict[tuple[str, str], str]:
    """(class, field) -> the comment behind the field."""
    found = {}
    for text in map(inspect.getsource, (adversary, classifier, defense, language_model, machines, sections)):
        lines = text.splitlines()
        for node in ast.parse(text).body:
            for field in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.end_lineno:
                    behind = lines[field.end_lineno - 1].encode()[field.end_col_offset :].decode()
                    if behind.strip().startswith("#"):
                        found[(node.name, field.target.id)] = behind.strip().removeprefix("#").strip()
    return found


def description(section: type[Section], name: str, known: dict[tuple[str, str], str]) -> str:
    """The comment behind a field, of the class that defines it or of one that it inherits from."""
    of = (known[(cls.__name__, name)] for cls in section.__mro__ if (cls.__name__, name) in known)
    return next(of, "").replace("None:", "null:")


def kinds(annotation: Any) -> list[str]:
    """What may stand there, in words; null is left out."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return [word for part in inner if part is not type(None) for word in kinds(part)]
    if origin is typing.Annotated:
        return [limited(kinds(inner[0])[0], inner[1:])]
    if origin is typing.Literal:
        return [f"`{json.dumps(value) if isinstance(value, bool) else value}`" for value in inner]
    if annotation == dict[str, Any]:
        return ["method"]
    if annotation == list[dict[str, Any]]:
        return ["list of methods"]
    if origin is dict:
        key, value = inner
        return ["name: overrides"] if value == dict[str, Any] else [f"{kinds(key)[0]}: {kinds(value)[0]}, ..."]
    if origin in (list, tuple):
        return [f"list of {kinds(inner[0])[0].replace('number', 'numbers')}"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["section"]
    return [{int: "whole number", float: "number", bool: "true or false", str: "text"}.get(annotation, "")]


def limited(kind: str, limits: Any) -> str:
    """The kind with its bounds."""
    words = []
    if any(isinstance(limit, AfterValidator) and limit.func is home for limit in limits):
        kind = "name or path"
    for limit in limits:
        for part in limit.metadata if isinstance(limit, FieldInfo) else [limit]:
            if isinstance(part, annotated_types.Gt):
                words.append("above 0" if part.gt == 0 else f"above {part.gt:g}")
            if isinstance(part, annotated_types.Ge):
                words.append(f"from {part.ge:g}")
            if isinstance(part, annotated_types.Lt):
                words.append(f"below {part.lt:g}")
            if isinstance(part, annotated_types.Le):
                words.append(f"to {part.le:g}")
    return " ".join([kind, *words])


def default(field: FieldInfo) -> str:
    """The default as YAML."""
    if field.is_required():
        return "needed"
    value = field.default
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, str):
        return f"`{value}`" if value else '`""`'
    return f"`{json.dumps(value)}`" if not isinstance(value, dict) else f"`{yaml_line(value)}`"


def yaml_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip()


def rows(section: type[Section], known: dict[tuple[str, str], str]) -> list[str]:
    """One line of the table for each key of a section."""
    made = ["| key | values | default | |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if section is Recipe and name in ("model", "data", "evaluate"):
            values = "by task, below"
        elif section is Recipe and name == "task":
            values = " or ".join(f"`{task}`" for task in TASKS)
        else:
            values = limited(" or ".join(kinds(field.annotation)), field.metadata)
        shown = "`causal_lm`" if section is Recipe and name == "task" else default(field)
        if shown == "needed" and section is Recipe:
            shown = ""
        made.append(f"| `{name}` | {values} | {shown} | {description(section, name, known)} |".replace("  |", " |"))
    return made


def inner(annotation: Any) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def places() -> dict[type[Section], dict[str, list[str]]]:
    """Section -> its places in recipes -> the tasks that have it there."""
    found: dict[type[Section], dict[str, list[str]]] = {}

    def walk(section: type[Section], place: str, task: str) -> None:
        for name, field in section.model_fields.items():
            there = inner(field.annotation)
            if there is not None:
                at = f"{place}.{name}".strip(".")
                found.setdefault(there, {}).setdefault(at, []).append(task)
                walk(there, at, task)

    for task, kind in TASKS.items():
        walk(kind, "", task)
    return found


def page() -> str:
    """The whole page."""
    known = comments()
    out = [INTRO, "## The recipe", "", *rows(Recipe, known), ""]
    methods = [task for task, kind in TASKS.items() if inner(kind.model_fields["model"].annotation) is None]
    out += [
        f"For {', '.join(f'`{task}`' for task in methods)}, `model` is a method, which takes beside its settings:",
        "",
        *(f"- `{key}`: {said}" for key, said in BESIDE["model"].items()),
        "",
    ]
    for section, at in places().items():
        for place, tasks in at.items():
            which = "" if len(tasks) == len(TASKS) else f" (task {', '.join(tasks)})"
            said = (section.__doc__ or "").strip() if section.__doc__ != Section.__doc__ else ""
            out += [f"## `{place}`{which}", "", *([said, ""] if said else []), *rows(section, known), ""]
    return "\n".join(out).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
