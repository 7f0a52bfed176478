"""Runs that differ in anything but data, clients, model and seed are one federation: the same shards, cohorts,
attackers and honest rows of round 1. So a defense is compared with the plain mean on the same clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from fedllm_sec.recipe.reading import put
from fedllm_sec.recipe.sections import ClassifyRecipe
from fedllm_sec.rounds.cohort import sample
from fedllm_sec.seeds import generator_for
from tests.first_round import rows_of

BASE: dict[str, Any] = {
    "task": "classify",
    "rounds": 3,
    "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 300, "test_rows": 60},
    "clients": {
        "total": 6,
        "per_round": 4,
        "local_steps": 2,
        "batch_size": 16,
        "lr": 0.05,
        "partition": {"name": "dirichlet", "alpha": 3.0},
    },
    "enable_attack": True,
    "attack": {
        "malicious": {"count": 2},
        "knowledge": "cohort+defense",
        "data": [{"name": "label_flip", "mapping": {1: 7}}],
        "update": [{"name": "byzantine_flip"}],
        "privacy": [{"name": "reveal_labels"}],
        "observe": {"rounds": [1], "clients": [0]},
    },
    "enable_defense": True,
    "defense": {"rule": {"name": "median"}},
}

# what makes another federation, by design
OTHER = (
    "seed",
    "task",
    "model",
    "pretrain",
    "data",
    "clients",
    "variants",
    "attack.malicious",
    "attack.spread",
    "compute.mixed_precision",
    "attack.observe.others",  # of text alone
    "defense.space",  # of adapters alone
    "defense.scope",
    "defense.repair",  # of a language model alone
    "output.save",
)

# key -> another value of it
CHANGES: dict[str, Any] = {
    "rounds": 5,
    "algorithm": {"name": "fedavg", "server_lr": 0.5, "server_momentum": 0.9},
    "enable_attack": False,
    "attack.start": 2,
    "attack.stop": 1,
    "attack.every": 2,
    "attack.probability": 0.5,
    "attack.collude": False,
    "attack.knowledge": "own",
    "attack.data": [],
    "attack.local": [{"name": "pgd", "radius": 0.1}],
    "attack.update": [{"name": "tailored"}],
    "attack.privacy": [{"name": "idlg"}],
    "attack.observe.rounds": [2],
    "attack.observe.clients": [1],
    "attack.observe.what": "gradient",
    "attack.observe.own_rows": 5,
    "enable_defense": False,
    "defense.client": [{"name": "wbc"}],
    "defense.before": [{"name": "norm_clipping"}],
    "defense.rule": {"name": "krum", "f": 0},
    "defense.after": [{"name": "weak_dp"}],
    "defense.root_rows": 20,
    "evaluate.every": 3,
    "evaluate.start": True,
    "evaluate.rows": 20,
    "evaluate.attack_rows": 5,
    "evaluate.batch_size": 7,
    "compute.gradient_accumulation": 2,
    "compute.placement": "data",
    "compute.rows": "disk",
    "compute.rows_dtype": "bfloat16",
    "compute.chunk_mb": 0.01,
    "compute.threads": 1,
    "output.folder": "elsewhere",
    "deploy.wire": "int8",
    "deploy.wait_for": 2,
    "deploy.min_replies": 2,
    "deploy.timeout_s": 5.0,
    "output.adapter_every": 1,
    "output.tracker": None,
}


def keys(section: type[BaseModel], place: str = "") -> list[str]:
    """Every key of the settings language, blocks of methods as one."""
    found = []
    for name, field in section.model_fields.items():
        inner = [a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(a, type)]
        blocks = [a for a in inner if issubclass(a, BaseModel)]
        found += keys(blocks[0], f"{place}{name}.") if blocks else [f"{place}{name}"]
    return found


def test_every_key_of_a_recipe_is_tried_here_or_is_meant_to_change_the_federation():
    asked = {key for key in keys(ClassifyRecipe) if not key.startswith(OTHER)}
    assert asked == set(CHANGES)


def state_of(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    monkeypatch.chdir(folder)  # what an observer keeps lies in output.folder
    fed, rows = rows_of(raw, monkeypatch)
    cohorts = [sample(fed.clients, fed.per_round, generator_for(fed.seed, r, "cohort")) for r in (1, 2, 3)]
    return {
        "shards": {c.id: (c.shard.x, c.shard.y) for c in fed.clients},
        "cohorts": [[c.id for c in cohort] for cohort in cohorts],
        "malicious": fed.threat.malicious,
        "rows": {c.id: row for c, row in zip(cohorts[0], rows, strict=True) if c.id not in fed.threat.malicious},
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        return state_of(BASE, patch, tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("key", [key for key in CHANGES if key != "defense.root_rows"])
def test_a_key_that_is_not_about_data_or_clients_leaves_the_federation_as_it_is(key: str, base, monkeypatch, tmp_path):
    found = state_of(put(BASE, key, CHANGES[key]), monkeypatch, tmp_path)
    assert found["cohorts"] == base["cohorts"]
    assert found["malicious"] == (base["malicious"] if key != "enable_attack" else frozenset())
    for id, (x, y) in base["shards"].items():
        assert torch.equal(found["shards"][id][0], x)
        assert torch.equal(found["shards"][id][1], y)
    other = ("defense.client", "compute.gradient_accumulation", "compute.rows_dtype")  # other digits of a row
    honest = base["rows"] if key not in other else {}
    for id, row in honest.items():
        assert torch.equal(found["rows"][id], row), id


def test_a_root_set_takes_its_rows_from_the_shards_and_moves_no_other_row(base, monkeypatch, tmp_path):
    found = state_of(put(BASE, "defense.root_rows", 20), monkeypatch, tmp_path)
    assert found["cohorts"] == base["cohorts"]
    assert found["malicious"] == base["malicious"]
    gone = 0
    for id, (x, _) in base["shards"].items():
        before = [row.numpy().tobytes() for row in x]
        after = [row.numpy().tobytes() for row in found["shards"][id][0]]
        assert set(after) <= set(before)
        gone += len(before) - len(after)
    assert gone == 20
