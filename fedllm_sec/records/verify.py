"""`fedllm-sec verify RUN [RUN ...]`: whether run folders are as their runs left them. Only files are read."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm_sec.errors import FedError, Parser, ResumeError, quietly, reason
from fedllm_sec.records import checkpoint, inventory
from fedllm_sec.records.files import in_a_line
from fedllm_sec.records.folder import RunFolder, read_recipe

EPILOG = """\
A RUN is a run folder, the folder of a recipe with variants, or a grid folder: then every run in it is looked at.
A run that is not finished is whole if its history and its checkpoint belong together.

Exit code 0: all are whole; 1: something is not as its run left it, or was never run; 2: a folder that holds no run.

examples:
  fedllm-sec verify runs/quickstart
  fedllm-sec verify runs/*
"""
INSIDE = ("cells", "")  # of a grid; of a recipe with variants


@dataclass
class Found:
    """What has become of one run: how far it came, and {file: what is wrong with it}."""

    rounds: int
    finished: bool
    wrong: dict[str, str] = field(default_factory=dict)
    told: bool = False  # whether `wrong` says the way out
    again: tuple[str, ...] = ()  # how the names of files begin that starting the run makes again


def look(folder: Path) -> Found:
    """What has become of a run folder, whoever made it."""
    if not folder.is_dir():
        return Found(0, False, {"": "is gone, or was never run"})
    run, state, closed = RunFolder(folder), dict[str, Any](), inventory.read_summary(folder)
    if wrong := run.in_the_way():
        return Found(0, False, {str(path.relative_to(folder)): why for path, why in wrong.items()}, told=True)
    for path in (run.history, run.checkpoint):
        if path.exists() and not path.is_file():
            return Found(0, False, {path.name: "is no file"})
    recipe: dict[str, Any] = {}
    try:
        recipe = read_recipe(folder / "recipe.yaml")
    except (FedError, OSError) as error:
        if not (isinstance(closed, dict) and "recipe.yaml" in closed["made"]):  # by which its command is known again
            return Found(0, False, {"recipe.yaml": _brief(error, folder / "recipe.yaml")})
    if run.checkpoint.exists() or (run.history.exists() and run.history.stat().st_size):  # else: stopped in round 1
        try:
            state = checkpoint.marks(run.checkpoint.read_bytes())
            run.agreeing(state)
        except FedError as error:
            return Found(0, False, {"history.jsonl": _brief(error, run.history)})
        except (*checkpoint.UNREADABLE, OSError) as error:
            return Found(0, False, {"checkpoint.safetensors": f"cannot be read ({_brief(error, run.checkpoint)})"})
    rounds, planned = int(state.get("round", 0)), recipe.get("rounds")
    ended = isinstance(closed, dict) and closed.get("rounds") == rounds  # so it was, whatever its recipe says now
    if not ended and (type(planned) is not int or rounds < planned):
        return Found(rounds, False, run.answers_changed(state))
    return Found(rounds, True, inventory.damage(folder), again=inventory.made_again(rounds))


def _brief(error: Exception, path: Path) -> str:
    """What is wrong with a file, without its name, which stands before it, and without the way out."""
    text = reason(error)
    for name in (f"{path}: ", f"{path}, ", f"{path.parent}: ", f"{path.name}: "):
        text = text.removeprefix(name)
    return in_a_line(text.split(". Restore")[0].removesuffix("."))


def runs_in(folder: Path) -> list[Path]:
    """The run folders that a folder is or holds."""
    if folder.is_file():
        raise ResumeError(f"{folder}: is a file. Give the folder it lies in.")
    if not folder.is_dir():
        raise ResumeError(f"{folder}: no such folder. Give a run folder, for example runs/quickstart.")
    before = sorted(child for child in folder.glob(f"{inventory.PRETRAIN}/*") if _is_run(child))
    if _is_run(folder):
        return [*before, folder]
    for inside in (folder / name for name in INSIDE):
        found = {child for child in inside.glob("*") if _is_run(child)}
        if found := found | _listed(folder):
            return [*before, *sorted(found)]
    raise ResumeError(f"{folder}: holds no run (no recipe.yaml, no history.jsonl). Give the folder that a run printed.")


def _listed(folder: Path) -> set[Path]:
    """The runs that a grid or a comparison says it has, in its own folder; none where it says nothing that is right."""
    named: list[Any] = []
    for file, of in (("grid.json", "cells"), ("comparison.json", "variants")):
        try:
            entries = json.loads((folder / file).read_text(encoding="utf-8"))[of]
            named += [entry["folder"] if isinstance(entry, dict) else entry for entry in entries]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
    paths = {folder / name for name in named if isinstance(name, str) and "\0" not in name}
    here = Path(os.path.realpath(folder))
    return {path for path in paths if here in Path(os.path.realpath(path)).parents}


def lost_list(folder: Path) -> str | None:
    """What is wrong with a grid's list of its cells; None where it is right, or the folder is no grid's."""
    path = folder / "grid.json"
    if not (path.exists() or (folder / "cells").is_dir()):
        return None
    try:
        whole = isinstance(json.loads(path.read_text(encoding="utf-8"))["cells"], list)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        whole = False
    return (
        None if whole else "grid.json does not list its cells: the grid's command, once it is removed, makes it again"
    )


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("recipe.yaml", "history.jsonl", inventory.SUMMARY, "error.json"))


def in_words(folder: Path, found: Found) -> Iterator[str]:
    """A line for the run, and one for every file that is not as the run left it."""
    how_far = f"{found.rounds} round{'' if found.rounds == 1 else 's'}"
    if not found.wrong:
        yield f"{folder}: whole, {how_far}" + ("" if found.finished else "; not finished: the same command goes on")
        return
    yield f"{folder}: damaged"
    for name, wrong in found.wrong.items():
        can = "the run's command makes it again" if found.again and name.startswith(found.again) else ""
        way_out = "" if found.told or not name else f": {can or 'cannot be made again'}"
        yield f"  {name} {wrong}{way_out}" if name else f"  {wrong}"


@quietly
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="fedllm-sec verify",
        description="Whether runs are as they were left: sizes and hashes of their files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, comparison or grid folder")
    options: Any = parser.parse_args(argv)
    code, damaged = 0, 0
    for given in options.runs:
        try:
            for folder in runs_in(Path(os.path.expanduser(given))):
                found = look(folder)
                damaged += bool(found.wrong)
                print(_printable("\n".join(in_words(folder, found))))
            if lost := lost_list(Path(os.path.expanduser(given))):
                damaged += 1
                print(_printable(f"{given}: damaged\n  {lost}"))
        except BrokenPipeError:
            raise  # nobody reads on
        except (FedError, OSError) as error:
            print(
                _printable(f"error: {error if isinstance(error, FedError) else f'{given}: {reason(error)}'}"),
                file=sys.stderr,
            )
            code = 2
    return code or int(damaged > 0)


def _printable(text: str) -> str:
    """Names in a stranger's folder do not command the terminal."""
    return "".join(mark if mark.isprintable() or mark == "\n" else "?" for mark in text)


if __name__ == "__main__":
    sys.exit(main())
