"""scaffold and feddyn end at the optimum of the mean that the rule stands for, whoever takes part or is turned down."""

from __future__ import annotations

import functools

import pytest
import torch

from fedllm_sec.algorithms import feddyn, scaffold
from fedllm_sec.algorithms.taken import taken
from fedllm_sec.defenses.before import norm_clipping
from fedllm_sec.defenses.claims import client_shares
from fedllm_sec.defenses.columns import mean
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.errors import DefenseError
from fedllm_sec.protocols import Decision
from fedllm_sec.rounds.federation import Federation, run
from tests.algorithms.bowls import bowl, federate, sgd

# curvature 1, 1, 2, 3 and targets 0, 3, 2, -2: sum a t = 1, sum a = 7; the first client has three times the rows
SHARDS = [bowl([1.0], [0.0], 30), bowl([1.0], [3.0], 10), bowl([2.0], [2.0], 10), bowl([3.0], [-2.0], 10)]
UNIFORM = 1 / 7
COUNTS = (3 * 0 + 3 + 4 - 6) / (3 * 1 + 1 + 2 + 3)  # 1 / 9
METHODS = {"scaffold": scaffold, "feddyn": lambda: feddyn(alpha=1.0)}


def end(federation: Federation, rounds: int) -> float:
    for _ in run(federation, rounds):
        pass
    return federation.vector.item()


