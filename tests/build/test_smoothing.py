"""What a recipe with noise promises reaches record, summary and page: epsilon, smoothed and certified rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm_sec.build.federation import assemble
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError
from fedllm_sec.train import main
from tests.build.test_explain import machine

UNIFORM = {"name": "mean", "weights": "uniform"}
TINY: dict[str, Any] = {
    "rounds": 3,
    "task": "classify",
    "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 120, "test_rows": 60},
    "clients": {
        "total": 4, "local_steps": 2, "batch_size": 10, "lr": 0.05, "optimizer": "sgd", "max_grad_norm": None,
    },
    "enable_attack": True,
    "attack": {
        "malicious": {"count": 1}, "start": 2, "stop": 2, "data": [{"name": "pixel_trigger", "target": 0, "rate": 0.5}],
    },
    "enable_defense": True,
    "compute": {"threads": 1},
}  # fmt: skip
DP = {
    "before": [{"name": "norm_clipping", "radius": 1.0}],
    "rule": UNIFORM,
    "after": [{"name": "weak_dp", "sigma": 0.5, "absolute": True}],
}
CRFL = {"rule": UNIFORM, "after": [{"name": "crfl", "rho": 3.0, "sigma": 0.02, "copies": 20}]}


@pytest.mark.filterwarnings("ignore:weak_dp", "ignore:crfl")
def test_a_run_that_fulfils_every_condition_prints_an_epsilon_and_crfl_its_certificate(tmp_path, capsys):
    recipe = {**TINY, "output": {"folder": str(tmp_path / "x")}}
    recipe["variants"] = {"dp": {"defense": DP}, "crfl": {"defense": CRFL}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert main([str(tmp_path / "r.yaml")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    page = " ".join((tmp_path / "x" / "report.html").read_text().split())

    # replacing one of 4 rows of length 1 moves the mean by 1/2; noise 1/2: mu = 1 a round, sqrt(3) after three
    rounds = [json.loads(line) for line in (tmp_path / "x/dp/history.jsonl").read_text().splitlines()]
    epsilons = [round["privacy"]["epsilon"] for round in rounds]
    assert epsilons == pytest.approx([4.377, 6.573, 8.385], abs=2e-3)
    summary = json.loads((tmp_path / "x/dp/summary.json").read_text())
    assert summary["privacy"] == rounds[-1]["privacy"]
    for spent in (round["privacy"] for round in rounds):
        assert spent["protects"] == "nobody: the recipe's public seed draws the noise"
    for text in (said, page):
        assert "epsilon 8.39 at delta 1e-05" in text
        assert "so here it protects nobody" in text
    assert "epsilon 4.38 (if the noise were secret)" in said  # the line of round 1

    summary = json.loads((tmp_path / "x/crfl/summary.json").read_text())
    assert summary["privacy"] == {
        "epsilon": None,
        "delta": 1e-5,
        "because": "neither weak_dp nor weak_dp_client adds noise",
    }
    certified = summary["quality"]["certified"]
    assert certified["0"] == summary["quality"]["smoothed_accuracy"]
    assert summary["quality"]["smoothed_accuracy"]["n"] == 60
    rates = [rate["value"] for rate in certified.values()]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0 < float(list(certified)[-1])
    assert set(summary["attack"]) >= {"smoothed_asr", "smoothed_false_trigger"}
    for text in (said, page):
        assert "no epsilon: neither weak_dp nor weak_dp_client adds noise" in text
        assert "certified accuracy, by the size of a backdoor" in text


def smoothing_of(**changes: Any) -> Any:
    return assemble(planned(checked({**TINY, "defense": CRFL, **changes})), machine()).smoothing


def test_the_noise_of_the_smoothed_test_is_that_of_the_last_round():
    grown = {"rule": UNIFORM, "after": [{"name": "crfl", "rho": 3.0, "growth": 1.0, "noise": 0.1}]}
    assert smoothing_of(defense=grown).sigma == pytest.approx(0.1 * 6.0 / 650**0.5)  # rho_3 = 6, d = 650
    assert smoothing_of(defense=grown).copies == 50
    assert smoothing_of(defense={"rule": UNIFORM, "after": [{**CRFL["after"][0], "copies": 0}]}) is None
    assert smoothing_of(defense=DP) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {"name": "lenet"}}, "no Lipschitz constant is known for the loss gradient of lenet"),
        ({"attack": {**TINY["attack"], "stop": 3}}, "attackers who act in one round"),
        ({"enable_attack": False}, "nobody attacks"),
        ({"attack": {**TINY["attack"], "update": [{"name": "model_replacement"}]}}, "about poisoned data"),
        ({"clients": {**TINY["clients"], "optimizer": "adamw"}}, "plain local SGD"),
        ({"algorithm": {"name": "fedavg", "server_lr": 0.5}}, "a server that adds the mean"),
        ({"defense": {**CRFL, "rule": {"name": "krum", "f": 0}}}, "a mean with equal weights"),
        ({"defense": {**CRFL, "after": [{**CRFL["after"][0], "sigma": 0.0}]}}, "there is no noise"),
    ],
)
def test_a_radius_is_told_only_where_the_theorem_holds(changes: dict[str, Any], why: str):
    assert smoothing_of().radius is not None
    made = smoothing_of(**changes)
    assert made.radius is None
    assert why in made.why


def test_copies_that_cannot_vote_are_an_error(tmp_path: Path):
    (tmp_path / "t.txt").write_text(" ".join(f"abcd{k * k}" for k in range(250)))
    text = {
        **TINY, "task": "next_char", "model": {"name": "lstm"}, "enable_attack": False, "attack": None,
        "data": {"name": str(tmp_path / "t.txt"), "length": 10}, "defense": CRFL,
    }  # fmt: skip
    with pytest.raises(RecipeError, match="copies vote where classes are told apart, which task: next_char does not"):
        assemble(planned(checked(text)), machine())
