"""Code from outside that raises in a run, or gives back what it must not, is told in a line with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm_sec.train import in_words, main

CODE = """
from dataclasses import replace
import numpy as np
import torch
from fedllm_sec.protocols import Decision

class Data:
    def poison(self, rows, rng): return replace(rows, poisoned=torch.ones(len(rows.y), dtype=torch.bool))
    def probe(self, rows): return rows
    def success(self, said, row): return True
class NoPoison(Data):
    def poison(self, rows, rng): return None
class FewImages(Data):
    def poison(self, rows, rng): return replace(rows, x=rows.x[:3])
class NoProbe(Data):
    def probe(self, rows): return 5
class NoProbeLater(Data):
    calls = 0
    def probe(self, rows):
        self.calls += 1
        return rows if self.calls < 2 else None
class NoGradient:
    def before_step(self, parameters, step, ctx): parameters.grad = None
    def after_step(self, parameters, step, ctx): pass
class NoSuccess:
    def poison(self, rows, rng): return rows
    def probe(self, rows): return rows
class Methodless:
    pass
class OneArgument(Data):
    def poison(self, rows): return rows
class ByPlace(Data):
    def __init__(self, rate): pass
class Local:
    def before_step(self, parameters, step, ctx): {}["late"]
    def after_step(self, parameters, step, ctx): pass
def nothing(view): pass
def nobody(): return None
def update(view): return -view.own if view.round == 1 else {}["late"]
def short(updates, ctx): return Decision(updates.rows.float().mean(0)[:3])
def listed(updates, ctx): return Decision(updates.rows.float().mean(0), weights=[1, 2])
def noted(updates, ctx): return Decision(updates.rows.float().mean(0), notes={"a": "b"})
def after(vector, ctx): return None
def split(labels, clients, rng): return [[10**9]] * clients
def fewer(labels, clients, rng): return [[0]]
def columns(labels, clients, rng): return [np.arange(4)[:, None]] * clients
def table(labels, clients, rng): return {0: [1]}
def leaves(labels, clients, rng): raise SystemExit(0)
class Bare(BaseException): pass
def bare(shape, classes): raise Bare("no Exception")
Data.__call__ = lambda self, view: view.own
anybody = Data()
class Model(torch.nn.Module):
    def __init__(self, shape, classes): super().__init__()
"""
CASES = {
    "NoPoison": ("attack", "data", "attack.data.0: poison gave back NoneType, must give Labelled"),
    "FewImages": ("attack", "data", "attack.data.0: poison gave back 3 inputs, 15 labels and 15 marks"),
    "NoProbe": ("attack", "data", "attack.data.0: probe gave back int, must give Labelled"),
    "NoProbeLater": ("attack", "data", "attack.data.0: probe gave back NoneType, must give Labelled"),
    "NoGradient": ("attack", "local", "NoGradient: before_step took parameters.grad away. Change it in place."),
    "NoSuccess": ("attack", "data", "outside_run:NoSuccess: has no method success"),
    "nobody": (
        "attack",
        "data",
        "nobody: has no method poison, being a function. A data attack is a class with poison(",
    ),
    "Methodless": (
        "attack",
        "local",
        "has no method before_step. A local attack is a class with before_step(parameters",
    ),
    "OneArgument": ("attack", "data", "poison cannot be called with (shard, rng): too many positional arguments."),
    "ByPlace": ("attack", "data", "cannot be made without rate, and a recipe gives keyword-only settings alone."),
    "anybody": ("attack", "update", "is an object of type Data, and what settings it takes is not to be seen."),
    "nothing": ("attack", "update", "attack.update.0: gave back NoneType, must give a tensor of shape (1, 64). Return"),
    "Local": ("attack", "local", "outside_run.py, line 35, in before_step, which the recipe names: KeyError: 'late'"),
    "update": ("attack", "update", "outside_run.py, line 39, in update, which the recipe names: KeyError: 'late'"),
    "short": ("defense", "rule", "short: gave back an update of shape (3,), must be a tensor of shape (64,)"),
    "listed": ("defense", "rule", "listed: gave back weights of type list, must be a tensor of shape (4,)"),
    "noted": ("defense", "rule", "noted: its note a is of type str, no number"),
    "after": ("defense", "after", "after: gave back a vector of type NoneType, must be a tensor of shape (64,)"),
    "split": ("clients", "partition", "partition: client 0 got what is no row's number from 0 to 59"),
    "fewer": ("clients", "partition", "partition: gave 1 parts for 4 clients"),
    "columns": ("clients", "partition", "partition: client 0 got an array of shape (4, 1), must be (rows,)"),
    "table": ("clients", "partition", "partition: gave back dict, must give a list with an array of row numbers"),
    "leaves": ("clients", "partition", "in leaves, which the recipe names: SystemExit: 0. Mend it"),
    "bare": ("model", "", "in bare, which the recipe names: Bare: no Exception. Mend it"),
    "Model": ("model", "", "outside_run:Model: is a class of models, not a function that makes one"),
}
BASE = {
    "task": "classify",
    "rounds": 2,
    "data": {"name": "digits", "train_rows": 60, "test_rows": 20},
    "model": {"name": "logistic"},
    "clients": {"total": 4, "local_steps": 1, "batch_size": 8},
    "enable_attack": True,
    "enable_defense": True,
    "attack": {"malicious": {"count": 1}, "update": [{"name": "byzantine_flip"}]},
    "defense": {"rule": {"name": "mean"}},
    "compute": {"threads": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_code_from_outside_ends_a_run_in_a_line(name: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("outside_run.py").write_text(CODE)
    section, place, words = CASES[name]
    block: object = {"name": f"outside_run:{name}"}
    if section in ("attack", "defense") and place != "rule":
        block = [block]
    Path("r.yaml").write_text(json.dumps({**BASE, section: {**BASE[section], place: block} if place else block}))
    assert main(["r.yaml"]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_a_library_that_fails_is_not_told_as_code_that_the_recipe_names():
    library: dict[str, Any] = {}
    exec(compile("def f(g): g() if g else {}['late']", "/lib/site-packages/some/model.py", "exec"), library)

    def own() -> None:
        library["f"](None)

    for asked, words in (
        (None, "model.py, line 1, in f, in a library that the recipe's model or methods run in"),
        (own, "in own, which the recipe names: KeyError: 'late'. Mend it"),
    ):
        with pytest.raises(KeyError) as caught:
            library["f"](asked)
        assert words in str(in_words(caught.value.with_traceback(caught.tb.tb_next)))