@pytest.mark.parametrize(("per_round", "seed"), [(4, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize(("weights", "best"), [("uniform", UNIFORM), ("counts", COUNTS)])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_ends_at_the_optimum_in_both_weightings_full_and_partial(name, weights, best, per_round, seed):
    fed = federate(SHARDS, METHODS[name](), sgd(3, 0.3), per_round=per_round, weights=weights)
    fed.seed = seed
    assert end(fed, 100) == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_with_the_cap_biting_in_some_cohorts_only_it_is_the_optimum_of_the_counts_capped_once(name):
    # 90 rows are cut to 3 * 10 among all clients; in a cohort of 90 and 10 rows the median is 50 and nothing is cut
    shards = [bowl([1.0], [0.0], 90), *SHARDS[1:]]
    for seed in (0, 1):
        fed = federate(shards, METHODS[name](), sgd(3, 0.3), per_round=2)
        fed.seed = seed
        assert end(fed, 150) == pytest.approx(COUNTS, abs=1e-3)


@pytest.mark.parametrize("rule", ["multi_krum", "geometric_median", "norm_clipped"])
@pytest.mark.parametrize("name", METHODS)
def test_whatever_a_defense_weighs_the_server_remembers_the_mean_of_what_clients_do(name, rule):
    shards = [bowl([0.1 * i, 1.0], [float(i), -float(i)], 3 * i) for i in range(1, 7)]
    settings = {"multi_krum": {"f": 1}, "norm_clipped": {"weights": "uniform"}}.get(rule, {})
    fed = federate(shards, METHODS[name](), sgd(3), rule.replace("norm_clipped", "mean"), per_round=5, **settings)
    if rule == "norm_clipped":
        fed.defense = Pipeline([norm_clipping], fed.defense.rule)
    key, server = {"scaffold": ("control", "c"), "feddyn": ("gradient", "h")}[name]
    for _ in run(fed, 12):
        known = [c.memory.get(key, torch.zeros(2)) for c in fed.clients]
        ours = getattr(fed.algorithm.server, server)
        torch.testing.assert_close(ours, torch.stack(known).mean(0), atol=1e-5, rtol=1e-5)


def test_what_is_taken_by_hand():
    quarter = torch.full((2,), 0.25).double()  # two of four clients
    plain = taken(torch.tensor([0.5, 0.5]).double(), quarter)
    assert (plain.parts.tolist(), plain.share, plain.weight) == ([1.0, 1.0], 0.5, 1.0)
    counts = taken(torch.tensor([0.75, 0.25]).double(), torch.tensor([3 / 6, 1 / 6]).double())
    assert counts.parts.tolist() == pytest.approx([1.0, 1.0])
    assert counts.share == pytest.approx(4 / 6)  # n_S / n
    rejected = taken(torch.tensor([1.0, 0.0]).double(), quarter)
    assert (rejected.parts.tolist(), rejected.share) == ([1.0, 0.0], 0.25)
    clipped = taken(torch.tensor([0.5, 0.25]).double(), quarter)
    assert (clipped.parts.tolist(), clipped.share, clipped.weight) == ([1.0, 0.5], 0.5, 0.75)
    for unsaid in (None, torch.tensor([1.5, -0.5]).double()):
        known = taken(unsaid, quarter)
        assert (known.parts.tolist(), known.share, known.weight) == ([1.0, 1.0], 0.5, 1.0)
    nothing = taken(torch.zeros(2).double(), quarter)
    assert (nothing.parts.tolist(), nothing.share) == ([0.0, 0.0], 0.0)


def test_a_clients_share_is_by_capped_counts_where_the_rule_weighs_so():
    counts = {"a": 900.0, "b": 10.0, "c": 20.0}
    assert client_shares(functools.partial(mean, weights="uniform"), counts, ["c", "a"]).tolist() == [1 / 3, 1 / 3]
    assert client_shares(mean, counts, ["c", "a"]).tolist() == [20 / 90, 60 / 90]  # 900 counts as 3 * 20
    assert client_shares(functools.partial(mean, cap=1.0), counts, ["a"]).tolist() == [20 / 50]
    assert client_shares(lambda updates, ctx: None, counts, ["b"]).tolist() == [1 / 3]


# ---------------------------------------------------------------- rounds that come to nothing


class Refusing:
    """The uniform mean, which in some rounds keeps nobody."""

    def __init__(self, rounds: range) -> None:
        self.rounds = rounds

    def __call__(self, updates, ctx):
        return Decision.keep(updates, torch.full((updates.n,), ctx.round not in self.rounds))


def one_bad_row(rounds: range):
    """An attacker whose row is not finite in these rounds, and who is like everyone else in all others."""

    def attack(view):
        return torch.full_like(view.own, float("nan")) if view.round in rounds else view.own

    return attack


@pytest.mark.parametrize("name", METHODS)
def test_ten_rounds_without_a_kept_row_change_nothing(name):
    fed = federate(SHARDS, METHODS[name](), sgd(3, 0.3), weights="uniform")
    fed.defense.rule = Refusing(range(5, 15))
    records = list(run(fed, 60))
    assert [r.round for r in records if r.skipped == "the rule kept nobody"] == list(range(5, 15))
    assert records[4].kept == []
    assert all(r.update_norm == 0 for r in records[4:14])
    assert fed.vector.item() == pytest.approx(UNIFORM, abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_one_skipped_round_changes_nothing(name):
    class NeedsFour(Refusing):
        def __call__(self, updates, ctx):
            if updates.n < 4:
                raise DefenseError("needs n >= 4 clients")
            return super().__call__(updates, ctx)

    fed = federate(SHARDS, METHODS[name](), sgd(3, 0.3), attack=one_bad_row(range(5, 6)), weights="uniform")
    fed.defense.rule = NeedsFour(range(0))
    records = list(run(fed, 50))
    assert [r.round for r in records if r.skipped is not None] == [5]
    assert fed.vector.item() == pytest.approx(UNIFORM, abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_client_whose_forged_row_is_quarantined_remembers_nothing_of_it(name):
    fed = federate(SHARDS, METHODS[name](), sgd(3, 0.3), attack=one_bad_row(range(3, 7)), weights="uniform")
    memory = []
    for record in run(fed, 50):
        memory.append(dict(fed.clients[0].memory))
        assert (list(record.quarantined) == ["c0"]) == (record.round in range(3, 7))
    assert all(torch.equal(memory[1][key], memory[5][key]) for key in memory[1])
    assert fed.vector.item() == pytest.approx(UNIFORM, abs=1e-4)
