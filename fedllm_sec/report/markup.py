"""What the pages of runs and of grids share: the frame, the script's hash, and a few facts."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedllm_sec.report.measures import duration, flat, listed, total_seconds
from fedllm_sec.report.runs import VERSION, Run
from fedllm_sec.report.terms import as_yaml

HERE = Path(__file__).parent

T = TypeVar("T")


@lru_cache(maxsize=1)
def _templates() -> Environment:
    """The templates, each compiled once in a process."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = unbroken
    environment.filters["breakable"] = breakable
    return environment


def fill(template: str, *, styles: Sequence[str], scripts: Sequence[str], **content: Any) -> str:
    """A whole page: everything from files is escaped, and only the page's own script may run."""
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = (
        _templates()
        .get_template(template)
        .render(
            version=VERSION,
            css=Markup("\n".join((HERE / name).read_text(encoding="utf-8") for name in styles)),
            js=Markup(script),
            script_hash=f"sha256-{digest}",
            **content,
        )
    )
    return str(text)


def unbroken(text: str) -> str:
    """No line break between a number and its per cent sign, or inside a quoted word such as " Sports"."""
    return re.sub(r'(?<=") (?=[^\s"]+")| (?=%)', "\u00a0", text)


def breakable(name: str) -> Markup:
    """A name that may break after "_", "-", "+" and "/" where a column is narrow, and nowhere else."""
    return Markup("<wbr>").join(re.split(r"(?<=[_+/-])(?=.)", name))


def grouped(runs: Sequence[Run], content: Callable[[Run], T]) -> list[tuple[str, T]]:
    """(names of the runs, what they share), in order of first appearance."""
    groups: list[tuple[list[str], T]] = []
    for run in runs:
        found = content(run)
        for names, known in groups:
            if known == found:
                names.append(run.name)
                break
        else:
            groups.append(([run.name], found))
    return [(listed(names), found) for names, found in groups]


def facts_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What all runs share, in a few words."""
    facts = []
    for title, keys in (
        ("model", ("model", "name")),
        ("data", ("data", "name")),
        ("clients", ("clients", "total")),
        ("per round", ("clients", "per_round")),
        ("rounds", ("rounds",)),
        ("LoRA r", ("model", "lora", "r")),
        ("algorithm", ("algorithm", "name")),
        ("seed", ("seed",)),
    ):
        values = {as_yaml(_at(run.recipe, keys)) for run in runs}
        if len(values) == 1 and (value := values.pop()) != "null":
            facts.append((title, Path(value).name or value if title in ("model", "data") else value))
    times = [seconds for run in runs if (seconds := total_seconds(run)) is not None]
    if times:
        facts.append(("took", duration(sum(times))))
    return facts


def _at(recipe: Mapping[str, Any], keys: Sequence[str]) -> Any:
    here: Any = recipe
    for key in keys:
        here = here.get(key) if isinstance(here, Mapping) else None
    return here


def environment_of(run: Run) -> list[tuple[str, str]]:
    """The environment as flat (key, value) pairs, without the command."""
    return [(key, as_yaml(value)) for key, value in flat(run.environment) if key != "command" and value is not None]
