"""A grid file becomes cells: what varies, what is left out, the twins, and every mistake at once."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet

from fedllm_sec.errors import RecipeError
from fedllm_sec.grid import grid
from fedllm_sec.grid.axes import label_of
from fedllm_sec.grid.cells import describe
from fedllm_sec.grid.results import _settings, as_csv, as_parquet, flatten, label_in, varying_keys
from fedllm_sec.grid.seeds import over_seeds
from tests.conftest import ROOT

BASE: dict[str, Any] = {
    "rounds": 2,
    "task": "classify",
    "model": {"name": "logistic"},
    "data": {"name": "digits"},
    "clients": {"total": 6, "local_steps": 2, "batch_size": 8, "lr": 1e-2, "partition": {"name": "iid"}},
    "attack": {"malicious": {"count": 2}, "update": [{"name": "byzantine_flip", "scale": 5.0}]},
    "defense": {"rule": {"name": "krum", "f": 1}},
    "compute": {"threads": 1},
}
ATTACKS = {"flip": {}, "zero": {"update": [{"name": "byzantine_zero"}]}}
DEFENSES = {"none": None, "median": {"rule": {"name": "median"}}}


def made(axes: Any, *, base: Any = None, overrides: tuple[str, ...] = (), **more: Any) -> grid.Grid:
    return grid.make({"base": base or BASE, "axes": axes, **more}, Path("here.yaml"), overrides)


def problems(axes: Any, **more: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        made(axes, **more)
    return str(caught.value)


def test_cells_are_all_combinations_and_the_twin_that_nobody_named():
    found = made({"attack": ATTACKS, "defense": DEFENSES})
    assert [c.slug for c in found.cells] == ["none__none", "flip__none", "flip__median", "zero__none", "zero__median"]
    assert [c.twin for c in found.cells] == [None, *["none__none"] * 4]
    assert found.axes == {"attack": ["none", "flip", "zero"], "defense": ["none", "median"]}
    by_slug = {c.slug: c.recipe for c in found.cells}
    assert not by_slug["none__none"].enable_attack
    assert by_slug["flip__none"].enable_attack
    assert not by_slug["flip__none"].enable_defense
    assert by_slug["zero__median"].defense.rule == {"name": "median"}
    assert by_slug["flip__none"].output.folder == "runs/here/cells/flip__none"


def test_every_combination_of_the_other_axes_has_its_own_twin():
    found = made({"attack": {"flip": {}}, "defense": DEFENSES, "seed": [0, 7], "clients.lr": [0.1, 1e-3]})
    twins = {c.slug: c.recipe for c in found.cells if c.twin is None}
    assert {(r.seed, r.clients.lr) for r in twins.values()} == {(0, 0.1), (0, 1e-3), (7, 0.1), (7, 1e-3)}
    for cell in found.cells:
        if cell.twin is not None:
            assert (twins[cell.twin].seed, twins[cell.twin].clients.lr) == (cell.recipe.seed, cell.recipe.clients.lr)
    assert len(found.cells) == 4 * 3


def test_combinations_that_come_to_the_same_run_are_one_cell():
    found = made({"attack": {"none": None, "flip": {}}, "defense": DEFENSES, "attack.malicious.count": [1, 2]})
    assert {c.slug for c in found.cells} == {
        "none__none", "none__median", "flip__none__count-1", "flip__none__count-2",
        "flip__median__count-1", "flip__median__count-2",
    }  # fmt: skip
    assert {c.twin for c in found.cells} == {None, "none__none"}
    assert {c.recipe.attack.malicious.count for c in found.cells if c.recipe.enable_attack} == {1, 2}


def test_a_cell_that_is_several_combinations_says_so_and_has_no_label_of_what_it_lacks():
    found = made(
        {
            "attack": {"none": None, "flip": {}},
            "defense": {"none": None, "krum": {"rule": {"name": "multi_krum", "f": 1}}},
            "defense.rule.f": [1, 2],
            "attack.malicious.count": [2, 3],
        },
        base={**BASE, "clients": {**BASE["clients"], "total": 8}},
    )
    cells = {cell.slug: cell for cell in found.cells}
    twin = cells["none__none"]
    assert len(twin.also) == 3  # f and count, two values each
    assert [at["defense.rule.f"] for at in (twin.axes, *twin.also)] == ["1", "1", "2", "2"]
    assert cells["flip__krum__f-2__count-3"].also == ()
    shown = {slug: (label_in(c, "defense.rule.f", _settings(c)), label_in(c, "attack.malicious.count", _settings(c)))
             for slug, c in cells.items()}  # fmt: skip
    assert shown["none__none"] == (None, None)
    assert shown["flip__none__count-3"] == (None, 3)
    assert shown["none__krum__f-2"] == (2, None)
    assert shown["flip__krum__f-1__count-2"] == (1, 2)
    assert [*describe(found, "x")["cells"][0]["also"]] == [dict(at) for at in twin.also]


def test_settings_of_an_attack_that_is_off_are_no_settings():
    found = made({"attack": ATTACKS, "attack.malicious.count": [2]})
    assert [label_in(c, "attack.malicious.count", _settings(c)) for c in found.cells] == [None, 2, 2]


def test_a_value_that_is_null_is_empty_and_a_block_is_named_by_its_label():
    partitions = {"even": {"name": "iid"}}
    found = made({"clients.per_round": [None, 4], "clients.partition": partitions, "own": {"a": {"rounds": 3}}})
    labels = [[label_in(c, axis, _settings(c)) for axis in found.axes] for c in found.cells]
    assert labels == [["none", "none", None, "even", "a"], ["none", "none", 4, "even", "a"]]


def test_an_axis_given_twice_on_the_command_line_is_an_error(tmp_path: Path):
    (tmp_path / "g.yaml").write_text(yaml.safe_dump({"base": BASE, "axes": {"seed": [0]}}))
    with pytest.raises(RecipeError, match=r'"axes.seed=\[2\]": would undo "axes.seed=\[1\]", given before it'):
        grid.load(tmp_path / "g.yaml", ["axes.seed=[1]", "axes.seed=[2]"])


@pytest.mark.parametrize(
    "name", ["status", "accuracy", "cell", "seeds", "loss_drop", "asr_rise", "detection_tpr", "done"]
)
def test_an_axis_of_ones_own_is_not_named_like_a_column(name):
    assert f"axes.{name}: is the name of a column of results.csv" in problems({name: {"a": {"rounds": 3}, "b": {}}})


def test_what_was_not_measured_is_empty_and_what_is_no_number_says_so():
    rows = [{"cell": "a", "loss": math.nan, "n": 3}, {"cell": "b", "loss": None, "n": None}]
    assert as_csv(rows).decode().splitlines() == ["cell,loss,n", "a,nan,3", "b,,"]
    table = parquet.read_table(io.BytesIO(as_parquet(rows)))
    assert table.column("loss").null_count == 1
    assert math.isnan(table.column("loss")[0].as_py())
    assert str(table.schema.field("n").type) == "int64"
    means = over_seeds([{**rows[0], "status": "done", "attack": "x", "seed": 0}], {"attack": ["x"], "seed": ["0"]})
    assert as_csv(means).decode().splitlines()[1].split(",")[-2:] == ["nan", "3.0"]


def test_a_run_without_attack_keeps_the_probe_of_its_first_data_attack_and_nothing_else():
    base = {
        **BASE,
        "attack": {
            "malicious": {"count": 2},
            "knowledge": "cohort",
            "data": [{"name": "pixel_trigger", "target": 1}],
            "update": [{"name": "alie", "z": 1.0}],
        },
    }
    twin = made({"defense": DEFENSES}, base={**base, "enable_attack": True}).cells[0].recipe
    assert twin.attack.data == [{"name": "pixel_trigger", "target": 1}]
    assert twin.attack.update == []
    assert twin.defense is None


def test_axes_may_be_recipe_keys_with_values_blocks_or_names_of_ones_own():
    found = made(
        {
            "clients.partition": [{"name": "iid"}, {"name": "dirichlet", "alpha": 0.5}],
            "algorithm": {"prox": {"name": "fedprox", "mu": 0.1}, "avg": {"name": "fedavg"}},
            "size": {"small": {"clients": {"total": 4}, "rounds": 1}, "large": {}},
        }
    )
    assert list(found.axes) == ["attack", "defense", "clients.partition", "algorithm", "size"]
    assert found.axes["clients.partition"] == ["iid", "dirichlet(alpha=0.5)"]
    small = next(c.recipe for c in found.cells if c.axes["size"] == "small" and c.axes["algorithm"] == "prox")
    assert (small.clients.total, small.rounds, small.algorithm) == (4, 1, {"name": "fedprox", "mu": 0.1})
    assert "none__none__partition-dirichlet-alpha=0.5__algorithm-avg__size-large" in {c.slug for c in found.cells}


def test_a_base_that_attacks_is_named_after_its_methods():
    found = made({"seed": [0, 1]}, base={**BASE, "enable_attack": True, "enable_defense": True})
    assert [c.slug for c in found.cells][:2] == ["none__none__seed-0", "byzantine_flip__krum__seed-0"]
    assert found.axes["attack"] == ["none", "byzantine_flip"]
    assert found.axes["defense"] == ["none", "krum"]


def test_exclude_leaves_cells_out_and_twins_stay():
    found = made(
        {"attack": ATTACKS, "defense": DEFENSES, "seed": [0, 1]},
        exclude=[{"attack": ["flip"], "defense": "median"}, {"seed": 1, "attack": "zero"}],
    )
    assert {c.slug for c in found.cells} == {
        "none__none__seed-0", "none__none__seed-1", "flip__none__seed-0", "flip__none__seed-1",
        "zero__none__seed-0", "zero__median__seed-0",
    }  # fmt: skip


def test_the_command_line_changes_the_base_and_whole_axes(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**BASE, "output": {"folder": "runs/base"}}))
    path = tmp_path / "g.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "axes": {"attack": ATTACKS, "seed": [0]}}))
    found = grid.load(path, ["rounds=5", "axes.seed=[3, 4]", f"output.folder={tmp_path}/out"])
    assert found.axes["seed"] == ["3", "4"]
    assert found.folder == tmp_path / "out"
    assert {c.recipe.rounds for c in found.cells} == {5}
    assert grid.load(path).folder == Path("runs/g")
    assert "seed" not in grid.load(path, ["axes.seed=null"]).axes
    with pytest.raises(RecipeError, match=r"override seed: seed is an axis.*axes\.seed="):
        grid.load(path, ["seed=3"])


def test_equal_data_lie_next_to_each_other_in_the_order_of_running_and_clean_rounds_are_begun_side_by_side():
    found = made({"attack": ATTACKS, "seed": [0, 1]})
    assert [c.recipe.seed for c in found.run_order()] == [0, 0, 0, 1, 1, 1]
    assert {c.slug for c in found.run_order()} == {c.slug for c in found.cells}
    warm = made({"attack": ATTACKS, "seed": [0, 1]}, base={**BASE, "pretrain": {"rounds": 2}})
    assert [c.recipe.seed for c in warm.run_order()] == [0, 1, 0, 0, 1, 1]
    assert {c.slug for c in warm.run_order()} == {c.slug for c in warm.cells}


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"sed": [0, 1]}, 'axes.sed: names no recipe key. Did you mean "seed"?'),
        ({"clients.lrr": [0.1]}, 'axes.clients.lrr: names no recipe key. Did you mean "lr"?'),
        ({"atack": {"flip": {"update": []}}}, 'Did you mean "attack"?'),
        ({"attack": {"flip": {"updates": []}}}, 'attack.updates: unknown key. Did you mean "update"?'),
        ({"defense": {"m": {"rule": {"name": "medain"}}}}, 'there is no "medain". Did you mean "median"?'),
        ({"seed": []}, "axes.seed: has no label, which makes a grid of zero cells"),
        ({}, "it has no cells"),
        (None, "it has no cells"),
        ({"seed": 3}, "axes.seed: 3: must be a list of values"),
        ({"seed": [1, 1]}, "axes.seed: 1 stands there twice"),
        ({"attack": {"flip": 3}}, "axes.attack.flip: 3: must be a block"),
        ({"attack": {"none": {"update": []}}}, "axes.attack.none: means switched off"),
        ({"enable_attack": [True, False]}, "axes.enable_attack: cannot be an axis"),
        ({"size": {"a b": {"rounds": 1}, "a/b": {"rounds": 3}}}, "two cells would have the folder cells/none__none__"),
        ({"defense.rule": [{"name": "median"}, {"name": "mean"}]}, "median and mean come to the same recipe"),
        ({"seed.sub": [1]}, "seed"),
    ],
)
def test_mistakes_in_axes_are_named(axes, words):
    assert words in problems(axes)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"exclude": [{"attack": ["flip", "zero"]}]}, "leaves no cell"),
        ({"exclude": [{"attac": "flip"}]}, 'exclude.0: there is no axis attac. Did you mean "attack"?'),
        ({"exclude": [{"attack": "flop"}]}, 'exclude.0.attack: there is no label flop. Did you mean "flip"?'),
        ({"exclude": {"attack": "flip"}}, "must be a list of maps"),
        ({"exclude": [{"attack": []}]}, "exclude.0.attack: names no label, so the rule leaves nothing out. Name one."),
        ({"axis": {}}, 'axis: no key of a grid. Did you mean "axes"?'),
        ({"overrides": 3}, "overrides: 3: must be a block"),
        ({"axes": {"attack": ATTACKS, "seed": [1]}, "overrides": {"seed": 5}}, "overrides.seed: seed is an axis of th"),
        ({"axes": {"clients.lr": [0.1]}, "overrides": {"clients": {"lr": 0.2}}}, "clients.lr is an axis of this grid"),
        ({"overrides": {"variants": {"a": {}}}}, "overrides.variants: a grid has axes in place of variants"),
        ({"base": 3}, "base: 3: must be the path of a recipe"),
        ({"base": "gone.yaml"}, "gone.yaml: there is no such file"),
        ({"name": "../up"}, "name: '../up'"),
        ({"overrides": {"output": {"folder": "/proc/x"}}}, "output.folder: /proc/x: /proc holds what the system tells"),
    ],
)
def test_mistakes_around_axes_are_named(more, words):
    raw = {"base": BASE, "axes": {"attack": ATTACKS}, **more}
    with pytest.raises(RecipeError) as caught:
        grid.make(raw, Path("here.yaml"))
    assert words in str(caught.value)


def test_all_mistakes_of_all_cells_come_together_with_the_cells_they_are_in():
    text = problems(
        {
            "attack": {"flip": {}, "bad": {"update": [{"name": "byzantine_flipp"}]}},
            "defense": {"none": None, "krum": {"rule": {"name": "krum", "f": 5}}},
        }
    )
    assert '"byzantine_flipp"' in text
    assert "(2 cells, first bad__none)" in text
    assert "needs n >= 2f + 3" in text
    assert "(cell flip__krum)" in text


def test_labels_of_values_can_be_read():
    assert [label_of(v) for v in (0.1, 1, True, None, "x", [1, 2])] == ["0.1", "1", "true", "null", "x", "1,2"]
    assert label_of({"name": "dirichlet", "alpha": 0.1}) == "dirichlet(alpha=0.1)"
    assert label_of({"data": [{"name": "text_trigger"}], "update": [{"name": "alie"}]}) == "text_trigger+alie"


def test_the_recipe_keys_that_vary_are_found_wherever_they_are():
    found = made({"attack": ATTACKS, "clients.lr": [0.1, 0.2]})
    assert {"clients.lr", "attack.update.0.name", "attack.update.0.scale"} <= {*varying_keys(found)}
    assert not {"rounds", "seed", "output.folder"} & {*varying_keys(found)}
    assert flatten({"a": {"b": [{"c": 1}, {"c": None}], "d": []}, "e": [1, 2]}) == {"a.b.0.c": 1, "e": "1, 2"}


def test_means_over_seeds_say_how_many_of_how_many_they_are_of():
    def row(seed: int, status: str, value: float | None) -> dict[str, Any]:
        rate = {"accuracy": value, "accuracy_low": 0.1, "accuracy_high": 0.9, "accuracy_n": value and 100}
        return {"cell": f"c{seed}", "status": status, "error": None, "is_twin": False, "attack": "flip",
                "defense": "none", "seed": seed, **rate}  # fmt: skip

    axes = {"attack": ["flip"], "defense": ["none"], "seed": ["0", "1", "2"]}
    (mean,) = over_seeds([row(0, "done", 0.5), row(1, "done", 0.7), row(2, "failed", None)], axes)
    assert (mean["seeds"], mean["done"], mean["failed"]) == (3, 2, 1)
    assert mean["accuracy"] == pytest.approx(0.6)
    assert (mean["accuracy_low"], mean["accuracy_high"]) == pytest.approx((0.5, 0.7))  # two values: their range
    assert mean["accuracy_n"] == 200
    assert 0.52 < mean["accuracy_pooled_low"] < 0.6 < mean["accuracy_pooled_high"] < 0.67
    (single,) = over_seeds([row(0, "done", 0.5)], axes)
    assert (single["accuracy_low"], single["accuracy_high"]) == (0.1, 0.9)  # the Wilson interval of that run


def test_scores_of_privacy_attacks_are_means_over_seeds_and_no_rates():
    """41 and 37 dB of 24 images each are 39 dB; no share of 48 images lies behind them."""
    fixed = {"status": "done", "error": None, "is_twin": False, "attack": "observer", "defense": "none"}
    leak = "leak_invert_gradient_psnr"
    scored = {f"{leak}_low": 30.0, f"{leak}_high": 45.0, f"{leak}_n": 24}
    rows = [{"cell": f"c{seed}", **fixed, "seed": seed, leak: db, **scored} for seed, db in ((1, 41.0), (2, 37.0))]
    (mean,) = over_seeds(rows, {"attack": ["observer"], "defense": ["none"], "seed": ["1", "2"]})
    assert [mean[leak], mean[f"{leak}_low"], mean[f"{leak}_high"]] == pytest.approx([39.0, 37.0, 41.0])
    assert f"{leak}_pooled_low" not in mean


def test_the_shipped_quick_grid_is_five_attacks_by_six_defenses():
    found = grid.load(ROOT / "recipes" / "grids" / "quick.yaml")
    assert len(found.cells) == 5 * 6 + 1


def test_a_recipe_is_no_grid_and_a_grid_no_recipe(tmp_path: Path):
    from fedllm_sec.train import load

    grids = ROOT / "recipes" / "grids"
    with pytest.raises(RecipeError, match=r"is a grid. Run it with python -m fedllm_sec.benchmark"):
        load(grids / "quick.yaml")
    with pytest.raises(RecipeError, match="so it is no grid"):
        grid.load(ROOT / "recipes" / "quickstart.yaml")
    path = tmp_path / "twice.yaml"
    path.write_text(f"base: {grids / 'quick.yaml'}\naxes: {{seed: [0]}}")
    with pytest.raises(RecipeError, match=r"quick\.yaml is a grid; a grid varies a recipe"):
        grid.load(path)
