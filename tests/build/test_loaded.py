"""What a process keeps between runs: made once, and runs that share it are the runs they would be alone."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from fedllm_sec.build import language_model
from fedllm_sec.build.federation import build
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import checked
from fedllm_sec.rounds.compute import Machine


def test_a_thing_is_made_once_and_the_oldest_goes():
    loaded, made = Loaded(), []

    def get(key: str) -> str:
        return loaded.get("thing", key, lambda: made.append(key) or key)

    assert [get(key) for key in "aabab"] == list("aabab")
    assert made == ["a", "b"]
    get("c")  # a was used before b
    get("b")
    get("a")
    assert made == ["a", "b", "c", "a"]
    loaded.clear()
    get("a")
    assert made[-1] == "a"
    assert len(made) == 5


def test_the_base_model_is_read_once_for_all_seeds_and_shards_once_for_all_rules(small, monkeypatch):
    read = []
    original = language_model.load_base
    monkeypatch.setattr(language_model, "load_base", lambda *given: read.append(1) or original(*given))
    machine, loaded = Machine(Accelerator(cpu=True)), Loaded()

    def made(kept: Loaded | None, **changes: Any) -> Any:
        return build(checked({**small, **changes}), machine, kept)

    first = made(loaded)
    median = made(loaded, defense={"rule": {"name": "median"}})
    assert median.task is first.task
    assert [a.shard is b.shard for a, b in zip(first.clients, median.clients, strict=True)] == [True] * 4
    assert median.evaluation is first.evaluation
    assert median.threat.poisoned.keys() == first.threat.poisoned.keys()
    attack = {**small["attack"], "data": [{**small["attack"]["data"][0], "rate": 1.0}]}
    harder = made(loaded, attack=attack)
    assert harder.clients[0].shard is first.clients[0].shard
    (attacker,) = first.threat.malicious
    assert harder.threat.poisoned[attacker].prompts != first.threat.poisoned[attacker].prompts
    other = made(loaded, seed=7)
    again = made(loaded)
    assert len(read) == 1
    alone = made(None, seed=7)
    assert torch.equal(other.vector, alone.vector)
    assert [c.shard.prompts for c in other.clients] == [c.shard.prompts for c in alone.clients]
    assert torch.equal(again.vector, first.vector)
    assert not torch.equal(other.vector, first.vector)
