"""What sentences and tables compare: the same round, the attacks of the grid, and limits that are not rounded away."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedllm_sec import benchmark
from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.grid import cells, results
from fedllm_sec.recipe import plainyaml
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.report import page, words
from fedllm_sec.report.client_plots import _norms_alt
from fedllm_sec.report.grid.folder import read_grid
from fedllm_sec.report.grid.numbers import slices
from fedllm_sec.report.grid.tables import ranking
from fedllm_sec.report.grid.views import views
from fedllm_sec.report.measures import Measure, interval, percent, written
from fedllm_sec.report.runs import Run, read_runs
from tests.report.test_shown import one_seed, said, set_accuracy, without_a_trigger

MakeRun = Callable[..., Path]


def measured(run: Run, values: dict[int, float], key: str = "accuracy") -> Run:
    """The run with these values of 400 rows by round, recorded to the last of them."""

    def quality(record: RoundRecord) -> dict[str, object] | None:
        value = values.get(record.round)
        return None if value is None else {key: value if key == "loss" else wilson(round(400 * value), 400)}

    kept = [record for record in run.records if record.round <= max(values)]
    records = tuple(dataclasses.replace(record, attack=None, quality=quality(record)) for record in kept)
    return dataclasses.replace(run, records=records)


def two(make: MakeRun, folder: Path) -> tuple[Run, Run]:
    """An attack-free and an attacked run of 4 rounds."""
    paths = [make(folder / n, rounds=4, attack=n == "attacked", change=without_a_trigger) for n in ("free", "attacked")]
    free, attacked = (read_runs([path])[0] for path in paths)
    return free, attacked


def test_a_run_stopped_after_round_one_is_compared_with_round_one_of_the_other(make_run: MakeRun, tmp_path: Path):
    free, attacked = two(make_run, tmp_path)
    runs = [measured(free, {1: 0.86, 2: 0.9, 3: 0.92, 4: 0.94}), measured(attacked, {1: 0.17})]
    assert words.finding(runs) == [
        "After round 1, the last that all were evaluated in: Byzantine_flip by 3 of 10 clients took the undefended "
        "model's accuracy from 0.86 to 0.17."
    ]
    assert any(
        "last evaluated in different rounds: round 1 (attacked) and round 4 (free); the sentences compare them after "
        "round 1." in note
        for note in page.warnings_of(runs)
    )


def test_runs_that_were_never_evaluated_in_the_same_round_are_not_compared(make_run: MakeRun, tmp_path: Path):
    free, attacked = two(make_run, tmp_path)
    runs = [measured(free, {2: 0.9, 4: 0.94}), measured(attacked, {1: 0.5, 3: 0.17})]
    assert words.finding(runs) == []
    assert any("no round of training was evaluated in all of them" in note for note in page.warnings_of(runs))


def test_a_loss_is_told_to_change_only_where_its_digits_do(make_run: MakeRun, tmp_path: Path):
    free, attacked = two(make_run, tmp_path)
    alike = [measured(free, {4: 0.50001}, "loss"), measured(attacked, {4: 0.50002}, "loss")]
    assert "left the undefended model's held-out loss at 0.500 (attack-free 0.500)" in words.finding(alike)[0]
    worse = [measured(free, {4: 0.5}, "loss"), measured(attacked, {4: 0.9}, "loss")]
    assert "took the undefended model's held-out loss from 0.500 to 0.900" in words.finding(worse)[0]


def test_attacks_of_the_same_name_are_told_apart_by_their_runs(make_run: MakeRun, tmp_path: Path):
    def later(recipe: dict[str, dict[str, object]]) -> None:
        recipe["attack"]["start"] = 2

    paths = [make_run(tmp_path / "a", rounds=4), make_run(tmp_path / "b", rounds=4, change=later)]
    text = " ".join(words.finding([read_runs([path])[0] for path in paths]))
    assert "text_trigger + model_replacement against no defense (a)" in text
    assert "text_trigger + model_replacement against no defense (b)" in text


def test_what_the_attack_free_model_does_more_often_is_not_the_triggers(make_run: MakeRun, tmp_path: Path):
    def hit(name: str, hits: int) -> Run:
        run = read_runs([make_run(tmp_path / name, rounds=2, attack=name == "attacked")])[0]
        rate = {"asr": wilson(hits, 400)}
        return dataclasses.replace(run, records=tuple(dataclasses.replace(r, attack=rate) for r in run.records))

    text = words.finding([hit("free", 120), hit("attacked", 40)])[0]
    assert "to 10 % of 400 triggered prompts, no more than the attack-free model's 30 %" in text


def test_lengths_of_malicious_rows_alone_are_told(make_run: MakeRun, tmp_path: Path):
    run = read_runs([make_run(tmp_path / "a", rounds=4, clients=3, malicious=3)])[0]
    alone = tuple(dataclasses.replace(r, malicious=list(r.cohort)) for r in run.records)
    text = _norms_alt(dataclasses.replace(run, records=alone))
    assert text.startswith("Median update length of the malicious clients: ")


# ---------------------------------------------------------------- numbers


def test_a_limit_is_nothing_or_all_only_where_it_is():
    none, every = (Measure(**(wilson(hits, 2500) or {})) for hits in (0, 2500))
    assert f"{percent(none.value)} {interval(none, 'percent')}" == "0 % [0, 0.15]"
    assert f"{percent(every.value)} {interval(every, 'percent')}" == "100 % [99.8, 100]"
    assert f"{written(every.value, 'rate')} {interval(every, 'rate')}" == "1.00 [0.998, 1.00]"
    assert f"{written(none.value, 'rate')} {interval(none, 'rate')}" == "0.00 [0.00, 0.002]"


def test_the_terminal_does_not_round_a_rate_to_nothing_or_all(monkeypatch: pytest.MonkeyPatch):
    row = {
        "attack": "bd",
        "defense": "none",
        "status": "done",
        "accuracy": 0.996,
        "asr": 0.0015,
        "false_trigger": 0.0004,
    }
    monkeypatch.setattr(results, "table", lambda grid: [row])
    text = results.as_text(SimpleNamespace(axes={"attack": ["bd"], "defense": ["none"]}))  # type: ignore[arg-type]
    assert text.splitlines()[0].startswith("accuracy / attack success / false triggers")
    assert text.splitlines()[1].split() == ["bd", "0.996", "/", "0.002", "/", "0.0004"]


def test_the_line_of_a_cell_does_not_round_a_rate_to_nothing_or_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cells, "status", lambda cell: "done")
    found = {"quality": {"accuracy": {"value": 0.9997}}, "attack": {"asr": {"value": 0.0002}}}
    (tmp_path / "summary.json").write_text(json.dumps(found))
    line = benchmark.line_of(SimpleNamespace(slug="bd-none", folder=tmp_path), 1.0)
    assert line == "bd-none  accuracy 0.9997  ASR 0.0002  1.0 s"


# ---------------------------------------------------------------- grids


def without(grid: Path, start: str) -> None:
    content = json.loads((grid / "grid.json").read_text())
    content["cells"] = [cell for cell in content["cells"] if not cell["folder"].startswith(f"cells/{start}")]
    (grid / "grid.json").write_text(json.dumps(content))


def table_of(grid: Path) -> dict[str, list[str]]:
    read = read_grid(grid)
    return {row[0].text: [str(cell) for cell in row] for row in ranking(slices(read), views(read)).table.rows}


def test_an_attack_that_no_cell_has_is_not_counted(tmp_path: Path):
    grid = one_seed(tmp_path / "g", ["alie", "ipm", "min_max"])
    values = {f"{a}-{d}": 0.5 for a in ("alie", "ipm", "min_max") for d in ("none", "median", "multi_krum")}
    set_accuracy(grid, {**values, "none-none": 0.9})
    without(grid, "min_max")
    assert said(grid).startswith("2 attacks against 2 defenses: median and multi_krum share the best worst case")
    assert " of 3" not in said(grid)


def test_a_worst_case_says_the_seeds_that_it_lacks(tmp_path: Path):
    from tests.report.fake_grid import write_grid

    grid = write_grid(tmp_path / "g", attacks=["alie"], defenses=["none", "median"], more={"seed": ["0", "1", "2"]},
                      rounds=2, failed=["alie-median-1", "alie-median-2"])  # fmt: skip
    assert any("(1 of 3 seeds)" in cell for cell in table_of(grid)["median"])
    assert not any("seeds)" in cell for cell in table_of(grid)["none"])


def test_what_is_infinite_does_not_share_a_worst_case_with_what_is_no_number(tmp_path: Path):
    grid = one_seed(tmp_path / "g", ["alie"])
    set_accuracy(grid, {"none-none": 0.5, "alie-none": 0.9, "alie-median": "inf", "alie-multi_krum": "nan"}, "loss")
    assert "median has the best worst case in held-out loss: inf" in said(grid)
    assert "share" not in said(grid)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("value", ["*s3cret", "!s3cret x", "!a!s3cret x"])
def test_an_alias_or_a_tag_that_may_be_a_secret_is_not_printed(value: str):
    with pytest.raises(plainyaml.RecipeError) as caught:
        plainyaml.parse(f"wandb_key: {value}", "recipe.yaml")
    assert "s3cret" not in str(caught.value)
    assert "line 1: not YAML" in str(caught.value)


# ---------------------------------------------------------------- what sentences say of settings, names and seeds


def test_attacks_are_counted_in_their_settings_where_the_grid_is_split(tmp_path: Path):
    from tests.report.fake_grid import write_grid

    labels = {"attacks": ["alie", "ipm"], "defenses": ["none", "median"], "rounds": 2}
    more = {"partition": ["iid", "dirichlet"], "seed": ["0"]}
    grid = write_grid(tmp_path / "g", **labels, more=more, failed=["ipm-median-dirichlet-0"])  # type: ignore[arg-type]
    assert "over the 3 of 4 attacks in their settings for which no result is missing, " in said(grid).lower()
    assert any("3 of 4 attacks in their settings" in cell for cell in table_of(grid)["median"])


def test_the_quality_sentence_names_the_run_where_defenses_are_called_the_same(make_run: MakeRun, tmp_path: Path):
    def other(recipe: dict[str, dict[str, dict[str, object]]]) -> None:
        recipe["defense"]["rule"]["f"] = 4

    bare = read_runs([make_run(tmp_path / "bare", rounds=8)])[0]
    weak = read_runs([make_run(tmp_path / "weak", rounds=8, rule="median", asr=0.9)])[0]
    strong = read_runs([make_run(tmp_path / "strong", rounds=8, rule="median", asr=0.03, change=other)])[0]
    _, quality = words.finding([bare, weak, strong])
    assert quality.endswith(" with median (strong).")
    assert words.finding([bare, strong])[1].endswith(" with median.")


def test_of_defenses_without_a_common_seed_nothing_is_said(tmp_path: Path):
    from tests.report.fake_grid import write_grid

    grid = write_grid(tmp_path / "g", attacks=["alie"], defenses=["none", "median", "multi_krum"],
                      more={"seed": ["0", "1"]}, rounds=2)  # fmt: skip
    keep = {"alie-median-0", "alie-multi_krum-1", "alie-none-0", "none-none-0", "none-none-1"}
    content = json.loads((grid / "grid.json").read_text())
    content["cells"] = [cell for cell in content["cells"] if cell["folder"].removeprefix("cells/") in keep]
    (grid / "grid.json").write_text(json.dumps(content))
    for name in keep:  # 0.750 and 0.755 of 400 rows: with a common seed they could not be told apart
        path = grid / "cells" / name / "history.jsonl"
        rate = wilson(302 if "krum" in name else 300, 400)
        lines = [json.loads(line) | {"quality": {"loss": 1.0, "accuracy": rate}, "attack": None}
                 for line in path.read_text().splitlines()]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "multi_krum has the best worst case in accuracy: 0.76" in said(grid) or "0.75" in said(grid)
    assert "cannot be told apart" not in said(grid)


def test_the_sentence_of_scores_is_the_mean_of_the_rounds_under_attack(make_run: MakeRun, tmp_path: Path):
    run = read_runs([make_run(tmp_path / "a", rounds=4, rule="multi_krum")])[0]
    areas = {1: 0.1, 2: None, 3: 0.5, 4: 1.0}  # attacked in rounds 3 and 4
    records = tuple(dataclasses.replace(r, detection={"auc": areas[r.round]}) for r in run.records)
    remarks = page.section_of(dataclasses.replace(run, records=records), "x")["remarks"]
    assert remarks == ["Its scores put a malicious client above an honest one with probability 0.75 (AUC)."]
