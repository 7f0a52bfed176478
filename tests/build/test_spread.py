"""Poisoned rows on honest clients: nobody is malicious, the backdoor is measured, detection is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.explain import threat as explained
from fedllm_sec.build.federation import build
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.deploy.problems import deploy_problems
from fedllm_sec.errors import RecipeError
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import run

PATCH = {"name": "pixel_trigger", "target": 0, "rate": 0.1}


def raw(**attack: Any) -> dict[str, Any]:
    return {
        "task": "classify",
        "rounds": 2,
        "model": {"name": "logistic"},
        "data": {"name": "digits", "train_rows": 300, "test_rows": 60},
        "clients": {"total": 6, "local_steps": 2, "batch_size": 16, "lr": 0.05},
        "enable_attack": True,
        "attack": {"spread": {"clients": 0.5}, "data": [PATCH], **attack},
        "enable_defense": True,
        "defense": {"rule": {"name": "multi_krum", "f": 1}},
    }


def test_a_tenth_of_the_rows_of_half_the_clients_is_poisoned_and_nobody_is_malicious():
    torch.set_num_threads(1)
    federation = build(checked(raw()), Machine(Accelerator(cpu=True)))
    held = {client.id: int(client.shard.poisoned.sum()) for client in federation.clients}
    assert sorted(held.values()) == [0, 0, 0, 5, 5, 5]  # of 50 rows each
    threat = federation.threat
    assert isinstance(threat, Threat)
    assert threat.spread == {id for id, count in held.items() if count}
    assert (threat.malicious, threat.poisoned, threat.attackers(1)) == (frozenset(), {}, frozenset())
    assert federation.facts["poisoned_share"]["attack.data.0"] == dict.fromkeys(sorted(threat.spread), 0.1)
    *_, last = run(federation, 2)
    assert (last.malicious, last.attacking) == ([], False)
    assert last.attack["asr"]["value"] is not None
    assert last.detection["tpr"] is None
    assert last.detection["auc"] is None
    assert (last.robustness, last.stealth) == (None, None)


def test_explain_says_that_no_client_attacks_and_who_holds_poisoned_rows():
    said = "\n".join(explained(planned(checked(raw(spread={"clients": 1.0})))))
    assert "no client: rows of all 6 clients were poisoned before they got them" in said
    assert "clients c00, c01, c02, c03, c04, c05" in said


@pytest.mark.parametrize(
    ("attack", "place"),
    [
        ({"malicious": {"count": 1}}, r"attack\.malicious: beside attack\.spread"),
        ({"update": [{"name": "byzantine_flip"}]}, r"attack\.update: beside attack\.spread"),
        ({"local": [{"name": "neurotoxin"}]}, r"attack\.local: beside"),
        ({"start": 2}, r"attack\.start: beside"),
        ({"knowledge": "cohort"}, r"attack\.knowledge: beside"),
        ({"data": []}, r"attack\.spread: no method under attack\.data"),
        ({"data": [{"name": "a3fl", "target": 0}]}, r"a3fl learns its trigger when a round of an attacker begins"),
        ({"spread": {"clients": 0.0}}, r"attack\.spread\.clients: 0\.0"),
    ],
)
def test_what_cannot_act_beside_poisoned_rows_is_refused_before_training(attack, place):
    with pytest.raises(RecipeError, match=place):
        planned(checked(raw(**attack)))


def test_a_deployment_refuses_to_spread_rows_it_does_not_hold():
    assert "attack.spread: poisons rows before clients get them" in "\n".join(deploy_problems(checked(raw())))
