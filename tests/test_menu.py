"""The command that shows what a recipe can name."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm_sec import defenses, menu
from fedllm_sec.__main__ import COMMANDS


def test_every_name_of_every_menu_has_a_paper_and_a_one_line_summary():
    for line in menu.lines():
        assert line.paper, f"{line.name} has no paper"
        assert line.summary.endswith((".", ":", ")")), f'{line.name}: "{line.summary}" is not one sentence'
        assert all(setting.type for setting in line.settings), f"{line.name} has a setting without a type"


def test_the_overview_shows_settings_with_defaults_and_what_is_needed(capsys):
    assert menu.main([]) == 0
    shown = capsys.readouterr().out
    assert "multi_krum  [Blanchard et al. 2017]" in shown
    assert "f: int (needed)" in shown
    assert "m: int | None = None" in shown


def test_one_name_shows_the_whole_docstring(capsys):
    assert menu.main(["krum"]) == 0
    shown = capsys.readouterr().out
    assert "Needs n >= 2f + 3" in shown
    assert "fedllm_sec.defenses.krum:krum" in shown


def test_json_is_readable_by_a_program(capsys):
    assert menu.main(["trimmed_mean", "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert line["kind"] == "rule"
    assert line["settings"][0] == {"name": "f", "type": "int | None", "needed": False, "default": None}


@pytest.mark.parametrize(("word", "hint"), [("multi-krum", "multi_krum"), ("medain", "median")])
def test_a_mistyped_name_gets_a_suggestion(word, hint, capsys):
    assert menu.main([word]) == 2
    assert f'Did you mean "{hint}"?' in capsys.readouterr().err


def test_the_defense_page_has_a_line_for_every_defense():
    page = (Path(__file__).parents[1] / "docs" / "defenses.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    named = {name.strip() for row in rows for name in row.split(",")}
    assert set(defenses.MENU) <= named, f"not on the page: {sorted(set(defenses.MENU) - named)}"


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fedllm_sec.menu", "krum"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.startswith("krum  [Blanchard et al. 2017]")


def test_importing_the_package_stays_light_and_offers_the_public_names():
    code = (
        "import sys, fedllm_sec\n"
        "assert 'torch' not in sys.modules\n"
        "names = {'aggregate', 'forge', 'Decision', 'UpdateMatrix', 'Layout', 'RoundContext', 'kernels'}\n"
        "assert names <= set(dir(fedllm_sec))\n"
        "assert 'numba' not in sys.modules\n"
        "assert callable(fedllm_sec.aggregate)\n"
        "import numpy\n"
        "loaded = set(sys.modules)\n"
        "assert len(fedllm_sec.aggregate(numpy.ones((2, 1)), 'mean').update) == 1\n"
        "assert not {name for name in set(sys.modules) - loaded if name.startswith('numba')}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_command_ends_without_a_word_when_its_reader_leaves():
    """As in `fedllm-sec menu | head -1`: the pipe is closed while something is still to come."""
    command = [sys.executable, "-m", "fedllm_sec", "menu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # at once, for a pipe may hold all of it
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 141


@pytest.mark.parametrize("module", [module for module, _ in COMMANDS.values()])
def test_every_command_lets_its_reader_leave(module):
    assert importlib.import_module(module).main.__wrapped__  # errors.quietly
