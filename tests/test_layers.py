"""Imports go one way: a room of the package imports only rooms on lower floors."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedllm_sec

PACKAGE = Path(fedllm_sec.__file__).parent

# From the ground up: a room may import itself and the rooms of lower floors, so no two rooms import each other.
FLOORS = (
    {"errors", "seeds"},
    {"recipe", "matrix", "records"},
    {"kernels", "models", "report"},
    {"protocols"},
    {"tasks", "data", "attacks", "defenses", "algorithms", "evaluation"},
    {"rounds", "api", "testing", "menu"},
    {"build"},
    {"train", "fedml"},
    {"grid", "deploy"},
    {"benchmark"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
DOORS = ("__init__.py", "__main__.py", "recipe/__main__.py")  # what a person types: may open onto any room


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    module = ast.parse(path.read_text())
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedllm_sec"):
            rest = (node.module or "").split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fedllm_sec.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_rooms_on_lower_floors(path: Path):
    if path.relative_to(PACKAGE).as_posix() in DOORS:
        return
    own = room_of(path)
    assert own in FLOOR, f"{own} is on no floor: give it one here"
    for other in imported_rooms(path) - {own}:
        assert FLOOR[other] < FLOOR[own], f"{path.name} ({own}) imports {other}, which is not below it"


def test_the_top_of_the_package_stays_small():
    names = [p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"]
    assert len(names) <= 28, f"{len(names)} entries: is a room missing? {sorted(names)}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_tells_one_story(path: Path):
    assert len(path.read_text().splitlines()) <= 320, f"{path.name} holds more than one story: cut it"


@pytest.mark.parametrize("room", sorted(p.parent for p in PACKAGE.rglob("__init__.py")), ids=lambda p: p.name)
def test_a_room_says_what_it_is_for(room: Path):
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text())), f"{room.name}/__init__.py says nothing"


def test_only_deploy_imports_flower_and_nvflare():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] != "deploy":
            assert not re.search(r"^\s*(from|import) (flwr|nvflare)\b", path.read_text(), re.MULTILINE), path


def test_report_reads_history_only():
    for path in (PACKAGE / "report").rglob("*.py"):
        assert imported_rooms(path) <= {"report", "records", "errors"}, path


def test_importing_the_package_does_nothing_heavy():
    code = "import sys, fedllm_sec; print(sorted({'torch', 'transformers', 'numba', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
