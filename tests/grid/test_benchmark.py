"""A grid as it is run: what is done is skipped, what broke goes on, what failed is a row, nothing is overwritten."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm_sec.benchmark import main, take_ranks
from fedllm_sec.grid import cells, grid
from fedllm_sec.grid.results import leaks
from fedllm_sec.records import RunFolder
from fedllm_sec.train import Terminated
from tests.grid.test_grid import BASE

GRID: dict[str, Any] = {
    "base": BASE,
    "axes": {
        "attack": {"flip": {}, "zero": {"update": [{"name": "byzantine_zero"}]}},
        "defense": {"none": None, "median": {"rule": {"name": "median"}}},
    },
}
CELLS = ["none__none", "flip__none", "flip__median", "zero__none", "zero__median"]


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return path


def start(path: Path, out: Path, *more: str) -> int:
    return main([str(path), f"output.folder={out}", *more])


def launch(command: list[str], path: Path, out: Path, *more: str, deaf: bool = False) -> subprocess.Popen[str]:
    """The benchmark in a process of its own; `deaf`: with SIGINT ignored, as a shell starts a background job."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *command, "-m", "fedllm_sec.benchmark", str(path), f"output.folder={out}", *more]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if deaf else None,
    )  # fmt: skip


def histories(out: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in sorted(out.glob("cells/*/history.jsonl"))}


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "results.csv").open() as file:
        return {row["cell"]: row for row in csv.DictReader(file)}


