"""Training and evaluation mode, with models that have dropout: a run is the same whatever ran before it in the process.

Each phase sets the mode that it needs, so the first round trains like every other one.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.build.federation import build, run
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import checked
from fedllm_sec.records.history import record_line
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.distillation import evaluate
from tests.conftest import SMALL
from tests.rounds import dropnets

DIGITS: dict[str, Any] = {
    "seed": 1,
    "rounds": 3,
    "data": {"name": "digits", "train_rows": 60, "test_rows": 30},
    "clients": {"total": 2, "local_steps": 2, "batch_size": 8, "lr": 1e-2, "partition": {"name": "iid"}},
    "enable_attack": True,
    "attack": {"malicious": {"ids": [0]}, "update": [{"name": "byzantine_flip"}]},
    "compute": {"threads": 1},
}
NETS = "tests.rounds.dropnets"
SMALL_TASKS: dict[str, dict[str, Any]] = {
    "classify": {"task": "classify", "model": {"name": f"{NETS}:classify"}},
    "gan": {"task": "gan", "model": {"name": f"{NETS}:gan"}, "evaluate": {"samples": 100}},
    "nas": {"task": "nas", "model": {"name": f"{NETS}:nas"}},
    "fedgkt": {
        "task": "classify",
        "model": {"name": f"{NETS}:classify"},
        "algorithm": {"name": "fedgkt", "channels": 4},
        "attack": {"malicious": {"ids": [0]}, "update": [{"name": "gaussian"}]},
    },
}
NAMES = [*SMALL_TASKS, "next_char", "causal_lm"]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """A raw recipe of each task, whose model has dropout."""
    play = tmp_path_factory.mktemp("modes") / "play.txt"
    play.write_text("".join(f"to be or not to be that is question {k * k}\n" for k in range(12)))
    found = {name: {**DIGITS, **changes} for name, changes in SMALL_TASKS.items()}
    found["next_char"] = {
        **DIGITS,
        "task": "next_char",
        "model": {"name": "lstm", "hidden": 8, "layers": 2, "dropout": 0.5},
        "data": {"name": str(play), "length": 10, "test_share": 0.2},
    }
    folder = dropnets.gpt2(tmp_path_factory.mktemp("gpt2"))
    found["causal_lm"] = {
        **SMALL,
        "rounds": 3,
        "model": {"name": folder, "gradient_checkpointing": True, "lora": {"r": 2, "target_modules": ["c_attn"]}},
        "clients": {**SMALL["clients"], "total": 2},
        "attack": DIGITS["attack"],
        "enable_defense": False,
        "evaluate": {**SMALL["evaluate"], "every": 2},
    }
    return found


def play(raw: dict[str, Any], loaded: Loaded, state: dict | None = None, rounds: int = 3) -> tuple[list[str], Any]:
    """The record's lines of a run of three rounds that is stopped after so many, and the federation as it stands."""
    torch.set_num_threads(1)
    federation = build(checked(raw), Machine(Accelerator(cpu=True)), loaded)
    if state is not None:
        federation.load_state_dict(state)
    return [record_line(record) for record in itertools.islice(run(federation, 3), rounds)], federation


@pytest.mark.parametrize("name", NAMES)
def test_equal_variants_are_equal_in_every_order_after_a_stop_and_where_the_start_is_measured(name, recipes):
    attacked = recipes[name]
    clean = {**attacked, "enable_attack": False}
    shared, other = Loaded(), Loaded()
    first = [play(raw, shared) for raw in (clean, attacked, clean)]
    second = [play(raw, other) for raw in (attacked, clean)]
    assert first[0][0] == first[2][0] == second[1][0]
    assert first[1][0] == second[0][0]
    assert torch.equal(first[0][1].vector, second[1][1].vector)
    assert torch.equal(first[1][1].vector, second[0][1].vector)
    assert not torch.equal(first[0][1].vector, first[1][1].vector)

    start = name != "fedgkt"  # which has no model before the first round
    measured = {**attacked, "evaluate": {**attacked.get("evaluate", {}), "start": start}}
    lines, stopped = play(measured, Loaded(), rounds=1 + start)
    later, resumed = play(measured, Loaded(), stopped.state_dict())
    assert [*lines, *later][start:] == first[1][0]
    assert torch.equal(resumed.vector, first[1][1].vector)
    if start:
        untrained = json.loads(lines[0])
        assert (untrained["round"], untrained["cohort"], untrained["kept"]) == (0, [], None)
        assert untrained["quality"]["loss"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_all_training_is_in_training_mode_and_all_measuring_in_evaluation_mode(name, recipes, monkeypatch):
    federation = build(checked(recipes[name]), Machine(Accelerator(cpu=True)))
    modes: dict[str, set[bool]] = {"trained": set(), "measured": set()}
    for task in {id(t): t for t in (federation.task, getattr(federation, "edge", federation.task))}.values():

        def watch(module, given, model=task.model):
            kind = "trained" if torch.is_grad_enabled() else "measured"
            modes[kind].add(model.training)

        task.model.register_forward_pre_hook(watch)
    list(run(federation, 2))
    assert modes == {"trained": {True}, "measured": {False}}


def test_gradients_are_checkpointed_from_the_first_round_on(recipes, monkeypatch):
    from transformers import modeling_utils

    calls, original = [], modeling_utils.checkpoint

    def counted(*given, **settings):
        calls.append(1)
        return original(*given, **settings)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    play({**recipes["causal_lm"], "enable_attack": False}, Loaded(), rounds=1)
    assert len(calls) == 2 * 2  # one layer, two clients of two steps


def test_fedgkt_scores_the_same_nets_alike_and_answers_without_noise(recipes):
    federation = play({**recipes["fedgkt"], "enable_attack": False}, Loaded(), rounds=1)[1]
    torch.manual_seed(0)
    scores = [evaluate(federation)[0]["loss"] for _ in range(3)]
    assert scores[0] == scores[1] == scores[2]
    client = federation.clients[0]
    federation.edge.load(client.memory["net"])
    federation.task.load(federation.vector)
    federation.edge.model.eval(), federation.task.model.eval()
    with torch.no_grad():
        features = federation.edge.model.features(federation.normalise(client.shard.x))
        assert torch.equal(federation.task.model(features), client.memory["taught"])
