"""What is shown, worked by hand: the cases in which a page once said what the record does not."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.report import client_plots, decided, page, plots, tables, words
from fedllm_sec.report.grid import heat
from fedllm_sec.report.grid import words as grid_words
from fedllm_sec.report.grid.folder import read_grid
from fedllm_sec.report.grid.intervals import difference, over_seeds, told_apart
from fedllm_sec.report.grid.numbers import slices
from fedllm_sec.report.grid.page import render, summary_text
from fedllm_sec.report.grid.tables import ranking
from fedllm_sec.report.grid.views import views
from fedllm_sec.report.measures import QUALITY, Measure, interval, percent, plain, written
from fedllm_sec.report.runs import Run, read_runs
from tests.report.fake_grid import write_grid

MakeRun = Callable[..., Path]
LOSS = next(kind for kind in QUALITY if kind.key == "loss")


def counted(hits: int, n: int) -> Measure:
    return Measure(**(wilson(hits, n) or {}))


# ---------------------------------------------------------------- differences


def test_a_run_that_loses_a_tenth_in_both_seeds_is_shown_to_lose_a_tenth():
    pairs = [(counted(288, 360), counted(252, 360)), (counted(324, 360), counted(288, 360))]
    found = difference(pairs)
    assert found is not None
    assert f"{written(found.value, 'rate')} {interval(found, 'rate')}" == "0.10 [0.06, 0.14]"


def test_a_difference_of_rates_stays_between_minus_one_and_one():
    found = difference([(counted(10, 10), counted(5, 10)), (counted(5, 10), counted(10, 10))])
    assert found is not None
    assert (found.low, found.high) == (-1.0, 1.0)


def test_a_loss_over_two_seeds_has_no_interval_below_nothing():
    found = over_seeds([Measure(0.5), Measure(1.0)], "number", QUALITY[3].bounds[0])
    assert found is not None
    assert found.low == 0.0


def test_what_differs_by_less_than_its_interval_is_not_told_apart():
    assert told_apart([(counted(200, 400), counted(100, 400))])
    assert not told_apart([(counted(200, 400), counted(190, 400))])
    assert not told_apart([(counted(0, 400), counted(0, 400))])
    assert told_apart([(Measure(0.5), Measure(0.6))])  # a loss has no interval
    assert told_apart([(Measure(math.nan), Measure(0.6))])


# ---------------------------------------------------------------- written numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.004, "-0.4 %"), (-0.0004, "-0.04 %"), (-0.997, "-99.7 %"), (0.9996, "99.96 %"), (-1e-17, "0 %")],
)
def test_per_cent_of_negatives_are_written_like_those_of_positives(value: float, text: str):
    assert percent(value) == text


def test_an_interval_does_not_exclude_its_own_value():
    assert [f"{percent(m.value)} {interval(m, 'percent')}" for m in (counted(1, 2500), counted(2499, 2500))] == [
        "0.04 % [0.01, 0.23]",
        "99.96 % [99.77, 99.99]",
    ]


def test_a_rate_that_is_not_all_or_nothing_is_not_written_as_such():
    assert [written(v, "rate") for v in (0.996, 0.004, 1.0, 0.0, -0.0, 0.715)] == [
        *("0.996", "0.004", "1.00", "0.00", "0.00", "0.71"),
    ]  # fmt: skip
    assert plain(-0.0) == "0"


def test_a_caption_without_remarks_is_bold_and_latex_has_no_stray_signs():
    table = tables.Table([tables.Column("a", "a", "text")], [[tables.Cell('<x> | "y"')]], "")
    assert tables.as_markdown(table, caption="ranking ").startswith("**ranking**")
    assert r"\textless{}x\textgreater{} \textbar{} \texttt{\char34}y\texttt{\char34}" in tables.as_latex(table)


# ---------------------------------------------------------------- runs that are no pair


def without_a_trigger(recipe: dict[str, Any]) -> None:
    recipe["attack"] |= {"data": [], "update": [{"name": "byzantine_flip"}]}


def algorithm(name: str, values: tuple[float, float, float], make: MakeRun, folder: Path) -> list[Run]:
    """Attack-free, attacked and defended with these accuracies, of one algorithm."""

    def change(recipe: dict[str, Any]) -> None:
        without_a_trigger(recipe)
        recipe["algorithm"] = {"name": name}

    found = []
    for label, attack, rule, value in zip(
        ("", "-attacked", "-defended"), (False, True, True), (None, None, "geometric_median"), values, strict=True
    ):
        run = read_runs([make(folder / f"{name}{label}", rounds=4, attack=attack, rule=rule, change=change)])[0]
        quality = {"accuracy": wilson(round(400 * value), 400), "loss": 1.0}
        records = tuple(dataclasses.replace(r, attack=None, quality=quality) for r in run.records)
        found.append(dataclasses.replace(run, records=records))
    return found


def test_a_sentence_is_about_runs_of_one_federation_and_the_others_are_named(make_run: MakeRun, tmp_path: Path):
    # recipes/smoke/algorithms.yaml: FedDyn's 0.72 was told as FedAvg's
    runs = algorithm("fedavg", (0.82, 0.13, 0.46), make_run, tmp_path)
    runs += algorithm("feddyn", (0.91, 0.40, 0.72), make_run, tmp_path)
    assert words.finding(runs) == [
        "algorithm.name fedavg: Byzantine_flip by 3 of 10 clients took the undefended model's accuracy from 0.82 to "
        "0.13; it is 0.46 with geometric_median.",
        "algorithm.name feddyn: Byzantine_flip by 3 of 10 clients took the undefended model's accuracy from 0.91 to "
        "0.40; it is 0.72 with geometric_median.",
    ]
    assert page.warnings_of(runs)[0] == (
        "these runs are of 2 federations, which are not compared with each other: they differ in algorithm.name."
    )


def test_a_change_of_model_and_seed_is_no_attack(make_run: MakeRun, tmp_path: Path):
    clean = algorithm("fedavg", (0.87, 0.5, 0.5), make_run, tmp_path / "a")[0]
    bare = algorithm("fedavg", (0.5, 0.17, 0.5), make_run, tmp_path / "b")[1]
    other = dataclasses.replace(bare, recipe={**bare.recipe, "seed": 9, "model": {"name": "logistic"}})
    text = " ".join(words.finding([clean, other]))
    assert "took" not in text
    assert "left the undefended model at accuracy 0.17" in text
    assert "they differ in seed, model.name" in page.warnings_of([clean, other])[0]


def test_only_the_way_it_is_run_and_evaluated_may_differ(make_run: MakeRun, tmp_path: Path):
    runs = algorithm("fedavg", (0.82, 0.13, 0.46), make_run, tmp_path)
    moved = dataclasses.replace(
        runs[1], recipe={**runs[1].recipe, "compute": {"threads": 4}, "output": {"folder": "x"}}
    )
    assert "took the undefended model's accuracy from 0.82 to 0.13" in words.finding([runs[0], moved])[0]


def test_versions_that_differ_are_said(make_run: MakeRun, tmp_path: Path):
    runs = algorithm("fedavg", (0.8, 0.1, 0.4), make_run, tmp_path)[:2]
    old = dataclasses.replace(runs[1], environment={"fedllm_sec": "0.0.9"})
    (note,) = page.warnings_of([runs[0], old])
    assert note.startswith("written by different versions of fedllm_sec: ")
    assert "0.0.9 (fedavg-attacked)" in note


def test_a_trigger_is_not_credited_with_what_the_attack_free_model_does(make_run: MakeRun, tmp_path: Path):
    # audit F25: attack-free 10.0 %, attacked 10.5 % of 400
    def asked(folder: str, attack: bool, hits: int) -> Run:
        run = read_runs([make_run(tmp_path / folder, rounds=2, attack=attack)])[0]
        rate = {"asr": wilson(hits, 400), "false_trigger": None}
        return dataclasses.replace(run, records=tuple(dataclasses.replace(r, attack=rate) for r in run.records))

    clean = asked("clean", False, 40)
    alike = words.finding([clean, asked("alike", True, 42)])[0]
    assert "to 10 % of 400 triggered prompts, which cannot be told from the attack-free model's 10 %." in alike
    beyond = words.finding([clean, asked("beyond", True, 380)])[0]
    assert "to 95 % of 400 triggered prompts (the attack-free model: 10 %)." in beyond


# ---------------------------------------------------------------- single runs


def redrawn(run: Run) -> Run:
    """Five clients, of whom another two are malicious in each round; attacks in rounds 1 and 3 of four."""
    bad = {1: ["0", "1"], 2: ["1", "2"], 3: ["2", "3"], 4: ["3", "4"]}
    kept = {1: ["1", "2", "3", "4"], 2: ["0", "1", "2"], 3: ["0", "1", "4"], 4: ["3"]}

    def changed(record: RoundRecord) -> RoundRecord:
        r = record.round
        return dataclasses.replace(record, malicious=bad[r], kept=kept[r], attacking=r % 2 == 1, quarantined={})

    return dataclasses.replace(run, records=tuple(map(changed, run.rounds)))


def test_each_round_has_its_own_attackers(make_run: MakeRun, tmp_path: Path):
    run = redrawn(read_runs([make_run(tmp_path / "run", rounds=4, clients=5, malicious=2, rule="multi_krum")])[0])
    # round 1: attackers 0 and 1, of whom 1 was kept; round 3: attackers 2 and 3, of whom none was
    assert decided.kept_says(run) == "multi_krum kept 1 of 4 malicious rows and 6 of 6 honest rows under attack."
    picture = client_plots.decisions(run, "x")
    assert picture is not None
    assert "A triangle: attacks in that round." in picture.caption


def test_weights_are_told_as_they_are_and_not_as_they_are_drawn(make_run: MakeRun, tmp_path: Path):
    run = read_runs([make_run(tmp_path / "run", rounds=3, clients=10, malicious=1, rule="foolsgold")])[0]
    weights = {str(i): 0.91 if i == 1 else 0.01 for i in range(10)}
    records = tuple(dataclasses.replace(r, weights=weights, kept=None) for r in run.rounds)
    says = decided.weights_says(dataclasses.replace(run, records=records))
    assert (
        says == "foolsgold weighed malicious rows 9.10 and honest rows 0.100 of an equal share on average under attack."
    )


def marks(run: Run) -> list[str]:
    _, axes = plots.figure()
    plots.mark_attack(axes, [run])
    return [text.get_text() for text in axes.texts]


def test_an_attack_that_pauses_neither_starts_nor_stops(make_run: MakeRun, tmp_path: Path):
    def every_second(recipe: dict[str, Any]) -> None:
        recipe["attack"] |= {"start": 1, "every": 2}

    def one_round(recipe: dict[str, Any]) -> None:
        recipe["attack"] |= {"start": 3, "stop": 3}

    assert marks(read_runs([make_run(tmp_path / "a", rounds=6, change=every_second)])[0]) == []
    assert marks(read_runs([make_run(tmp_path / "b", rounds=6, change=one_round)])[0]) == [
        "attack starts",
        "attack stops",
    ]


def scales(run: Run, values: list[float], monkeypatch: pytest.MonkeyPatch) -> tuple[bool, plots.Picture]:
    """Whether the curve of these accuracies became logarithmic, and the picture."""
    used: list[Any] = []
    monkeypatch.setattr(plots, "log_scale", used.append)
    given = zip(run.rounds, values, strict=False)
    records = tuple(dataclasses.replace(r, quality={"accuracy": {"value": v}, "loss": v}) for r, v in given)
    picture = plots.curves([dataclasses.replace(run, records=records)], QUALITY[0])
    assert picture is not None
    return bool(used), picture


def test_an_accuracy_is_drawn_from_nothing_to_all(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = read_runs([make_run(tmp_path / "a", rounds=4)])[0]
    logarithmic, picture = scales(run, [0.01, 0.1, 0.5, 0.975], monkeypatch)
    assert not logarithmic
    assert picture.caption == ""  # no limits, no bands


def test_a_curve_that_stops_being_a_number_says_so(make_run: MakeRun, tmp_path: Path):
    run = read_runs([make_run(tmp_path / "a", rounds=3)])[0]
    values = {1: 0.6, 2: math.nan, 3: math.nan}
    records = tuple(dataclasses.replace(r, quality={"loss": values[r.round]}) for r in run.rounds)
    picture = plots.curves([dataclasses.replace(run, records=records)], LOSS)
    assert picture is not None
    assert picture.alt == "Held-out loss from round 1 to 3: a 0.600 → nan (not finite in round 2)."
    assert picture.caption == "A cross: not a finite number."


def test_bands_that_end_at_nothing_are_explained():
    points = [Measure(0.0, 0.0, 0.01, 400, 1)]
    assert plots.caption_of([points]) == "Bands are 95 % intervals."


def test_quarantined_rows_do_not_make_updates_long(make_run: MakeRun, tmp_path: Path):
    run = read_runs([make_run(tmp_path / "a", rounds=3, clients=5, malicious=1)])[0]
    norms = {"0": 1.0, "1": 1.16e39, "2": 1.0, "3": 2.0, "4": 3.0}
    records = tuple(dataclasses.replace(r, norms=norms, quarantined={"1": "too long"}) for r in run.rounds)
    picture = client_plots.norms(dataclasses.replace(run, records=records), "x")
    assert picture is not None
    assert picture.alt == "Median update length of the honest clients: 1.50. 3 rows quarantined."


def test_the_loss_of_a_generator_is_a_distance(make_run: MakeRun, tmp_path: Path):
    def gan(recipe: dict[str, Any]) -> None:
        recipe["task"] = "gan"

    columns = {
        c.key: c for c in tables.summary_table(read_runs([make_run(tmp_path / "a", rounds=2, change=gan)])).columns
    }
    assert columns["loss"].title == "Fréchet distance"
    assert "per token" not in columns["loss"].explained


# ---------------------------------------------------------------- classes, reasons, rows left out


def detailed(make_run: MakeRun, folder: Path) -> list[Run]:
    runs = []
    for name, hits in (("a", (90, 20, 20)), ("b", (50, 60, 70))):
        run = read_runs([make_run(folder / name, rounds=2)])[0]
        classes = {c: wilson(k, 100) for c, k in zip(("World", "Sports", "Tech"), hits, strict=True)}
        last = run.records[-1]
        quality = {**(last.quality or {}), "per_class": {**classes, "Empty": None}}
        attack = {**(last.attack or {}), "false_trigger": None, "left_out": {"carry the trigger": 153.0}}
        attack["reasons"] = {"false_trigger": "no held-out row is clean"}
        new = dataclasses.replace(last, quality=quality, attack=attack)
        runs.append(dataclasses.replace(run, records=(*run.records[:-1], new)))
    return runs


def test_the_worst_class_of_each_run_is_marked(make_run: MakeRun, tmp_path: Path):
    runs = detailed(make_run, tmp_path)
    table = tables.class_table(runs)
    assert table is not None
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["World", "0.90", "0.50"],
        ["Sports", "0.20", "0.60"],
        ["Tech", "0.20", "0.70"],
    ]
    assert [[cell.worst for cell in row[1:]] for row in table.rows] == [[False, True], [True, False], [True, False]]
    summary = tables.summary_table(runs)
    place = [column.key for column in summary.columns].index("worst class")
    assert [str(row[place]) for row in summary.rows] == [
        "0.20 [0.13, 0.29] (Sports, Tech)",
        "0.50 [0.40, 0.60] (World)",
    ]
    assert page.render(runs, [tmp_path]).count('<small class="mark">worst</small>') == 3


def test_why_a_rate_is_not_measured_and_what_is_in_none_is_said(make_run: MakeRun, tmp_path: Path):
    runs = detailed(make_run, tmp_path)
    assert tables.remarks(runs) == [
        "a and b: false triggers n/a: no held-out row is clean.",
        "a and b: in none of the attack's rates: 153 held-out (carry the trigger).",
    ]
    assert "note: a and b: false triggers n/a" in page.summary_text(runs)


def test_what_stands_beside_the_measures_is_no_measure(make_run: MakeRun, tmp_path: Path):
    keys = {column.key for column in tables.summary_table(detailed(make_run, tmp_path)).columns}
    assert not {"per_class", "reasons", "left_out"} & keys


# ---------------------------------------------------------------- grids


def set_accuracy(grid: Path, values: dict[str, float | str], key: str = "accuracy") -> None:
    """Every run's last accuracy of 400 rows, or loss, by "attack-defense"."""
    for path in (grid / "cells").iterdir():
        name = path.name.removesuffix("-0")
        lines = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
        for line in lines:
            value = values[name]
            line["quality"] = {"loss": value} if key == "loss" else {
                "loss": 1.0, "accuracy": wilson(round(400 * float(value)), 400)
            }  # fmt: skip
            line["attack"] = None
        (path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def one_seed(folder: Path, attacks: list[str]) -> Path:
    return write_grid(
        folder, attacks=attacks, defenses=["none", "median", "multi_krum"], more={"seed": ["0"]}, rounds=2
    )


def said(grid: Path) -> str:
    read = read_grid(grid)
    return " ".join(grid_words.finding(read, slices(read), views(read)))


def test_a_defense_that_was_left_out_of_the_hard_attack_is_not_the_best(tmp_path: Path):
    # audit F9: multi_krum is excluded from the attack under which median has its worst case
    grid = one_seed(tmp_path / "g", ["alie", "ipm"])
    set_accuracy(grid, {"none-none": 0.9, "alie-none": 0.5, "alie-median": 0.9, "alie-multi_krum": 0.8, "ipm-none": 0.1,
                        "ipm-median": 0.775, "ipm-multi_krum": 0.0})  # fmt: skip
    content = json.loads((grid / "grid.json").read_text())
    content["cells"] = [cell for cell in content["cells"] if cell["folder"] != "cells/ipm-multi_krum-0"]
    (grid / "grid.json").write_text(json.dumps(content))
    assert "over the 1 of 2 attacks that all defenses met, median has the best worst case in accuracy: 0.90" in said(
        grid
    )
    read = read_grid(grid)
    rows = {row[0].text: [str(cell) for cell in row] for row in ranking(slices(read), views(read)).table.rows}
    assert "alie, 1 of 2 attacks" in rows["multi_krum"]


def test_defenses_with_the_same_worst_case_share_it(tmp_path: Path):
    grid = one_seed(tmp_path / "g", ["alie", "ipm"])
    values = dict.fromkeys(("none-none", "alie-median", "alie-multi_krum", "ipm-median", "ipm-multi_krum"), 0.75)
    set_accuracy(grid, {**values, "alie-none": 0.5, "ipm-none": 0.1})
    assert "median and multi_krum share the best worst case in accuracy: 0.75 [0.71, 0.79]." in said(grid)
    assert "alie and ipm" in summary_text(read_grid(grid))  # both are the worst of each


def test_a_difference_within_its_interval_is_no_ranking(tmp_path: Path):
    grid = one_seed(tmp_path / "g", ["alie"])
    set_accuracy(grid, {"none-none": 0.9, "alie-none": 0.5, "alie-median": 0.75, "alie-multi_krum": 0.76})
    assert (
        "no other defense can be told apart from the best worst case in accuracy, that of multi_krum, "
        "0.76 [0.72, 0.80] under alie: median 0.75 [0.71, 0.79] under alie." in said(grid)
    )


def test_a_loss_that_is_not_a_number_is_the_worst(tmp_path: Path):
    grid = one_seed(tmp_path / "g", ["alie"])
    values = {"none-none": 0.5, "alie-none": "nan", "alie-median": 0.6, "alie-multi_krum": "inf"}
    set_accuracy(grid, values, "loss")
    read = read_grid(grid)
    parts, loss = slices(read), views(read)[0]
    found = heat.heat_map(parts[0], loss, heat.scale_of(parts, loss), {cell.folder: 0 for cell in read.cells}, "x")
    assert found["says"] == "Under attack: best 0.600 (alie, median), worst nan (alie, none)."


def test_a_legend_of_accuracy_ends_at_one(tmp_path: Path):
    grid = one_seed(tmp_path / "g", ["alie"])
    set_accuracy(grid, dict.fromkeys(("none-none", "alie-none", "alie-median", "alie-multi_krum"), 1.0))
    read = read_grid(grid)
    scale = heat.scale_of(slices(read), views(read)[0])
    assert (scale.bad, scale.good, scale.level(1.0)) == (0.9, 1.0, heat.LEVELS - 1)


def test_a_run_that_stands_for_several_labels_is_in_every_part(tmp_path: Path):
    """A sweep over a setting of multi_krum: the undefended runs are the same for both values."""
    labels = {"attacks": ["alie"], "defenses": ["none", "multi_krum"], "more": {"f": ["1", "2"]}, "rounds": 2}
    grid = write_grid(tmp_path / "g", **labels)  # type: ignore[arg-type]
    content = json.loads((grid / "grid.json").read_text())
    for cell in list(content["cells"]):
        if cell["axes"]["defense"] == "none" and cell["axes"]["f"] == "2":
            content["cells"].remove(cell)
        elif cell["axes"]["defense"] == "none":
            cell["also"] = [{**cell["axes"], "f": "2"}]
        if cell["twin"]:
            cell["twin"] = "cells/none-none-1"
    (grid / "grid.json").write_text(json.dumps(content))
    read = read_grid(grid)
    parts, accuracy = slices(read), views(read)[0]
    assert [part.slot(accuracy, "alie", "none").measured for part in parts] == [1, 1]
    assert [len(part.twins) for part in parts] == [1, 1]
    assert "2 blocks" in " ".join(ranking(parts, views(read)).remarks)
    assert "–" in next(cell for cell in read.cells if cell.slug == "alie-none-1").shown_axes.values()
    assert "f 2" in render(read)


def test_recipes_are_compared_as_they_are_written(make_run: MakeRun, tmp_path: Path):
    run = read_runs([make_run(tmp_path / "a", rounds=2)])[0]
    again = dataclasses.replace(run, recipe=yaml.safe_load(run.recipe_text), name="b")
    assert page.pairs.federations([run, again]) == [[run, again]]
