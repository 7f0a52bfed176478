"""`python -m fedllm_sec.menu [name ...] [--json]`: what a recipe can name, with settings and papers."""

from __future__ import annotations

import inspect
import json
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedllm_sec import algorithms, attacks, defenses, models
from fedllm_sec.data import partition
from fedllm_sec.errors import Parser, quietly
from fedllm_sec.evaluation import judges
from fedllm_sec.recipe.resolve import Menu, did_you_mean, settings_of

# Where the names come from, and where they stand in a recipe.
MENUS: dict[str, Menu] = {
    "defense": defenses.MENU,
    "defense.client": defenses.CLIENT_MENU,
    "defense.repair": defenses.REPAIR_MENU,
    "attack": attacks.MENU,
    "attack.privacy": attacks.PRIVACY_MENU,
    "algorithm": algorithms.MENU,
    "clients.partition": partition.MENU,
    "model": models.MENU,
    "evaluate.judge": judges.MENU,
}


@dataclass(frozen=True)
class Setting:
    """A keyword-only parameter of a method."""

    name: str
    type: str
    needed: bool
    default: Any  # None where it is needed


@dataclass(frozen=True)
class Line:
    """A method on a menu."""

    menu: str
    kind: str
    name: str
    summary: str
    paper: str
    settings: tuple[Setting, ...]


def lines() -> list[Line]:
    """All methods, in the order of the menus."""
    return [
        Line(
            menu,
            entry.kind,
            name,
            " ".join((inspect.getdoc(entry.make) or "").split("\n\n")[0].split()),
            entry.paper,
            tuple(_setting(entry.make, parameter) for parameter in settings_of(entry.make).values()),
        )
        for menu, entries in MENUS.items()
        for name, entry in entries.items()
    ]


def _setting(make: Callable[..., Any], parameter: inspect.Parameter) -> Setting:
    annotation = parameter.annotation
    shown = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    hint = typing.get_type_hints(make.__init__ if inspect.isclass(make) else make)[parameter.name]
    if shown.isidentifier() and not isinstance(hint, type):  # the name of a type that is written out elsewhere
        shown = str(hint).replace("typing.", "")
    needed = parameter.default is parameter.empty
    return Setting(parameter.name, shown, needed, None if needed else parameter.default)


def _settings_text(line: Line) -> list[str]:
    return [f"{s.name}: {s.type}" + (" (needed)" if s.needed else f" = {s.default!r}") for s in line.settings]


def overview(chosen: Iterable[Line]) -> str:
    """One block of lines for each method, under its menu and kind."""
    out: list[str] = []
    heading = ""
    for line in sorted(chosen, key=lambda line: list(MENUS).index(line.menu)):
        here = f"{line.menu}, kind {line.kind}" if line.kind else line.menu
        if here != heading:
            out += ["", here, "-" * len(here)]
            heading = here
        out.append(f"{line.name}  [{line.paper}]")
        out += [f"    {text}" for text in (line.summary, *_settings_text(line))]
    return "\n".join(out).strip("\n")


def details(line: Line) -> str:
    """Everything the method's docstring says, and its settings."""
    make = MENUS[line.menu][line.name].make
    where = f"{line.menu}, kind {line.kind}" if line.kind else line.menu
    settings = [f"  {text}" for text in _settings_text(line)] or ["  none"]
    code = f"{make.__module__}:{make.__qualname__}"
    return "\n".join(
        [
            f"{line.name}  [{line.paper}]  ({where})",
            "",
            inspect.getdoc(make) or "",
            "",
            "Settings:",
            *settings,
            "",
            code,
        ]
    )


@quietly
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(prog="python -m fedllm_sec.menu", description="What a recipe can name.")
    parser.add_argument("name", nargs="*", help="show these in full; without a name, list everything")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    options = parser.parse_args(arguments)
    known = lines()
    names = {line.name for line in known}
    missing = [name for name in options.name if name not in names]
    if missing:
        print(
            "\n".join(f'error: menu: there is no "{name}".{did_you_mean(name, names)}' for name in missing),
            file=sys.stderr,
        )
        return 2
    chosen = [line for line in known if not options.name or line.name in options.name]
    if options.json:
        print(json.dumps([asdict(line) for line in chosen], indent=2, default=str))
    elif options.name:
        print("\n\n".join(details(line) for line in chosen))
    else:
        print(overview(chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
