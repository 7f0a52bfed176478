"""Grid folders: every cell is shown whatever became of it, and the numbers come with their intervals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_sec.errors import FedError
from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.records.files import write_json
from fedllm_sec.report.grid import details, heat, tables, words
from fedllm_sec.report.grid.folder import DONE, FAILED, PARTIAL, UNREADABLE, WAITING, read_grid
from fedllm_sec.report.grid.intervals import difference, over_seeds
from fedllm_sec.report.grid.numbers import common, met, slices, worst
from fedllm_sec.report.grid.page import paper_text, summary_text
from fedllm_sec.report.grid.ranks import order_of, ranks
from fedllm_sec.report.grid.views import views
from fedllm_sec.report.measures import Measure
from fedllm_sec.report.page import terminal_summary, write_report
from tests.report.fake_grid import write_grid

Change = Callable[[dict[str, Any]], Any]


def changed(grid: Path, change: Change) -> Path:
    content = json.loads((grid / "grid.json").read_text())
    change(content)
    write_json(grid / "grid.json", content)
    return grid


# ---------------------------------------------------------------- reading


def test_every_cell_is_read_with_its_state_and_its_reason(broken_grid: Path) -> None:
    grid = read_grid(broken_grid)
    states = {cell.slug: cell.state for cell in grid.cells}
    assert len(grid.cells) == 20
    assert states["alie-multi_krum-0"] == FAILED
    assert states["ipm-median-1"] == PARTIAL
    assert states["ipm-multi_krum-1"] == WAITING
    assert sum(state == DONE for state in states.values()) == 17
    reasons = {cell.slug: cell.reason for cell in grid.cells}
    assert reasons["alie-multi_krum-0"].startswith("DefenseError: multi_krum: needs n >= 2f + 3")
    assert reasons["ipm-median-1"] == "after round 3 of 6; the same command goes on from there"


def test_a_cell_whose_history_cannot_be_read_is_marked_and_the_others_are_shown(grid: Path) -> None:
    path = grid / "cells" / "alie-median-0" / "history.jsonl"
    path.write_text(path.read_text()[:-40])
    cell = next(cell for cell in read_grid(grid).cells if cell.slug == "alie-median-0")
    assert cell.state == UNREADABLE
    assert "history.jsonl, line 6" in cell.reason
    page = write_report(grid).read_text()
    assert '<td class="text">unreadable</td>' in page
    assert 'class="some">1 of 2 seeds<' in page


def test_an_error_file_that_cannot_be_read_is_still_a_failure(grid: Path) -> None:
    folder = grid / "cells" / "alie-median-0"
    (folder / "summary.json").unlink()
    (folder / "error.json").write_text("{half")
    cell = next(cell for cell in read_grid(grid).cells if cell.slug == "alie-median-0")
    assert (cell.state, cell.reason[:37]) == (FAILED, "failed, and its reason cannot be read")


def test_an_error_of_an_earlier_try_does_not_hide_a_finished_run(grid: Path) -> None:
    write_json(grid / "cells" / "alie-median-0" / "error.json", {"type": "OSError", "message": "disk full"})
    read = read_grid(grid)
    assert all(cell.state == DONE for cell in read.cells)
    assert any("error.json of an earlier try" in warning for warning in read.warnings)


def test_cells_that_have_only_a_recipe_have_not_run(grid: Path) -> None:
    folder = grid / "cells" / "alie-median-0"
    for name in ("history.jsonl", "summary.json", "timings.jsonl"):
        (folder / name).unlink()
    cell = next(cell for cell in read_grid(grid).cells if cell.slug == "alie-median-0")
    assert (cell.state, cell.reason) == (
        WAITING,
        "it was started, but no round is recorded yet; the same command goes on",
    )


def test_a_grid_of_another_version_is_shown_with_a_note(grid: Path) -> None:
    changed(grid, lambda content: content.update(version="0.0.9"))
    assert read_grid(grid).warnings[0].startswith("written by fedllm_sec 0.0.9; this is")


def test_folders_that_the_grid_does_not_name_are_told(grid: Path) -> None:
    (grid / "cells" / "stray").mkdir()
    assert "cells/ holds 1 folder that grid.json does not name, left out: stray." in read_grid(grid).warnings


BAD: dict[str, tuple[Change, str]] = {
    "another format": (lambda c: c.update(format=2), r"has format 2, written by .*which reads format 1"),
    "no format": (lambda c: c.pop("format"), r"has format None"),
    "no cells": (lambda c: c.update(cells=[]), r"a grid of zero cells"),
    "cells of another kind": (lambda c: c.update(cells={}), r'must hold \{"cells": \[\.\.\.\]\}, got dict'),
    "a folder twice": (lambda c: c["cells"].append(c["cells"][1]), r"two cells have the folder 'cells/"),
    "axes twice": (
        lambda c: c["cells"].append({**c["cells"][1], "folder": "cells/other"}),
        r"cells/other have the same axes",
    ),
    "a folder outside": (lambda c: c["cells"][0].update(folder="../x"), r"cells\[0\].*does not lie inside"),
    "an absolute folder": (lambda c: c["cells"][0].update(folder="/etc"), r"does not lie inside"),
    "no axes": (lambda c: c.update(axes=[]), r'must hold \{"axes"'),
    "labels of another kind": (lambda c: c["axes"].update(seed={}), r"axes\.seed: must be a list"),
    "a label that is a list": (lambda c: c["cells"][2]["axes"].update(seed=[1]), r"cells\[2\]\.axes\.seed: a label"),
    "a twin that is no cell": (lambda c: c["cells"][1].update(twin="cells/no"), r"is 'cells/no', which is no cell"),
    "a cell that is text": (lambda c: c["cells"].append("x"), r"cells\[20\]: must be"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_grid_file_that_is_wrong_says_where_and_why(grid: Path, change: Change, message: str) -> None:
    changed(grid, change)
    with pytest.raises(FedError, match=message):
        read_grid(grid)
    assert not (grid / "report.html").exists()


def test_a_grid_without_its_file_says_how_to_get_it(grid: Path) -> None:
    (grid / "grid.json").unlink()
    with pytest.raises(FedError, match=r"half-written grid folder.*Start the benchmark again"):
        write_report(grid)


def test_a_grid_file_cut_off_by_a_kill_is_named(grid: Path) -> None:
    path = grid / "grid.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(FedError, match=r"grid\.json: not JSON"):
        read_grid(grid)


def test_the_report_changes_nothing_but_its_own_page(broken_grid: Path) -> None:
    before = {path: path.read_bytes() for path in broken_grid.rglob("*") if path.is_file()}
    write_report(broken_grid)
    after = {path: path.read_bytes() for path in broken_grid.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() <= {broken_grid / "report.html"}
    assert all(after[path] == data for path, data in before.items() if path.name != "report.html")


# ---------------------------------------------------------------- numbers


def test_one_seed_has_the_interval_of_its_own_rows() -> None:
    assert over_seeds([Measure(0.7, 0.6, 0.8, 100)], "rate") == Measure(0.7, 0.6, 0.8, 1)


def test_the_mean_of_several_seeds_has_students_interval() -> None:
    # mean 2, standard deviation 1, t(2) = 4.3027: 2 -+ 4.3027 / sqrt(3)
    found = over_seeds([Measure(v) for v in (1.0, 2.0, 3.0)], "number")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_seeds_that_agree_exactly_are_not_certain() -> None:
    # 300 of 300: Wilson's lower end is 1 / (1 + z^2 / 300)
    found = over_seeds([Measure(1.0, 0.963, 1.0, 100)] * 3, "percent")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((1 / (1 + 1.959964**2 / 300), 1.0))


def test_a_mean_that_is_not_finite_has_no_interval() -> None:
    found = over_seeds([Measure(math.nan), Measure(1.0)], "number")
    assert found is not None
    assert math.isnan(found.value)
    assert found.low is None


def test_the_difference_of_two_rates_has_newcombes_interval() -> None:
    # Newcombe 1998, table II (a), method 10: 56/70 - 48/80, interval 0.0524 to 0.3339
    a, b = (Measure(**(wilson(*counts) or {})) for counts in ((56, 70), (48, 80)))
    found = difference([(a, b)])
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_a_drop_is_paired_with_the_twin_of_the_same_seed(grid: Path) -> None:
    read = read_grid(grid)
    part = slices(read)[0]
    lost = next(view for view in views(read) if view.key == "lost")
    accuracy = next(view for view in views(read) if view.key == "accuracy")
    slot, twin = part.slot(lost, "ipm", "none"), accuracy.of(part.twins)
    own = part.slot(accuracy, "ipm", "none").mean
    assert slot.mean is not None
    assert own is not None
    assert twin is not None
    assert slot.mean.value == pytest.approx(twin.value - own.value)
    assert slot.mean.n == 2


def test_what_the_twin_was_not_asked_gains_nothing(grid: Path) -> None:
    assert "gained" not in {view.key for view in views(read_grid(grid))}


def test_stopped_and_failed_runs_count_in_no_mean(broken_grid: Path) -> None:
    read = read_grid(broken_grid)
    part, accuracy = slices(read)[0], views(read)[0]
    assert part.slot(accuracy, "ipm", "median").measured == 1
    slot = part.slot(accuracy, "alie", "multi_krum")
    assert (len(slot.cells), slot.measured) == (2, 1)
    assert tables.said(slot, accuracy).interval.endswith("(1 of 2 seeds)")


def test_the_worst_case_is_over_the_attacks_and_says_what_is_missing(broken_grid: Path) -> None:
    read = read_grid(broken_grid)
    accuracy = views(read)[0]
    case = worst(met(slices(read), accuracy), accuracy, "none")
    assert case is not None
    assert ([attack for _, attack in case.rows], case.measured, case.planned) == (["ipm"], 3, 3)


def test_defenses_are_ranked_in_blocks_in_which_all_have_a_result(grid: Path, broken_grid: Path) -> None:
    whole, broken = read_grid(grid), read_grid(broken_grid)
    accuracy = views(whole)[0]
    found = ranks(slices(whole), accuracy)
    assert (found.blocks, found.left_out) == (6, 0)
    assert sum(m.value for m in found.mean.values()) == pytest.approx(1 + 2 + 3)
    assert found.mean["multi_krum"].value < found.mean["median"].value < found.mean["none"].value
    assert order_of(slices(whole), views(whole))[0] == "multi_krum"
    found = ranks(slices(broken), views(broken)[0])
    assert (found.blocks, found.left_out) == (4, 2)


def test_further_axes_split_the_grid_and_the_seed_does_not(split_grid: Path) -> None:
    assert [part.title for part in slices(read_grid(split_grid))] == ["partition iid", "partition dirichlet"]


def test_bright_is_good_in_every_map(grid: Path) -> None:
    read = read_grid(grid)
    parts = slices(read)
    for view in views(read):
        scale = heat.scale_of(parts, view)
        good, bad = (0.9, 0.1) if view.higher_is_better else (0.1, 0.9)
        assert scale.level(good) > scale.level(bad)
        assert scale.level(math.nan) == 0


# ---------------------------------------------------------------- words and tables


def test_the_finding_names_the_defense_with_the_best_worst_case(grid: Path) -> None:
    text = words.finding(read_grid(grid), slices(read_grid(grid)), views(read_grid(grid)))
    assert text[0].startswith("3 attacks against 2 defenses: multi_krum has the best worst case in accuracy: 0.6")
    assert text[1].startswith("Without a defense accuracy is at worst 0.3")


def test_defenses_are_compared_over_the_attacks_for_which_all_have_a_result(grid: Path) -> None:
    for seed in "01":
        for path in (grid / "cells" / f"ipm-multi_krum-{seed}").iterdir():
            path.unlink()
    read = read_grid(grid)
    text = " ".join(words.finding(read, slices(read), views(read)))
    over = "over the 2 of 3 attacks for which no result is missing, multi_krum has the best worst case in accuracy"
    assert over in text
    assert re.search(r"in accuracy: 0\.\d\d \[.*?\] under alie", text)
    assert "Without a defense accuracy is at worst 0.3" in text  # under ipm
    assert "18 of 20 runs are done: 2 not run yet." in text


def test_an_attack_without_a_trigger_has_no_attack_success_to_miss(grid: Path) -> None:
    for cell in (grid / "cells").glob("ipm-*"):
        lines = [json.loads(line) for line in (cell / "history.jsonl").read_text().splitlines()]
        (cell / "history.jsonl").write_text("".join(json.dumps(r | {"attack": None}) + "\n" for r in lines))
    read = read_grid(grid)
    success = next(view for view in views(read) if view.key == "beyond")
    rows = met(slices(read), success)
    assert [attack for _, attack in rows] == ["text_trigger", "alie"] == [attack for _, attack in common(rows, success)]
    assert 'class="none unmeasured"' in write_report(grid).read_text()


def test_who_knows_what_is_told_for_every_attack(grid: Path) -> None:
    seen = {
        threat["name"]: threat["sees"]["the updates of honest clients"] for threat in words.threats(read_grid(grid))
    }
    assert seen == {"text_trigger": False, "alie": True, "ipm": True}


def test_markdown_has_a_matrix_for_each_measure_and_the_ranking(broken_grid: Path) -> None:
    text = paper_text(read_grid(broken_grid), latex=False)
    assert text.count("| attack | none | median | multi\\_krum |") == 3
    assert "(1 of 2 seeds)" in text
    assert "ranking of the defenses" in text
    rows = [line for line in text.splitlines() if line.startswith("| alie")]
    assert len(rows) == 3


def test_latex_escapes_names_and_stands_in_tables(grid: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["axes"]["defense"][1] = "a_b & 50% {x}"
        for cell in content["cells"]:
            if cell["axes"]["defense"] == "median":
                cell["axes"]["defense"] = "a_b & 50% {x}"

    text = paper_text(read_grid(changed(grid, change)), latex=True)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 4
    assert r"a\_b \& 50\% \{x\}" in text
    assert "a_b" not in text


def test_the_terminal_summary_names_finding_ranking_and_reasons(broken_grid: Path) -> None:
    text = terminal_summary(broken_grid)
    assert text == summary_text(read_grid(broken_grid))
    assert "17 of 20 runs are done: 1 failed, 1 stopped before the last round and 1 not run yet." in text
    assert "alie-multi_krum-0 failed: DefenseError" in text


def test_peak_memory_and_seconds_of_each_defense_are_told(grid: Path) -> None:
    for cell in (grid / "cells").glob("*-median-0"):
        lines = [json.loads(line) for line in (cell / "timings.jsonl").read_text().splitlines()]
        (cell / "timings.jsonl").write_text("".join(json.dumps(r | {"defense_peak_mb": 12.5}) + "\n" for r in lines))
    rows = {row[0].text: [cell.text for cell in row] for row in tables.cost(slices(read_grid(grid))).rows}
    assert rows["median"][2] == "40 ms"
    assert rows["median"][4] == "12.5"
    assert rows["multi_krum"][4] == "n/a"


# ---------------------------------------------------------------- details


def test_the_decision_map_has_a_letter_for_each_client_and_round(grid: Path) -> None:
    read = read_grid(grid)
    run = next(cell.run for cell in read.cells if cell.slug == "text_trigger-multi_krum-0")
    assert run is not None
    found = details.decisions(run, 6000)
    assert found is not None
    assert found["malicious"] == 3
    assert [len(row) for row in found["rows"]] == [6] * 10
    assert found["rows"][0][-1] == "d"
    assert set("".join(found["rows"])) <= set("kdq.")


def test_a_large_decision_map_is_thinned_to_its_budget(make_run: Callable[..., Path], tmp_path: Path) -> None:
    from fedllm_sec.report.runs import read_run

    run = read_run(make_run(tmp_path / "big", clients=200, malicious=50, rounds=40, rule="multi_krum"))
    found = details.decisions(run, 1000)
    assert found is not None
    assert len(found["ids"]) == details.MOST_CLIENTS
    assert sum(len(row) for row in found["rows"]) <= 1000
    assert (found["malicious"], found["of"], found["rounds"][-1]) == (50, 200, 40)


def test_a_grid_of_which_nothing_has_run_makes_a_page(tmp_path: Path) -> None:
    write_json(
        tmp_path / "grid.json",
        {
            "format": 1,
            "name": "new",
            "version": "0.1.0",
            "command": "",
            "axes": {"attack": ["alie"], "defense": ["none"]},
            "cells": [{"folder": "cells/a", "axes": {"attack": "alie", "defense": "none"}, "twin": None}],
        },
    )
    page = write_report(tmp_path).read_text()
    assert "1 attack against 0 defenses: nothing was measured yet." in page
    assert "started again, runs it" in page


def test_a_grid_without_attack_and_defense_axes_makes_a_page(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "g", attacks=["ipm"], defenses=["none"], more={"seed": ["0"]}, rounds=2)

    def change(content: dict[str, Any]) -> None:
        content["axes"] = {"lr": ["a", "b"]}
        for cell, label in zip(content["cells"], "ab", strict=True):
            cell |= {"axes": {"lr": label}, "is_twin": False, "twin": None}

    page = write_report(changed(grid, change)).read_text()
    assert "as in the base recipe" in page
    assert "lr a" in page
