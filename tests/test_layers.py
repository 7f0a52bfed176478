"""Imports go one way: each part may import only what lies below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedllm_sec

PACKAGE = Path(fedllm_sec.__file__).parent

# part -> layer; a module may import its own part and parts of lower layers. Parts of layer 3 do not import each other.
LAYERS = {
    "errors": 0, "seeds": 0, "resolve": 1, "history": 1, "rowfile": 1, "fetching": 1,
    "outcomes": 2, "sections": 2, "updates": 2, "loaded": 3,
    "recipe": 3, "kernels": 3, "protocols": 4,
    "tasks": 5, "models": 5, "data": 5, "attacks": 5, "defenses": 5, "algorithms": 5, "evaluation": 5,
    "api": 6, "client": 6, "compute": 6, "memory": 6, "parts": 6, "testing": 8, "testing_attacks": 7, "federation": 7,
    "build_text": 8, "build_arrays": 8, "build_characters": 8, "build_threat": 8, "distillation": 8,
    "build_transfer": 9, "rehearsal": 9, "build": 10, "menu": 11, "cost": 11, "fedml": 11, "explain": 12, "train": 13,
    "axes": 4, "grid": 11, "cells": 14, "workers": 15, "results": 15, "benchmark": 16,
    "report": 3, "__init__": 20,
}  # fmt: skip


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    found = set()
    module = ast.parse(path.read_text())
    # what stands under `if __name__ == "__main__"` runs only where nobody imports the module
    module.body = [
        node for node in module.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))
    ]
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedllm_sec"):
            rest = (node.module or "").split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fedllm_sec.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_lies_below_it(path: Path):
    own = part_of(path)
    if own == "__init__":
        return
    assert own in LAYERS, f"{own} has no layer: give it one here"
    for other in imported_parts(path) - {own}:
        assert LAYERS[other] < LAYERS[own], f"{path.name} ({own}) imports {other}, which is not below it"


def test_report_reads_history_only():
    for path in (PACKAGE / "report").rglob("*.py"):
        assert imported_parts(path) <= {"report", "history", "errors", "outcomes"}, path


def test_importing_the_package_does_nothing_heavy():
    code = "import sys, fedllm_sec; print(sorted({'torch', 'transformers', 'numba', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
