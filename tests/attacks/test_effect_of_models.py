"""Rules and attacks that know layers and representations, in runs on digits: 12 iid clients, 3 malicious."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.build.federation import build
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import checked
from fedllm_sec.errors import FedError
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run

LOADED = Loaded()
DIGITS: dict[str, Any] = {
    "seed": 1,
    "rounds": 8,
    "task": "classify",
    "model": {"name": f"{__name__}:two_layers"},
    "data": {"name": "digits", "train_rows": 1200},
    "clients": {"total": 12, "local_epochs": 4, "batch_size": 20, "lr": 5e-3, "partition": {"name": "iid"}},
    "evaluate": {"every": 99},
    "compute": {"threads": 1},
    "attack": {"malicious": {"count": 3}, "start": 4},
}
PATCH = {"name": "pixel_trigger", "target": 0, "size": 2}
SCALED = [{"name": "model_replacement"}]


def two_layers(shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """64 pixels, 64 neurons, the classes."""
    nn = torch.nn
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2] * shape[0], 64), nn.ReLU(), nn.Linear(64, classes))


def made(rule: dict[str, Any] | None = None, **changes: Any) -> Federation:
    raw = recipes.merge({**DIGITS, "enable_attack": True}, changes)
    if rule is not None:
        raw |= {"enable_defense": True, "defense": {"rule": rule, "root_rows": 200}}
    federation = build(checked(raw), Machine(Accelerator(cpu=True)), LOADED)
    assert isinstance(federation, Federation)
    return federation


def last_round(rule: dict[str, Any] | None = None, **changes: Any) -> RoundRecord:
    """The last round's record."""
    rounds = int(changes.get("rounds", DIGITS["rounds"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *_, last = run(made(rule, **changes), rounds)
    return last


@functools.cache
def hurt() -> RoundRecord:
    return last_round(attack={"data": [PATCH], "update": SCALED})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "logistic"}}, "is the same for every vector"),
        ({"defense": {"rule": {"name": "flare"}}}, "needs two clean rows or more on the server"),
        ({"task": "nas", "model": {"name": "darts"}}, "needs the server's model"),
    ],
)
def test_what_flare_cannot_work_with_is_an_error_before_training(changes, words):
    raw = {**DIGITS, "enable_defense": True, "defense": {"rule": {"name": "flare"}, "root_rows": 20}, **changes}
    del raw["attack"]
    with pytest.raises(FedError, match=words):
        build(checked(raw), Machine(Accelerator(cpu=True)), LOADED)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "logistic"}}, "chameleon: the model is one linear layer"),
        ({"attack": DIGITS["attack"] | {"local": [{"name": "chameleon"}]}}, "chameleon acts on poisoned rows"),
    ],
)
def test_what_chameleon_cannot_work_with_is_an_error_before_training(changes, words):
    attack = DIGITS["attack"] | {"data": [PATCH], "local": [{"name": "chameleon"}]}
    with pytest.raises(FedError, match=words):
        build(checked({**DIGITS, "enable_attack": True, "attack": attack, **changes}), Machine(Accelerator(cpu=True)))


@pytest.mark.slow
def test_a_backdoor_by_contrast_takes_hold_and_multi_krum_removes_it():
    attack = {"attack": {"data": [PATCH], "local": [{"name": "chameleon"}], "update": SCALED}, "rounds": 6}
    assert last_round(**attack).attack["asr"]["value"] >= 0.6
    held = last_round({"name": "multi_krum", "f": 3}, **attack)
    assert held.attack["asr"]["value"] <= 0.05
    assert held.detection["tpr"] == 1.0


@pytest.mark.slow
def test_a_backdoor_by_turned_signs_takes_hold_and_multi_krum_removes_it():
    attack = {"data": [PATCH], "local": [{"name": "f3ba", "share": 0.1}], "update": SCALED, "start": 3}
    settings = {"attack": attack, "rounds": 6, "clients": {"local_epochs": 3}}
    assert last_round(**settings).attack["asr"]["value"] >= 0.8
    held = last_round({"name": "multi_krum", "f": 3}, **settings)
    assert held.attack["asr"]["value"] <= 0.05
    assert held.detection["tpr"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "most"), [("rflbat", 0.05), ("flare", 0.4)])
def test_a_scaled_backdoor_takes_hold_and_rflbat_and_flare_find_it(rule, most):
    held = last_round({"name": rule}, attack={"data": [PATCH], "update": SCALED})
    assert hurt().attack["asr"]["value"] >= 0.8
    assert held.attack["asr"]["value"] <= most
    assert held.quality["accuracy"]["value"] >= 0.9
    assert held.detection["auc"] >= 0.9
