"""The settings language: what a person writes is understood, and every mistake is named at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedllm_sec.build.names import checked, outside
from fedllm_sec.errors import RecipeError
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.train import load

GOOD = {"clients": {"local_steps": 2}}


def problems(raw: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        checked(raw)
    return str(caught.value)


def test_scientific_numbers_and_no_mean_what_they_say():
    parsed = recipes.parse("a: 1e-4\nb: no\nc: true\nd: 5\ne: 1.5E3\nf: off", "here")
    assert parsed == {"a": 1e-4, "b": "no", "c": True, "d": 5, "e": 1500.0, "f": "off"}


def test_no_switches_a_block_off_and_stays_text_elsewhere():
    recipe = checked({**GOOD, "enable_attack": "no", "compute": {"mixed_precision": "no"}})
    assert recipe.enable_attack is False
    assert recipe.compute.mixed_precision == "no"


def test_a_key_given_twice_is_an_error_with_its_line():
    with pytest.raises(RecipeError, match=r"line 3.*seed.*twice"):
        recipes.parse("seed: 1\nrounds: 2\nseed: 3", "here")


def test_broken_yaml_is_one_line():
    with pytest.raises(RecipeError, match=r"^r: not YAML \(unacceptable character #x0000: .* allowed in .*\)\.$"):
        recipes.parse("a: \0", "r")


def test_broken_yaml_names_the_line():
    with pytest.raises(RecipeError, match="line 2"):
        recipes.parse("a: 1\nb: [1, 2", "here")


def test_all_mistakes_are_reported_together_with_suggestions():
    text = problems(
        {
            "sed": 1,
            "rounds": -2,
            "clients": {"lrr": 1e-3, "local_steps": 2, "partition": {"name": "dirichlett"}},
            "enable_defense": True,
            "defense": {"rule": {"name": "multi_krumm", "f": 1}},
        }
    )
    assert "5 mistakes" in text
    assert 'sed: unknown key. Did you mean "seed"?' in text
    assert "rounds: -2" in text
    assert 'clients.lrr: unknown key. Did you mean "lr"?' in text
    assert 'no "dirichlett". Did you mean "dirichlet"?' in text
    assert 'no "multi_krumm". Did you mean "multi_krum"?' in text


def test_settings_of_a_method_are_checked_against_its_signature():
    text = problems({**GOOD, "defense": {"rule": {"name": "krum", "ff": 1}}})
    assert 'defense.rule.ff: 1 is set, but there is no such setting. Did you mean "f"?' in text
    assert "defense.rule.f: is needed and has no default" in text


def test_a_method_of_the_wrong_kind_cannot_stand_in_a_place():
    text = problems({**GOOD, "defense": {"rule": {"name": "norm_clipping"}}})
    assert "norm_clipping is of kind 'before'" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clients": {"total": 4, "per_round": 5, "local_steps": 1}}, "clients.per_round: 5"),
        ({"clients": {}}, "either local_steps or local_epochs"),
        ({"clients": {"local_steps": 1, "local_epochs": 1}}, "either local_steps or local_epochs"),
        ({"clients": {"local_steps": 1, "optimizer": "sgd", "betas": [0.5, 0.9]}}, "clients.betas: sgd has none"),
        ({"clients": {"local_steps": 1, "betas": [0.5, 1.0]}}, "clients.betas.1: 1.0"),
        ({"enable_attack": True}, "no attack block"),
        ({"enable_defense": True}, "no defense block"),
        ({"enable_attack": True, "attack": {"malicious": {"count": 10}, "update": [{"name": "byzantine_flip"}]}},
         "10 of 10 clients"),
        ({"enable_attack": True, "attack": {"malicious": {"count": 0}, "update": []}}, "attack.malicious.count: 0"),
        ({"enable_attack": True, "attack": {"malicious": {"count": 1, "share": 0.1}, "update": []}}, "exactly one"),
        ({"enable_attack": True, "attack": {"malicious": {"count": 1}}}, "could not act"),
        ({"enable_attack": True, "attack": {"malicious": {"ids": [12]}, "update": [{"name": "byzantine_flip"}]}},
         "12 is not one of the clients"),
        ({"data": {"template": "{txt}"}}, "data.template"),
        ({"data": {"answer": "x"}}, "data.answer"),
    ],
)  # fmt: skip
def test_contradictions_are_named(change, words):
    assert words in problems({**GOOD, **change})


def test_overrides_reach_into_blocks_and_lists():
    raw = {"clients": {"lr": 1.0}, "defense": {"before": [{"name": "nnm", "f": 1}]}}
    for assignment in ("clients.lr=1e-3", "defense.before.0.f=2", "model.lora.r=4", "seed=7"):
        recipes.override(raw, assignment)
    assert raw["clients"]["lr"] == 1e-3
    assert raw["defense"]["before"][0]["f"] == 2
    assert raw["model"]["lora"]["r"] == 4
    assert raw["seed"] == 7


@pytest.mark.parametrize("assignment", ["lr", "=3", "defense.before.5.f=1", "seed.x=1"])
def test_an_override_that_reaches_nothing_is_an_error(assignment):
    with pytest.raises(RecipeError):
        recipes.override({"seed": 1, "defense": {"before": []}}, assignment)


def test_an_override_that_another_would_undo_is_an_error_that_names_both(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("rounds: 5\n")
    for first, second in (("rounds=1", "rounds=2"), ("rounds=1", "rounds=1"), ("clients.lr=1", "clients={total: 3}")):
        with pytest.raises(RecipeError, match=rf'^override "{second}": would undo "{first}", given before it'):
            recipes.read(path, [first, "seed=1", second])
    assert recipes.read(path, ["clients={total: 3}", "clients.lr=1", "clients.lr_decay=1", "seed=1"]) == {
        "rounds": 5, "clients": {"total": 3, "lr": 1, "lr_decay": 1}, "seed": 1
    }  # fmt: skip


def test_a_dumped_recipe_reads_back_as_itself():
    recipe = checked({**GOOD, "compute": {"mixed_precision": "no"}, "seed": 3})
    assert checked(recipes.parse(recipes.dump(recipe), "dump")) == recipe


def test_a_dumped_recipe_finds_the_columns_of_its_format_again():
    recipe = checked({**GOOD, "data": {"name": "rows", "format": "alpaca", "columns": {"label": "kind"}}})
    again = checked(recipes.parse(recipes.dump(recipe), "dump"))
    assert again.data.columns.model_fields_set == {"label"}
    assert recipes.dump(again) == recipes.dump(recipe)


def test_a_variant_that_names_another_method_replaces_its_block():
    merged = recipes.merge({"defense": {"rule": {"name": "krum", "f": 3}}}, {"defense": {"rule": {"name": "median"}}})
    assert merged == {"defense": {"rule": {"name": "median"}}}


def test_f_too_large_for_the_cohort_is_found_before_a_model_loads(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("clients: {total: 8, local_steps: 1}\nenable_defense: true\ndefense: {rule: {name: krum, f: 3}}")
    with pytest.raises(RecipeError, match=r"krum.*n=8.*f=3"):
        load(path)


def test_a_missing_recipe_is_a_clear_error(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"none.yaml: there is no such file. Give the path of one, or the name"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize("task", [["classify"], {"name": "classify"}, 3, None])
def test_a_task_that_is_no_word_is_an_error_wherever_it_is_looked_at(task: Any):
    assert outside({"task": task, "defense": {"rule": {"name": "krum"}}}) == []
    with pytest.raises(RecipeError, match="task: there is no"):
        checked({"task": task})


def test_an_empty_recipe_is_said_to_be_empty(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("# nothing yet\n")
    with pytest.raises(RecipeError, match=r"r.yaml: is empty. Write a recipe into it, or begin with a copy"):
        load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({True: 1}, "true: unknown key"),
        ({None: 1}, "null: unknown key"),
        ({"compute": {7: 1}}, "compute.7: unknown key"),
        (
            {"defense": {"rule": {"name": "median", True: 3}}},
            "defense.rule.true: 3 is set, but there is no such setting",
        ),
        ({"rounds": True}, "rounds: true: true is no number"),
        ({"rounds": None}, "rounds: null: Input should be a valid integer"),
        ({"output": {"folder": "/"}}, "output.folder: '/': is the working directory, or one that it lies in"),
        ({"output": {"folder": ".."}}, "a run has a folder of its own"),
        ({"output": {"folder": "."}}, "a run has a folder of its own"),
    ],
)
def test_keys_and_values_are_named_as_they_stand_in_the_file(change, words):
    with pytest.raises(RecipeError, match=words):
        checked({"clients": {"local_steps": 1}, **change})


def test_outside_code_is_named_by_module_and_attribute(tmp_path: Path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "from fedllm_sec.protocols import Decision\n"
        "from fedllm_sec import kernels\n"
        "def norm_filter(updates, ctx, *, factor: float = 2.0):\n"
        "    norms = kernels.row_norms(updates)\n"
        "    return Decision.keep(updates, norms <= factor * norms.median())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    block = {"rule": {"name": "my_rules:norm_filter", "factor": "1e1"}}
    checked({**GOOD, "defense": block})
    assert "no function or class" in problems({**GOOD, "defense": {"rule": {"name": "my_rules:nothing"}}})
    assert "cannot import" in problems({**GOOD, "defense": {"rule": {"name": "no_such_module:f"}}})
    assert 'Did you mean "factor"?' in problems(
        {**GOOD, "defense": {"rule": {"name": "my_rules:norm_filter", "facto": 1}}}
    )


def test_names_that_command_a_terminal_are_written_out(tmp_path: Path):
    path = tmp_path / "r.yaml"
    for content, words in (
        ('variants: {"a\\nb": {}, "c\\e[31m": {}}\n', (r"variants.'a\nb': must be", r"variants.'c\x1b[31m': must be")),
        ('"seed\\nx": 1\nclients: {local_steps: 1}\n', (r"seed\nx: unknown key",)),
    ):
        path.write_text(content)
        with pytest.raises(RecipeError) as told:
            load(path)
        assert all(word in str(told.value) for word in words), str(told.value)
        assert all(line.isprintable() for line in str(told.value).split("\n"))
