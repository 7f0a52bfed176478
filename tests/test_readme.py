"""What the README tells people to type works, and what it points to is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm_sec.train import load
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_point_to_files_that_exist(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_python_examples_run(tmp_path: Path):
    numerics, own_rule = blocks(ROOT / "README.md", "python")
    (tmp_path / "rules.py").write_text(own_rule)
    program = numerics + "\nassert decision.update.shape == (1000,) and not decision.kept[:2].all()\n"
    program += 'import fedllm_sec\nprint(fedllm_sec.aggregate(rows, "rules:norm_filter", factor=1.5).kept)\n'
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "tensor" in done.stdout


def commands() -> list[str]:
    lines = "\n".join(b for page in PAGES for b in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return sorted({line.split("#")[0].strip() for line in lines if "fedllm_sec.train" in line})


@pytest.mark.parametrize("command", commands())
def test_training_commands_name_recipes_that_load(command: str):
    words = shlex.split(command)
    arguments = words[words.index("fedllm_sec.train") + 1 :]
    switches = ("--explain", "--check")  # may stand anywhere
    recipe, *rest = [a for a in arguments if a not in switches]
    overrides = [a for a in rest if "=" in a and not a.startswith("-")]
    if recipe == "recipe.yaml":  # stands for any
        return
    assert load(ROOT / recipe, overrides)


def test_scripts_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"(?:scripts|configs|recipes)/[\w./-]+\.(?:sh|py|yaml|txt)", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
