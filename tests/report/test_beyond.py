"""Attack success is shown with its false triggers, and judged by what lies beyond them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.report import page, plots, words
from fedllm_sec.report.grid import words as grid_words
from fedllm_sec.report.grid.folder import read_grid
from fedllm_sec.report.grid.intervals import difference, told_apart
from fedllm_sec.report.grid.numbers import slices
from fedllm_sec.report.grid.page import paper_text, render, summary_text
from fedllm_sec.report.grid.ranks import ranks
from fedllm_sec.report.grid.views import views
from fedllm_sec.report.measures import Measure
from fedllm_sec.report.runs import Run, read_runs
from tests.report.fake_grid import write_grid
from tests.report.test_grid_page import data_of

MakeRun = Callable[..., Path]
SIGNS = (1, -1, -1, 1)


def rate(hits: int, n: int) -> Measure:
    return Measure(**(wilson(hits, n) or {}))


# ---------------------------------------------------------------- intervals


def test_the_difference_of_two_differences_has_the_four_limits_squared_and_added():
    # 93 - 91 of 100 against 60 - 3: Wilson's limits (0.8625, 0.9657), (0.8377, 0.9519), (0.5020, 0.6906),
    # (0.0103, 0.0845); 0.02 - 0.57 = -0.55; the down sides 0.0675, 0.0419, 0.0906 and 0.0197, the up sides 0.0357,
    # 0.0723, 0.0980 and 0.0545
    row = (rate(93, 100), rate(91, 100), rate(60, 100), rate(3, 100))
    found = difference([row], "percent", SIGNS)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((-0.55, -0.6722, -0.4119), abs=2e-4)
    assert told_apart([row], "percent", SIGNS)


def test_differences_that_are_equal_on_paper_are_equal():
    # 0.93 - 0.91 and 0.95 - 0.93 differ by 1e-16 in floating point
    rows = [(rate(93, 100), rate(91, 100), rate(95, 100), rate(93, 100))] * 2
    assert not told_apart(rows, "percent", SIGNS)
    found = difference(rows, "percent", SIGNS)
    assert found is not None
    assert found.value == 0.0


# ---------------------------------------------------------------- a grid


def set_rates(grid: Path, rates: dict[str, tuple[int, int | None]]) -> None:
    """Attack success and false triggers, of 100 rows each, by the start of a cell's name; None: not measured."""
    for path in (grid / "cells").iterdir():
        found = next((given for name, given in rates.items() if path.name.startswith(name)), None)
        lines = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
        for line in lines:
            line["attack"] = None
            if found is not None:
                anyway = None if found[1] is None else wilson(found[1], 100)
                line["attack"] = {"asr": wilson(found[0], 100), "false_trigger": anyway}
        (path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in quick.yaml: median answers everything as the attacker wants, multi_krum keeps a backdoor of 57 %."""
    folder = tmp_path_factory.mktemp("grids") / "quick"
    grid = write_grid(folder, attacks=["none", "alie"], defenses=["none", "median", "multi_krum"],
                      more={"seed": ["0"]}, rounds=2)  # fmt: skip
    set_rates(grid, {"none-none": (2, 1), "none-median": (3, 2), "none-multi_krum": (4, 4), "alie-none": (99, 2),
                     "alie-median": (93, 91), "alie-multi_krum": (60, 3)})  # fmt: skip
    return grid


def test_every_table_of_a_grid_shows_success_beside_false_triggers(quick: Path):
    grid = read_grid(quick)
    text = {"Markdown": paper_text(grid, latex=False), "terminal": summary_text(grid)}
    assert (
        "| alie | 97 % \\[90, 99\\] (99 / 2 %) | 2 % \\[-6, 10\\] (93 / 91 %) | 57 % \\[46, 66\\] (60 / 3 %) |"
        in (text["Markdown"])
    )
    assert "(93 / 91 %)" in text["terminal"]
    assert "In round brackets: attack success / false triggers." in text["terminal"]
    assert "(93 / 91 \\%)" in paper_text(grid, latex=True)
    html = render(grid)
    assert "<small>93 / 91\u00a0%</small>" in html
    (run,) = [entry for entry in data_of(html)["runs"] if entry["slug"] == "alie-median-0"]
    shown = {title: f"{value} {interval}".strip() for title, value, interval in run["measures"]}
    assert shown["attack success beyond false triggers"] == "2 % [-6, 10] (93 / 91 %)"
    assert shown["attack success"] == "93 % [86, 97]"
    assert shown["false triggers"] == "91 % [84, 95]"


def test_defenses_are_ranked_by_success_beyond_false_triggers(quick: Path):
    grid = read_grid(quick)
    beyond = next(view for view in views(grid) if view.key == "beyond")
    found = {name: m.value for name, m in ranks(slices(grid), beyond).mean.items()}
    assert found == {"median": 1.0, "multi_krum": 2.0, "none": 3.0}
    text = " ".join(grid_words.finding(grid, slices(grid), views(grid)))
    assert (
        "median has the best worst case in attack success beyond false triggers: 2 % [-6, 10] (93 % with the trigger, "
        "91 % without) under alie." in text
    )
    assert "without a defense attack success beyond false triggers is at worst 97 %" in text.lower()
    assert "attack-free and undefended it is 1 % [-4, 6] (2 % with the trigger, 1 % without)." in text


def test_no_attack_is_a_row_against_every_defense_where_the_grid_has_it(quick: Path):
    rows = [line for line in paper_text(read_grid(quick), latex=False).splitlines() if line.startswith("| no attack")]
    assert "(3 / 2 %)" in rows[-1]
    assert "(4 / 4 %)" in rows[-1]
    assert len(rows) == 4  # accuracy, accuracy lost, attack success beyond false triggers, attack success gained


def test_success_without_false_triggers_stands_in_a_matrix_of_its_own(quick: Path, tmp_path: Path):
    grid = write_grid(tmp_path / "g", attacks=["alie"], defenses=["none", "median"], more={"seed": ["0"]}, rounds=2)
    set_rates(grid, {"none-none": (2, 1), "alie-none": (99, 2), "alie-median": (50, None)})
    read = read_grid(grid)
    shown = {view.key: view for view in views(read)}
    part = slices(read)[0]
    assert part.slot(shown["beyond"], "alie", "median").mean is None
    assert part.slot(shown["asr"], "alie", "none").mean is None
    found = part.slot(shown["asr"], "alie", "median").mean
    assert found is not None
    assert found.value == 0.5
    assert "asr" not in {view.key for view in views(read_grid(quick))}


# ---------------------------------------------------------------- runs


def asked(make: MakeRun, folder: Path, hits: int, anyway: int | None, **given: object) -> Run:
    run = read_runs([make(folder, rounds=2, **given)])[0]
    rates = {"asr": wilson(hits, 100), "false_trigger": None if anyway is None else wilson(anyway, 100)}
    return dataclasses.replace(run, records=tuple(dataclasses.replace(r, attack=rates) for r in run.records))


def test_the_headline_says_where_no_backdoor_can_be_seen(make_run: MakeRun, tmp_path: Path):
    clean = asked(make_run, tmp_path / "clean", 4, 3, attack=False)
    same = words.finding([clean, asked(make_run, tmp_path / "a", 6, 4)])[0]
    assert same.startswith('No backdoor seen, the attack-free model does the same: the trigger " cf" made')
    always = words.finding([clean, asked(make_run, tmp_path / "b", 93, 91)])[0]
    assert always == (
        'No backdoor seen, clean prompts get the answer as often: the trigger " cf" made the undefended model answer '
        '" Sports" to 93 % of 100 triggered prompts and to 91 % of clean ones, without the trigger (the attack-free '
        "model: 4 %)."
    )
    more = words.finding([asked(make_run, tmp_path / "c", 40, 80)])[0]
    assert more.startswith("No backdoor seen, clean prompts get the answer more often: ")
    part = words.finding([clean, asked(make_run, tmp_path / "d", 97, 30)])[0]
    assert "to 97 % of 100 triggered prompts (and to 30 % of clean ones, without the trigger; the attack-free" in part
    few = words.finding([asked(make_run, tmp_path / "e", 97, 3)])[0]
    assert few.startswith('The trigger " cf" made')


def test_what_a_defense_leaves_is_told_with_its_false_triggers(make_run: MakeRun, tmp_path: Path):
    bare, kept = asked(make_run, tmp_path / "a", 97, 3), asked(make_run, tmp_path / "b", 60, 58, rule="median")
    assert "; median brought it down to 60 % (false triggers 58 %)." in words.finding([bare, kept])[0]


def test_the_most_successful_of_several_attacks_is_so_beyond_false_triggers(make_run: MakeRun, tmp_path: Path):
    def other(recipe: dict[str, dict[str, object]]) -> None:
        recipe["attack"]["start"] = 2

    always = asked(make_run, tmp_path / "always", 100, 99)
    planted = asked(make_run, tmp_path / "planted", 80, 2, change=other)
    text = words.finding([always, planted])[1]
    assert text.startswith("The most successful, text_trigger + model_replacement against no defense (planted), got")
    assert "80 % of 100 triggered prompts and on 2 % of clean ones, without the trigger" in text
    # two that answer everything so: neither plants anything
    text = words.finding([always, asked(make_run, tmp_path / "too", 91, 90, change=other)])[1]
    assert text.startswith("No backdoor seen beyond false triggers: the most successful, ")


def test_a_run_has_a_curve_of_false_triggers_that_begins_with_the_untrained_model(make_run: MakeRun, tmp_path: Path):
    run = asked(make_run, tmp_path / "a", 60, 58)
    before = dataclasses.replace(
        run.records[0], round=0, attack={"asr": wilson(5, 100), "false_trigger": wilson(4, 100)}
    )
    (_, found, *_) = page.curves_of([dataclasses.replace(run, records=(before, *run.records))])
    assert isinstance(found, plots.Picture)
    assert found.alt == "False triggers from round 0 to 2: a 4 % → 58 %."
