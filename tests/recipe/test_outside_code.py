"""A recipe is code where it names some: looking at it runs nothing without `--allow-code`, running it does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_sec import benchmark
from fedllm_sec.build import parts
from fedllm_sec.build.names import checked, outside, without_code
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError
from fedllm_sec.train import main

CODE = """
from pathlib import Path
Path("ran").touch()
def rule(updates, ctx, *, factor: float = 2.0): ...
def loud(updates, ctx, *, when: Missing = 1): ...
def split(labels, clients, rng): ...
"""
BASE: dict[str, Any] = {
    "task": "classify",
    "model": {"name": "logistic"},
    "clients": {"total": 4, "local_steps": 1},
    "enable_attack": True,
    "attack": {"malicious": {"count": 1}, "update": [{"name": "byzantine_flip"}]},
    "enable_defense": True,
    "defense": {"rule": {"name": "strange:rule", "factor": 3}},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module `strange` that leaves a file where it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "strange", raising=False)
    Path("strange.py").write_text("from __future__ import annotations\n" + CODE)
    return tmp_path


def recipe(**changes: Any) -> str:
    Path("r.yaml").write_text(json.dumps(BASE | changes))
    return "r.yaml"


def test_check_imports_nothing_and_says_what_it_did_not_look_at(capsys: pytest.CaptureFixture[str]):
    assert main([recipe(), "--check"]) == 0
    told = capsys.readouterr().out
    assert "fine (1 run)" in told
    assert "not looked at, because to import code is to run it: defense.rule strange:rule" in told
    assert not Path("ran").exists()


def test_check_finds_what_else_is_wrong(capsys: pytest.CaptureFixture[str]):
    wrong = {"update": [{"name": "byzantine_flip", "scael": 2}, {"name": "alie"}], "malicious": {"count": 1}}
    assert main([recipe(rounds=0, attack=wrong), "--check"]) == 2
    told = capsys.readouterr().err
    assert "rounds: 0" in told
    assert "scael" in told
    assert main([recipe(attack={"update": [{"name": "alie"}], "malicious": {"count": 1}}), "--check"]) == 2
    assert "needs 'cohort'" in capsys.readouterr().err  # the attack is tried against a plain mean
    assert not Path("ran").exists()


def test_with_leave_the_code_is_imported_and_its_settings_are_checked(capsys: pytest.CaptureFixture[str]):
    defense = {"rule": {"name": "strange:rule", "faktor": 3}}
    assert main([recipe(defense=defense), "--check", "--allow-code"]) == 2
    assert 'faktor: 3 is set, but there is no such setting. Did you mean "factor"' in capsys.readouterr().err
    assert Path("ran").exists()


@pytest.mark.parametrize(
    "code", ["def own(updates, ctx, factor=2): ...", "class own:\n    def __init__(self, factor=2): ..."]
)
def test_a_setting_that_is_not_keyword_only_is_told_where_it_belongs(code: str, capsys: pytest.CaptureFixture[str]):
    Path("strange.py").write_text(code)
    assert main([recipe(defense={"rule": {"name": "strange:own", "factor": 3}}), "--check", "--allow-code"]) == 2
    assert '"factor" stands among what own is called with. Put a * before its settings.' in capsys.readouterr().err


@pytest.mark.parametrize("look", [lambda: main([recipe(), "--explain"]), lambda: benchmark.main([grid(), "--list"])])
def test_what_cannot_be_shown_without_the_code_asks_for_leave(look: Any, capsys: pytest.CaptureFixture[str]):
    assert look() == 2
    assert "Add --allow-code" in capsys.readouterr().err.replace("add", "Add")
    assert not Path("ran").exists()


def grid() -> str:
    Path("g.yaml").write_text(json.dumps({"base": recipe(), "axes": {"seed": [0]}}))
    return "g.yaml"


def test_leave_that_nobody_needs_is_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([recipe(), "--allow-code"])
    assert "goes with --check or --explain" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--check", "--fresh"], ["--explain", "--fresh"], ["--check", "--explain"]])
def test_flags_of_which_one_could_not_act_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main([recipe(), *flags])
    assert f"{flags[1]} has no part in it. Give one of them" in capsys.readouterr().err


def test_a_grid_that_is_run_imports_what_it_names_without_being_asked(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["grid.yaml", "--allow-code"])
    assert "--allow-code: goes with --list" in capsys.readouterr().err


def test_every_place_of_a_method_is_one_for_code():
    other = {"name": "strange:other"}
    raw = BASE | {
        "model": other,
        "algorithm": other,
        "clients": {**BASE["clients"], "partition": other},
        "attack": {"malicious": {"count": 1}, "data": [other], "local": [other], "update": [other]},
        "defense": {"client": [other], "before": [other], "rule": other, "after": [other]},
    }
    assert len(outside(raw)) == 10
    left = without_code(checked(raw, allow_code=False))
    assert (left.algorithm, left.clients.partition) == ({"name": "fedavg"}, {"name": "iid"})
    assert not left.enable_attack
    assert not left.enable_defense
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        ("1 / 0", "rule", r"ZeroDivisionError: division by zero \(.*strange.py, line 1\)"),
        ("raise SystemExit(3)", "rule", "SystemExit: 3"),
        ("raise BaseException('odd')", "rule", "BaseException: odd"),
        ("def rule(:", "rule", "SyntaxError"),
        ("x = 1", "nothing", 'has no function or class "nothing"'),
        ("from __future__ import annotations\n" + CODE, "loud", "its annotations cannot be read .*'Missing'"),
    ],
)
def test_code_that_cannot_be_used_is_told_in_a_line(code: str, name: str, words: str):
    Path("strange.py").write_text(code)
    with pytest.raises(RecipeError, match=words):
        checked(BASE | {"defense": {"rule": {"name": f"strange:{name}"}}})


def test_ctrl_c_while_code_is_imported_is_ctrl_c(capsys: pytest.CaptureFixture[str]):
    Path("strange.py").write_text("raise KeyboardInterrupt")
    assert main([recipe(), "--check", "--allow-code"]) == 130
    assert capsys.readouterr().err == "stopped.\n"  # nothing was running


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            {"attack": {"update": ["it"]}},
            "attack: in a rehearsed round 1: TypeError: 'ThreatView' object is not iterable",
        ),
        ({"attack": {"local": ["it"]}}, "attack.local.0.name: fedllm_sec.train:main: has no method before_step"),
        ({"attack": {"data": ["it"]}}, "attack.data.0.name: fedllm_sec.train:main: has no method poison"),
        ({"defense": {"client": ["it"]}}, "defense.client.0.name: fedllm_sec.train:main: has no method before_step"),
        ({"defense": {"rule": "it"}}, "defense.rule.name: fedllm_sec.train:main: cannot be called with (updates, ctx)"),
        (
            {"defense": {"after": ["it"]}},
            "defense.after.0.name: fedllm_sec.train:main: cannot be called with (vector, ctx)",
        ),
    ],
)
def test_a_function_that_is_no_method_is_told_in_a_line(block: Any, words: str):
    """Also where it is one of this package."""
    given = json.loads(json.dumps(block).replace('"it"', '{"name": "fedllm_sec.train:main"}'))
    raw = {**BASE, "enable_attack": "attack" in given, "enable_defense": "defense" in given, **given}
    if "attack" in given:
        raw["attack"] = {"malicious": {"count": 1}, **given["attack"]}
    with pytest.raises(RecipeError) as caught:
        planned(checked(raw))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_or_a_partition_that_is_none_is_told_in_a_line():
    it = {"name": "fedllm_sec.train:main"}
    raw: dict[str, Any] = {"task": "classify", "clients": {"local_steps": 1}}
    with pytest.raises(RecipeError, match=r"fedllm_sec.train:main: cannot be called with \(shape, classes\)"):
        parts.make_model(checked(raw | {"model": it}), (1, 8, 8), 10)
    raw["clients"]["partition"] = it
    with pytest.raises(RecipeError, match=r"fedllm_sec.train:main: cannot be called with \(labels, clients, rng\)"):
        parts.deal(checked(raw), ["a", "b"], np.zeros(9))


def test_what_has_no_signature_is_no_method():
    with pytest.raises(RecipeError, match="does not say which settings it takes"):
        checked(BASE | {"defense": {"rule": {"name": "builtins:int"}}})


@pytest.mark.parametrize(
    ("name", "told"), [("os:getpid", "gives int, no FL method"), ("os.path:join", "cannot be called with ()")]
)
def test_a_function_that_makes_no_fl_method_is_told_in_a_line(name: str, told: str, capsys: pytest.CaptureFixture[str]):
    assert main([recipe(algorithm={"name": name}, enable_defense=False), "--check", "--allow-code"]) == 2
    assert told in capsys.readouterr().err


def test_a_rule_that_gives_back_no_decision_is_told_in_a_line(capsys: pytest.CaptureFixture[str]):
    assert main([recipe(), "--check", "--allow-code"]) == 2
    assert "defense: rule: gave back NoneType, no Decision" in capsys.readouterr().err
