"""Group knowledge transfer on scikit-learn's digits: the loss by hand, the gain, poisoning, resume, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.algorithms.gkt import transfer_loss
from fedllm_sec.build.federation import build, run
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError
from fedllm_sec.rounds import distillation
from fedllm_sec.rounds.compute import Machine

DIGITS: dict[str, Any] = {
    "seed": 2,
    "rounds": 6,
    "task": "classify",
    "model": {"name": "cnn", "hidden": 64},
    "data": {"name": "digits", "train_rows": 500},
    "algorithm": {"name": "fedgkt", "server_epochs": 2},
    "clients": {"total": 4, "local_epochs": 3, "batch_size": 20, "lr": 5e-3, "partition": {"name": "iid"}},
    "evaluate": {"rows": 300, "every": 100},
    "compute": {"threads": 1},
}
FLIPPED = {
    "malicious": {"count": 3},
    "data": [{"name": "label_flip", "mapping": {i: i + 1 for i in range(0, 10, 2)}}],
}


def make(**changes: Any):
    torch.set_num_threads(1)
    raw = {**DIGITS, **changes}
    if "attack" in changes:
        raw["enable_attack"] = True
    return build(checked(raw), Machine(Accelerator(cpu=True)))


def test_the_loss_by_hand():
    logits, y = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([0])  # probabilities 3/4 and 1/4
    assert transfer_loss(logits, y, None, 1.0, 1.0).item() == pytest.approx(math.log(4 / 3))
    taught = torch.tensor([[0.0, 0.0]])  # 1/2 and 1/2: KL = 1/2 log(2/3) + 1/2 log 2
    kl = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert transfer_loss(logits, y, taught, 1.0, 0.5).item() == pytest.approx(math.log(4 / 3) + 0.5 * kl)
    same = transfer_loss(logits, y, logits, 3.0, 1.0)
    assert same.item() == pytest.approx(math.log(4 / 3))


def test_the_servers_model_beats_the_clients_own():
    record = list(run(make(), 6))[-1]
    assert record.quality["accuracy"]["value"] > 0.85
    assert record.quality["accuracy"]["value"] > record.notes["clients_accuracy"] + 0.05
    assert record.kept is None
    assert record.detection is None


def test_poisoned_labels_reach_the_server_through_features():
    clean, flipped = (list(run(make(**change), 4))[-1] for change in ({}, {"attack": FLIPPED}))
    assert len(flipped.malicious) == 3
    assert flipped.quality["accuracy"]["value"] < clean.quality["accuracy"]["value"] - 0.1
    assert 0 <= flipped.attack["asr"]["value"] <= 1  # small: held-out rows go through the honest client's own features


def test_features_that_are_not_finite_are_quarantined():
    attack = {"malicious": {"ids": [1]}, "update": [{"name": "inf_nan"}]}
    fed = make(attack=attack)
    (record,) = run(fed, 1)
    assert "features are not finite" in record.quarantined["c01"]
    assert record.skipped is None
    assert bool(fed.vector.isfinite().all())


def test_one_round_of_huge_features_is_skipped_and_the_honest_go_on_as_before():
    attack = {"malicious": {"ids": [1]}, "stop": 1, "update": [{"name": "byzantine_random", "scale": 1e30}]}
    sgd = {**DIGITS["clients"], "optimizer": "sgd", "lr": 0.2, "max_grad_norm": None}
    fed = make(attack=attack, clients=sgd)
    before = fed.vector.clone()
    rounds = run(fed, 6)
    first = next(rounds)
    assert "server's net is not finite" in first.skipped
    assert first.quarantined == {}
    assert torch.equal(fed.vector, before)
    assert not any("taught" in client.memory for client in fed.clients)
    later = list(rounds)
    assert all(record.skipped is None and not record.quarantined for record in later)
    assert later[-1].quality["accuracy"]["value"] > 0.6


def test_a_client_whose_net_diverges_keeps_the_one_it_had(monkeypatch):
    fed = make(clients={**DIGITS["clients"], "local_epochs": 1})
    rounds = run(fed, 3)
    next(rounds)
    kept = fed.clients[2].memory["net"].clone()
    learn = distillation.learn

    def diverges(given, pupil, client, *rest):
        vector, loss = learn(given, pupil, client, *rest)
        return (vector * float("nan") if client.id == "c02" else vector), loss

    monkeypatch.setattr(distillation, "learn", diverges)
    record = next(rounds)
    assert list(record.quarantined) == ["c02"]
    assert torch.equal(fed.clients[2].memory["net"], kept)
    monkeypatch.setattr(distillation, "learn", learn)
    assert next(rounds).quarantined == {}


def test_a_resumed_run_goes_on_as_the_straight_one():
    attack = {**FLIPPED, "update": [{"name": "gaussian", "scale": 2.0}]}
    changes = {"attack": attack, "clients": {**DIGITS["clients"], "per_round": 3, "local_epochs": 1}}
    straight, first, second = (make(**changes) for _ in range(3))
    list(run(straight, 3))
    list(run(first, 1))
    second.load_state_dict(first.state_dict())
    list(run(second, 3))
    assert torch.equal(straight.vector, second.vector)
    for a, b in zip(straight.clients, second.clients, strict=True):
        assert a.memory.keys() == b.memory.keys()
        assert all(torch.equal(a.memory[key], b.memory[key]) for key in a.memory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"enable_defense": True, "defense": {"rule": {"name": "median"}}}, "no rows that a defense could compare"),
        ({"attack": {"malicious": {"count": 1}, "update": [{"name": "lazy"}]}}, "forges deltas"),
        ({"attack": {"malicious": {"count": 1}, "local": [{"name": "pgd", "radius": 1.0}]}}, "fedgkt sends none"),
        ({"attack": {**FLIPPED, "knowledge": "cohort"}}, "no features but their own"),
        ({"data": {"name": "digits", "crop": 1}}, "cannot change rows"),
        ({"algorithm": {"name": "fedgkt", "temperature": 0.0}}, "temperature > 0"),
        ({"evaluate": {"start": True}}, "no model before the first round"),
    ],
)
def test_what_cannot_act_is_an_error_before_any_data_are_read(changes, words):
    raw = {**DIGITS, "enable_attack": "attack" in changes, **changes}
    with pytest.raises(RecipeError, match=words):
        planned(checked(raw))
