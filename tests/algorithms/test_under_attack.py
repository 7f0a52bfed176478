"""Every FL method with attack and defense on: the defense helps, state is defended, and runs resume exactly."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fedllm_sec.algorithms import MENU, fednova
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.errors import DefenseError
from fedllm_sec.protocols import Algorithm, Client, Decision, LocalTraining
from fedllm_sec.rounds.federation import run
from tests.algorithms.bowls import bowl, federate, optimum, sgd

METHODS = [name for name in MENU if name != "fedgkt"]
SETTINGS = {"fedopt": {"server_lr": 0.5}, "feddyn": {"alpha": 0.3}}
SHARDS = [bowl([1.0, 0.5 + 0.1 * i], [4.0 + 0.1 * i, -2.0]) for i in range(7)]


def make(name: str) -> Algorithm:
    return MENU[name].make(**SETTINGS.get(name, {}))


def training(name: str) -> LocalTraining:
    return sgd(1, 0.5) if name == "fedsgd" else sgd(4)


def far(view):
    return -20 * view.own


def farther(view):
    return -40 * view.own


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_under_attack_and_the_defense_repairs_it(name):
    best, distance = optimum(SHARDS), {}
    for case, attack, rule, settings in (
        ("clean", None, "mean", {}), ("attacked", far, "mean", {}), ("defended", far, "multi_krum", {"f": 1}),
    ):  # fmt: skip
        fed = federate(SHARDS, make(name), training(name), rule, attack, **settings)
        records = list(run(fed, 30))
        assert all(r.skipped is None or case == "attacked" for r in records)
        distance[case] = float((fed.vector - best).norm())
    assert distance["clean"] < 0.5
    assert distance["defended"] < 0.5
    assert not distance["attacked"] < 3  # far away, or not a number any more


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_goes_on_as_the_straight_one(name):
    def fresh():
        fed = federate(SHARDS, make(name), training(name), "multi_krum", far, per_round=5, f=1)
        return replace(fed, root=Client("server", SHARDS[3]))

    straight = fresh()
    list(run(straight, 6))
    first, second = fresh(), fresh()
    list(run(first, 3))
    second.load_state_dict(first.state_dict())
    list(run(second, 6))
    assert torch.equal(straight.vector, second.vector)
    old, new = straight.state_dict(), second.state_dict()
    assert old["memory"].keys() == new["memory"].keys()
    for id, memory in old["memory"].items():
        assert all(torch.equal(value, new["memory"][id][key]) for key, value in memory.items())
    if make(name).remember is not None:
        assert "server" in old["memory"]  # the server's own update is trained as the clients' are


@pytest.mark.parametrize("name", METHODS)
def test_a_rejected_row_leaves_no_trace_in_the_servers_state(name):
    ends = []
    for attack in (far, farther):
        fed = federate(SHARDS, make(name), training(name), "multi_krum", attack, f=1)
        records = list(run(fed, 5))
        assert all("c0" not in r.kept for r in records)
        ends.append(fed)
    assert torch.equal(ends[0].vector, ends[1].vector)
    states = [fed.state_dict().get("server", {}) for fed in ends]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class Moody:
    """The uniform mean; `mood` says whether it keeps nobody, or cannot do its work, in this round."""

    mood = "fine"

    def __call__(self, updates, ctx):
        if self.mood == "stuck":
            raise DefenseError("too few rows")
        return Decision.keep(updates, torch.full((updates.n,), self.mood != "nobody"))


@pytest.mark.parametrize("mood", ["nobody", "stuck", "stuck after the step"])
@pytest.mark.parametrize("name", METHODS)
def test_a_round_that_comes_to_nothing_leaves_vector_and_servers_and_clients_memory_as_they_were(name, mood):
    def forge(view):
        return torch.full_like(view.own, float("nan")) if rule.mood != "fine" else view.own

    def after(vector, ctx):
        if rule.mood == "stuck after the step":
            raise DefenseError("too long a vector")
        return vector

    rule = Moody()
    fed = federate(SHARDS, make(name), training(name), attack=forge)
    fed = replace(fed, defense=Pipeline([], rule, [after]), root=Client("server", SHARDS[3]))
    rounds = run(fed, 4)
    next(rounds), next(rounds)
    old = copy.deepcopy(fed.state_dict())
    rule.mood = mood
    record = next(rounds)
    assert record.skipped in ("the rule kept nobody", "too few rows", "too long a vector")
    assert list(record.quarantined) == ["c0"]
    new = fed.state_dict()
    assert torch.equal(new["vector"], old["vector"])
    assert new.get("server", {}).keys() == old.get("server", {}).keys()
    assert all(torch.equal(new["server"][key], value) for key, value in old.get("server", {}).items())
    assert new["memory"].keys() == old["memory"].keys()
    for id, memory in old["memory"].items():
        assert all(torch.equal(value, new["memory"][id][key]) for key, value in memory.items())
    rule.mood = "fine"
    assert next(rounds).update_norm > 0


def test_a_step_claim_of_a_rejected_client_does_not_stretch_fednovas_step(monkeypatch):
    ends = []
    for claim in (4, 40):
        fed = federate(SHARDS, fednova(), sgd(4), "multi_krum", far, f=1)
        collect = fed.machine.collect

        def lying(*given, collect=collect, claim=claim):
            rows, claims, beside = collect(*given)
            claims[0, 1] = claim
            return rows, claims, beside

        monkeypatch.setattr(fed.machine, "collect", lying)
        (record,) = run(fed, 1)
        assert "c0" not in record.kept
        ends.append(fed.vector)
    assert torch.equal(*ends)


def test_a_client_that_diverges_is_quarantined_and_remembers_nothing_of_it():
    shards = [*SHARDS[:4], bowl([1e30, 1e30], [1.0, 1.0])]
    fed = federate(shards, make("scaffold"), sgd(4))
    (record,) = run(fed, 1)
    assert list(record.quarantined) == ["c4"]
    assert [bool(c.memory) for c in fed.clients] == [True, True, True, True, False]
    assert bool(fed.vector.isfinite().all())
