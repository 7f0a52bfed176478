"""Code from outside that fails in the round that is rehearsed is a line of the recipe's mistakes, not a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedllm_sec.errors import RecipeError
from fedllm_sec.train import load

RECIPE = """
rounds: 3
task: classify
model: {name: logistic}
data: {name: digits}
clients: {total: 5, local_steps: 1}
enable_attack: true
enable_defense: true
attack: {malicious: {count: 1}, start: START, update: [{name: "outside_mine:drift"}]}
defense: {rule: {name: RULE}}
"""
CODE = """
def drift(view, *, scale: float = 2.0):
    return view.own + scale * view.last_update


def rule(updates, ctx):
    return updates.nothing
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "outside_mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "recipe.yaml"


def problem(recipe: Path, start: int, rule: str) -> str:
    """What is wrong with it, one line."""
    recipe.write_text(RECIPE.replace("START", str(start)).replace("RULE", rule))
    with pytest.raises(RecipeError) as caught:
        load(recipe)
    return str(caught.value)


def test_an_attack_that_needs_a_step_before_the_first_one(recipe: Path):
    told = problem(recipe, 1, "mean")
    assert told.startswith("attack: in a rehearsed round 1: TypeError: unsupported operand")
    assert "(outside_mine.py, line 3, in drift). In the first round there is no last_update: it is None." in told
    assert "\n" not in told
    recipe.write_text(RECIPE.replace("START", "2").replace("RULE", "mean"))
    assert load(recipe)  # from round 2 on there is one


def test_a_rule_that_asks_for_what_is_not_there(recipe: Path):
    told = problem(recipe, 2, '"outside_mine:rule"')
    assert "defense: in a rehearsed round 1: AttributeError: " in told
    assert "(outside_mine.py, line 7, in rule)" in told