def stamps(out: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in out.glob("cells/**/*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid run straight, in one process."""
    folder = tmp_path_factory.mktemp("straight")
    assert start(written(folder), folder / "out") == 0
    return folder / "out"


def test_a_grid_leaves_run_folders_a_table_and_a_page(finished: Path):
    content = json.loads((finished / "grid.json").read_text())
    assert [c["folder"] for c in content["cells"]] == [f"cells/{slug}" for slug in CELLS]
    assert [c["twin"] for c in content["cells"]] == [None, *["cells/none__none"] * 4]
    assert content["axes"] == {"attack": ["none", "flip", "zero"], "defense": ["none", "median"]}
    table = rows(finished)
    assert list(table) == CELLS
    assert {row["status"] for row in table.values()} == {"done"}
    assert table["flip__median"]["defense.rule.name"] == "median"
    assert float(table["flip__none"]["accuracy_drop"]) == pytest.approx(
        float(table["none__none"]["accuracy"]) - float(table["flip__none"]["accuracy"])
    )
    assert float(table["flip__none"]["accuracy_drop"]) > float(table["flip__median"]["accuracy_drop"])
    assert table["none__none"]["accuracy_drop"] == ""
    import pandas

    assert list(pandas.read_parquet(finished / "results.parquet")["cell"]) == CELLS
    assert len((finished / "results_by_cell.csv").read_text().splitlines()) == 1 + len(CELLS)
    assert (finished / "report.html").exists()


def test_cells_that_are_done_are_left_alone(finished: Path, capsys):
    before = stamps(finished)
    assert start(written(finished.parent), finished) == 0
    assert "5 cells, 5 done, 0 to run" in capsys.readouterr().out
    assert stamps(finished) == before


def test_a_grid_whose_folder_was_moved_goes_on_there(finished: Path, tmp_path: Path, capsys):
    shutil.copytree(finished, tmp_path / "elsewhere")
    assert start(written(finished.parent), tmp_path / "elsewhere") == 0
    assert "5 cells, 5 done, 0 to run" in capsys.readouterr().out


def test_a_run_of_its_own_gives_the_bytes_of_the_cell_that_shared_model_and_data(finished: Path, tmp_path: Path):
    assert start(written(tmp_path), tmp_path / "out", "--only", "zero__median") == 0
    alone = histories(tmp_path / "out")
    assert list(alone) == ["none__none", "zero__median"]  # with its twin
    assert alone["zero__median"] == histories(finished)["zero__median"]
    assert {slug: row["status"] for slug, row in rows(tmp_path / "out").items()} == {
        slug: "done" if slug in alone else "not started" for slug in CELLS
    }


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interrupted_grid_goes_on_and_ends_as_the_straight_one(
    stop: type[KeyboardInterrupt], code: int, finished: Path, tmp_path: Path, monkeypatch
):
    append = RunFolder.append

    def dies(self: RunFolder, record: Any, state: Any) -> None:
        append(self, record, state)
        if self.path.name == "flip__median" and record.round == 1:
            raise stop

    monkeypatch.setattr(RunFolder, "append", dies)
    assert start(written(tmp_path), tmp_path / "out") == code
    monkeypatch.setattr(RunFolder, "append", append)
    states = {slug: row["status"] for slug, row in rows(tmp_path / "out").items()}
    assert states == dict(zip(CELLS, ["done", "done", "unfinished", "not started", "not started"], strict=True))
    first_round = histories(tmp_path / "out")["flip__median"]
    assert start(written(tmp_path), tmp_path / "out") == 0
    assert histories(tmp_path / "out") == histories(finished)
    assert histories(finished)["flip__median"].startswith(first_round)


def test_a_cell_that_fails_is_recorded_the_rest_goes_on_and_it_is_tried_again(finished: Path, tmp_path, monkeypatch):
    begin = RunFolder.begin

    def fails(self: RunFolder, *given: Any) -> list[str]:
        if self.path.name == "flip__none":
            raise RuntimeError("no space left")
        return begin(self, *given)

    monkeypatch.setattr(RunFolder, "begin", fails)
    assert start(written(tmp_path), tmp_path / "out") == 1
    table = rows(tmp_path / "out")
    assert (table["flip__none"]["status"], table["flip__none"]["error"]) == ("failed", "RuntimeError: no space left")
    assert table["flip__none"]["accuracy"] == ""
    assert [slug for slug, row in table.items() if row["status"] == "done"] == [c for c in CELLS if c != "flip__none"]
    error = json.loads((tmp_path / "out/cells/flip__none/error.json").read_text())
    assert error["type"] == "RuntimeError"
    assert "fails" in error["traceback"]
    monkeypatch.setattr(RunFolder, "begin", begin)
    assert start(written(tmp_path), tmp_path / "out") == 0
    assert not (tmp_path / "out/cells/flip__none/error.json").exists()
    assert histories(tmp_path / "out") == histories(finished)


def test_a_cell_that_another_process_holds_is_waited_for(finished: Path, tmp_path: Path, monkeypatch):
    path = written(tmp_path)
    found = grid.load(path, [f"output.folder={tmp_path / 'out'}"])
    cell = found.cells[1]
    ran: list[str] = []
    with cells.held(found.folder, cell) as mine:
        assert mine
        with cells.held(found.folder, cell) as again:
            assert not again

        def comes_back(seconds: float) -> None:
            raise TimeoutError("waited")

        monkeypatch.setattr(time, "sleep", comes_back)
        with pytest.raises(TimeoutError):
            cells.walk(
                found.folder, found.cells, command="x", started=time.time(), tell=lambda c, _: ran.append(c.slug)
            )
        assert cell.slug not in ran
        assert len(ran) == 4
    assert cells.status(cell) == "not started"
    with cells.held(found.folder, cell) as mine:
        assert mine


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("another recipe", "cells/flip__none was made with another recipe: rounds: 2 -> 9"),
        ("another version", "cells/flip__none was made by fedllm_sec 0.0.1"),
        ("grid of another version", "grid.json was written by fedllm_sec 0.0.1"),
        ("another grid", "it holds the grid 'other', not 'two'"),
        ("broken grid.json", "grid.json cannot be read"),
        ("a plain run", "it is the folder of another run (comparison.json)"),
        (
            "a recipe that cannot be read",
            "recipe.yaml, line 1: not YAML (found character that cannot start any token). So it is not known which run",
        ),
        ("no recipe", "cells/flip__none has a history but no recipe.yaml"),
        ("a file for a folder", "cells/flip__none is not a folder"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_and_nothing_in_it_changes(finished, tmp_path, capsys, damage, words):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for recipe in out.glob("cells/*/recipe.yaml"):
        recipe.write_text(recipe.read_text().replace(str(finished), str(out)))
    cell = out / "cells" / "flip__none"

    def edit(path: Path, old: str, new: str) -> None:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    version = json.loads((out / "grid.json").read_text())["version"]
    match damage:
        case "another recipe":
            edit(cell / "recipe.yaml", "rounds: 2", "rounds: 9")
            words = "cells/flip__none was made with another recipe: rounds: 9 -> 2"
        case "another version":
            edit(cell / "environment.json", f'"fedllm_sec": "{version}"', '"fedllm_sec": "0.0.1"')
        case "grid of another version":
            edit(out / "grid.json", f'"version": "{version}"', '"version": "0.0.1"')
        case "another grid":
            edit(out / "grid.json", '"name": "two"', '"name": "other"')
        case "broken grid.json":
            (out / "grid.json").write_text("{")
        case "a plain run":
            (out / "comparison.json").write_text("{}")
        case "a recipe that cannot be read":
            (cell / "recipe.yaml").write_text("a: @x")
        case "no recipe":
            (cell / "recipe.yaml").unlink()
        case "a file for a folder":
            shutil.rmtree(cell)
            cell.write_text("")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert start(written(tmp_path), out) == 2
    assert words in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_half_written_folder_is_begun_again(finished: Path, tmp_path: Path):
    out = tmp_path / "out"
    half = out / "cells" / "flip__none"
    half.mkdir(parents=True)
    recipe = (finished / "cells/flip__none/recipe.yaml").read_text().replace(str(finished), str(out))
    (half / "recipe.yaml").write_text(recipe)
    (half / "history.jsonl").write_text('{"round": 1, "coh')
    assert start(written(tmp_path), out, "--only", "flip__none") == 0
    assert histories(out)["flip__none"] == histories(finished)["flip__none"]


def test_only_given_twice_takes_the_cells_of_both_patterns(tmp_path, capsys):
    assert start(written(tmp_path), tmp_path / "out", "--list", "--only", "flip__none", "--only", "zero__m*") == 0
    listed = capsys.readouterr().out
    assert [cell for cell in CELLS if cell in listed] == ["none__none", "flip__none", "zero__median"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--only", "flop__none"], 'no cell is called "flop__none". Did you mean "flip__none"?'),
        (["--only", "flip__*", "--only", "nope*"], 'no cell is called "nope*"'),
        (["--jobs", "0"], "--jobs: 0: must be at least 1"),
        (["axes.attack={}"], "axes.attack: has no label"),
        (["roundss=3"], 'roundss: unknown key. Did you mean "rounds"?'),
    ],
)
def test_what_the_command_line_gets_wrong_is_said_before_anything_is_written(tmp_path, capsys, more, words):
    assert start(written(tmp_path), tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_list_shows_the_cells_and_runs_none(tmp_path: Path, capsys):
    assert start(written(tmp_path), tmp_path / "out", "--list") == 0
    shown = capsys.readouterr().out
    assert all(slug in shown for slug in CELLS)
    assert "none__none    not started  (twin)" in shown
    assert not (tmp_path / "out").exists()


def test_ranks_are_taken_from_the_launcher_and_then_forgotten(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert take_ranks() == (3, 4, 1, 2)
    assert "WORLD_SIZE" not in os.environ
    assert take_ranks() == (0, 1, 0, 1)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(finished: Path, tmp_path: Path):
    assert start(written(tmp_path), tmp_path / "out", "--jobs", "2") == 0
    assert histories(tmp_path / "out") == histories(finished)


@pytest.mark.slow
@pytest.mark.parametrize("deaf", [False, True])
def test_ctrl_c_stops_all_processes_and_the_grid_goes_on(deaf: bool, finished: Path, tmp_path: Path):
    out = tmp_path / "out"
    process = launch([], written(tmp_path), out, "--jobs", "2", deaf=deaf)
    while not list(out.glob("cells/*/history.jsonl")) and process.poll() is None:
        time.sleep(0.05)
    workers = [int(p.read_text()) for p in (out / ".locks").iterdir() if p.read_text()]
    process.send_signal(signal.SIGINT)
    assert "goes on from the last whole round" in process.communicate(timeout=60)[0]
    assert process.returncode == 130
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    assert start(written(tmp_path), out) == 0
    assert histories(out) == histories(finished)


@pytest.mark.slow
def test_ranks_share_the_cells_out_and_give_the_same(finished: Path, tmp_path: Path):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = launch(start, written(tmp_path), tmp_path / "out")
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    assert text.count("[") >= 5
    assert histories(tmp_path / "out") == histories(finished)


def test_what_privacy_attacks_learnt_has_columns_named_by_the_attack_and_its_words():
    interval = {"value": 0.7, "low": 0.6, "high": 0.8, "n": 3}
    summary = {
        "leakage": [
            {"name": "membership", "settings": {"model": "global", "seed": 4}, "scores": {"auc": interval},
             "not_applicable": 1},
            {"name": "dager", "settings": {}, "scores": {"exact": None}, "not_applicable": 2},
        ]
    }  # fmt: skip
    assert leaks(summary) == {
        "leak_membership_global_auc": 0.7,
        "leak_membership_global_auc_low": 0.6,
        "leak_membership_global_auc_high": 0.8,
        "leak_membership_global_auc_n": 3,
        "leak_membership_global_not_applicable": 1,
        "leak_dager_exact": None,
        "leak_dager_not_applicable": 2,
    }
    assert leaks({}) == {}
