"""Every code block of README and docs: python runs, YAML is a recipe or a grid, commands are taken by their parsers."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fedllm_sec.__main__ import COMMANDS
from fedllm_sec.build.names import checked
from fedllm_sec.grid import grid
from fedllm_sec.recipe import plainyaml, reading
from fedllm_sec.testing import check_attack, check_defense
from tests.conftest import ROOT
from tests.test_readme import PAGES, blocks

LANGUAGES = {"python", "yaml", "bash", "csv", "jsonl", "json", ""}  # csv and json: tests/test_own_data_page.py
SIZES = {"rows": 10, "honest": 8, "backdoor": 1}
GIVEN: dict[str, Any] = {"h": 8, **{name: torch.randn(size, 50) for name, size in SIZES.items()}}


def pages_with(language: str) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_kind_that_is_tried(page: Path):
    opened = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
    assert set(opened) <= LANGUAGES


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        names = {name: value.clone() if torch.is_tensor(value) else value for name, value in GIVEN.items()}
        exec(compile(block, str(page), "exec"), names)
        if "norm_filter" in names:
            check_defense(names["norm_filter"], {"factor": 1.5})
        if "drift" in names:
            check_attack(names["drift"], kind="update", strength=("scale", 1.0, 9.0))
        if "Corner" in names:
            check_attack(names["Corner"], kind="data_image", target=0)
            check_attack(names["Boost"], kind="local", factor=3.0)


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_yaml_blocks_are_recipes_or_grids(page: Path, tmp_path: Path):
    for block in blocks(page, "yaml"):
        raw = plainyaml.parse(block, page.name)
        if "data" in raw:  # a whole recipe
            assert checked(raw)
            continue
        if "axes" not in raw:  # a part of one
            base = reading.read(ROOT / "recipes" / "quickstart.yaml", [])
            base.pop("variants")
            assert checked(reading.merge(base, raw))
            continue
        shutil.copy(ROOT / "recipes" / "quickstart.yaml", tmp_path / "quickstart.yaml")
        (tmp_path / "grids").mkdir()
        (tmp_path / "grids" / "mine.yaml").write_text(block)
        with mock.patch("fedllm_sec.grid.grid.planned"):
            assert len(grid.load(tmp_path / "grids" / "mine.yaml", []).cells) > 10


# ---------------------------------------------------------------- commands


class Parsed(Exception):
    """The words were taken."""


def lines_of(page: Path) -> list[str]:
    """Lines of bash blocks, lines that are set in as code, and commands inside a sentence."""
    text = page.read_text()
    inside = [" ".join(part.split()) for part in re.findall(r"`((?:python -m |fedllm-sec )[^`]+)`", text)]
    return [
        *"\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines(),
        *re.findall(r"^    (\S.*)$", text, re.M),
        *inside,
    ]


def commands() -> dict[tuple[str, ...], str]:
    """(command, arguments) of every line that starts one of ours -> where it stands."""
    found = {}
    for page in PAGES:
        for line in lines_of(page):
            if (start := re.search(r"(?:-m fedllm_sec\.|^fedllm-sec )(\w+)(.*)", line)) and start[1] in COMMANDS:
                words = shlex.split(start[2], comments=True)
                end = next((place for place, word in enumerate(words) if word in ("|", ">", ">>")), None)
                found[(start[1], *words[:end])] = page.name
    return found


def taking(real: Callable[..., Any]) -> Callable[..., Any]:
    def parse(*given: Any, **named: Any) -> Any:
        real(*given, **named)
        raise Parsed

    return parse


def test_every_command_of_the_pages_is_one_that_its_parser_takes(monkeypatch: pytest.MonkeyPatch):
    found = commands()
    assert {words[0] for words in found} >= {"train", "benchmark", "report", "menu", "recipe"}
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, taking(getattr(argparse.ArgumentParser, name)))
    for (command, *words), page in found.items():
        try:
            importlib.import_module(COMMANDS[command][0]).main(words)
        except Parsed:
            continue
        except SystemExit as end:
            if end.code == 0:  # --help
                continue
        pytest.fail(f"{page}: {command} {words} is not taken")
