"""Who attacks, when, and whether attackers act together: all of it said by the recipe and drawn by the seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.attacks.threat import Threat
from fedllm_sec.attacks.update.riders import Mimic
from fedllm_sec.build.federation import build
from fedllm_sec.build.loaded import poison_key
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import ThreatView
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import run

IDS = [f"c{i}" for i in range(10)]
DIGITS: dict[str, Any] = {
    "seed": 1,
    "rounds": 4,
    "task": "classify",
    "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 200},
    "clients": {"total": 10, "per_round": 5, "local_steps": 1, "batch_size": 20, "lr": 1e-2},
    "enable_attack": True,
    "compute": {"threads": 1},
}
TRIGGER = {"name": "pixel_trigger", "target": 0}


def recipe(attack: dict[str, Any], **changes: Any) -> Any:
    return checked({**DIGITS, "attack": attack, **changes})


def problems(attack: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        planned(recipe(attack, **changes))
    return str(caught.value)


def drawn(**settings: Any) -> Threat:
    return Threat(malicious=frozenset(IDS), seed=0, **settings)


# ---------------------------------------------------------------- who


def test_attackers_are_the_same_in_every_round_unless_they_are_redrawn():
    fixed, anew = Threat(malicious=frozenset({"c1"}), seed=0), drawn(redrawn=3)
    assert {fixed.who(r) for r in range(1, 9)} == {frozenset({"c1"})}
    sets = [anew.who(r) for r in range(1, 9)]
    assert {len(s) for s in sets} == {3}
    assert len(set(sets)) > 4
    assert sets == [drawn(redrawn=3).who(r) for r in range(1, 9)]


def test_only_clients_that_attack_in_some_round_own_poisoned_data_and_they_use_it_only_then():
    federation = build(
        recipe({"malicious": {"count": 2, "redraw": True}, "data": [TRIGGER]}), Machine(Accelerator(cpu=True))
    )
    threat = federation.threat
    records = list(run(federation, 4))
    seen = {id for record in records for id in record.malicious}
    assert set(threat.poisoned) == seen
    assert 2 <= len(seen) < 10
    for client in federation.clients:
        for r in range(1, 5):
            dressed = threat.dress(client, r)
            poisoned = bool(dressed.shard.poisoned.any())
            assert poisoned == (client.id in threat.who(r) and client.id in seen)
    for record in records:
        assert record.malicious == [id for id in record.cohort if id in threat.who(record.round)]


def test_redrawing_what_is_named_is_an_error():
    with pytest.raises(RecipeError, match=r"attack\.malicious: ids names the attackers, redraw draws them"):
        recipe({"malicious": {"ids": [1], "redraw": True}, "data": [TRIGGER]})


def test_poisoned_shards_kept_for_later_runs_depend_on_the_rounds_where_these_say_who_attacks():
    one = {"malicious": {"count": 2, "redraw": True}, "data": [TRIGGER]}
    assert poison_key(recipe(one)) != poison_key(recipe({**one, "start": 2}))
    fixed = {"malicious": {"count": 2}, "data": [TRIGGER]}
    assert poison_key(recipe(fixed)) != poison_key(recipe({**fixed, "start": 2}))  # 5 of 10 take part in a round
    everybody = {"clients": {**DIGITS["clients"], "per_round": None}}
    assert poison_key(recipe(fixed, **everybody)) == poison_key(recipe({**fixed, "start": 2}, **everybody))


# ---------------------------------------------------------------- when


def test_attackers_attack_in_the_share_of_rounds_that_is_their_probability():
    threat = drawn(probability=0.3, start=11)
    active = [threat.active(r) for r in range(1, 1011)]
    assert not any(active[:10])
    assert 240 < sum(active[10:]) < 360
    assert active == [drawn(probability=0.3, start=11).active(r) for r in range(1, 1011)]
    assert all(drawn(probability=1.0).active(r) for r in range(1, 50))


def test_probability_thins_out_every_kth_round():
    threat = drawn(probability=0.5, every=2)
    assert {r % 2 for r in range(1, 200) if threat.active(r)} == {1}


@pytest.mark.parametrize("value", [0.0, 1.1])
def test_a_probability_is_above_zero_and_at_most_one(value):
    with pytest.raises(RecipeError, match=r"attack\.probability"):
        recipe({"malicious": {"count": 2}, "data": [TRIGGER], "probability": value})


def test_an_attack_that_would_never_happen_is_an_error_before_training():
    rare = {"malicious": {"count": 2}, "data": [TRIGGER], "probability": 1e-6}
    assert "0 of 4 rounds are rounds of the attack" in problems(rare)
    absent = problems(
        {"malicious": {"ids": [0]}, "data": [TRIGGER], "stop": 1}, clients={**DIGITS["clients"], "per_round": 1}
    )
    assert "1 of 4 rounds are rounds of the attack, and no malicious client takes part" in absent


# ---------------------------------------------------------------- together or alone


def updates() -> UpdateMatrix:
    """Row i is (i, 1)."""
    return UpdateMatrix.of(torch.tensor([[float(i), 1.0] for i in range(4)]), ids=["c0", "c1", "c2", "c3"])


def forge(threat: Threat, r: int = 1):
    return threat.forge(updates(), vector=torch.zeros(2), last_update=None, round=r, defense=None)


def looking(seen: list[ThreatView]):
    def look(view: ThreatView) -> torch.Tensor:
        seen.append(view)
        return view.own * 10 + torch.rand(view.own.shape, generator=view.rng)

    return look


def test_colluders_forge_once_for_all_rows():
    seen: list[ThreatView] = []
    threat = Threat(malicious=frozenset({"c0", "c2"}), seed=0, knowledge="cohort", update=[looking(seen)])
    places, rows = forge(threat)
    assert places == [0, 2]
    assert [view.own_ids for view in seen] == [("c0", "c2")]
    assert seen[0].other_ids == ("c1", "c3")
    assert (rows[:, 0] // 10).tolist() == [0.0, 2.0]


def test_who_does_not_collude_forges_alone_and_takes_the_other_attackers_for_clients_like_any_other():
    seen: list[ThreatView] = []
    threat = Threat(
        malicious=frozenset({"c0", "c2"}), seed=0, knowledge="cohort", update=[looking(seen)], collude=False
    )
    places, rows = forge(threat)
    assert places == [0, 2]
    assert [view.own_ids for view in seen] == [("c0",), ("c2",)]
    assert seen[1].other_ids == ("c0", "c1", "c3")
    assert seen[1].others.tolist() == [[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]]  # as trained, not as forged
    assert [view.cohort_size for view in seen] == [4, 4]
    assert (rows[:, 0] // 10).tolist() == [0.0, 2.0]
    assert rows[0, 1] != rows[1, 1]  # each draws for itself


def test_alone_under_knowledge_own_an_attacker_sees_nothing_but_its_row():
    seen: list[ThreatView] = []
    threat = Threat(malicious=frozenset({"c0", "c2"}), seed=0, update=[looking(seen)], collude=False)
    forge(threat)
    assert [view.others for view in seen] == [None, None]
    assert [view.own.tolist() for view in seen] == [[[0.0, 1.0]], [[2.0, 1.0]]]


def test_lone_attackers_remember_each_for_itself_and_a_resumed_run_goes_on_exactly():
    def make() -> Threat:
        return Threat(
            malicious=frozenset({"c0", "c2"}), seed=0, knowledge="cohort", update=[Mimic(warmup=2)], collude=False
        )

    straight, stopped, resumed = make(), make(), make()
    for threat in (straight, stopped):
        forge(threat, 1)
    assert straight.alone["c0"][0].rounds == 1
    assert set(straight.alone["c0"][0].totals) == {"c1", "c2", "c3"}
    resumed.load_state_dict(stopped.state_dict())
    assert torch.equal(forge(straight, 2)[1], forge(resumed, 2)[1])
    assert resumed.alone["c2"][0].totals == straight.alone["c2"][0].totals


def test_what_needs_an_agreement_is_refused_where_attackers_do_not_collude():
    text = problems(
        {
            "malicious": {"count": 3},
            "collude": False,
            "data": [{"name": "dba", "target": 1}],
            "update": [{"name": "alie", "partial": True}],
        }
    )
    assert "attack.data.0: dba splits one trigger over attackers, who must agree" in text
    assert "attack.update.0.partial: alie" in text


def test_lone_attackers_scale_as_if_each_were_the_only_one():
    def norms(collude: bool) -> list[float]:
        attack = {"malicious": {"ids": [0, 1]}, "update": [{"name": "model_replacement"}], "collude": collude}
        federation = build(
            recipe(attack, clients={**DIGITS["clients"], "per_round": None}), Machine(Accelerator(cpu=True))
        )
        (record,) = run(federation, 1)
        return [record.norms["c00"], record.norms["c01"]]

    together, alone = norms(True), norms(False)
    assert alone == pytest.approx([2 * n for n in together])  # n / 1 instead of n / 2
