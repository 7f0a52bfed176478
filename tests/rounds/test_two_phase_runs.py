"""FedGAN and FedNAS from recipe to result: both parts of the vector are aggregated, attacked and defended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedllm_sec.models.darts import OPERATIONS
from fedllm_sec.rounds.federation import evaluate, run
from fedllm_sec.tasks.nas import ARCHITECTURE
from fedllm_sec.train import load, run_all
from tests.first_round import made, rows_of

FLIP = {"malicious": {"ids": [0]}, "update": [{"name": "byzantine_flip", "scale": 5.0}]}
GAN: dict[str, Any] = {
    "seed": 1,
    "rounds": 12,
    "task": "gan",
    "model": {"name": "mlp_gan", "hidden": 64, "noise": 8},
    "data": {"name": "digits"},
    "algorithm": {"name": "fedgan"},
    "clients": {"total": 2, "local_epochs": 2, "batch_size": 32, "lr": 3e-3, "betas": [0.5, 0.999]},
    "evaluate": {"samples": 300, "every": 12},
    "compute": {"threads": 1},
}
NAS: dict[str, Any] = {
    "seed": 1,
    "rounds": 1,
    "task": "nas",
    "model": {"name": "darts", "width": 4},
    "data": {"name": "digits", "train_rows": 120, "test_rows": 50},
    "algorithm": {"name": "fednas"},
    "clients": {"total": 5, "local_epochs": 1, "batch_size": 12, "lr": 1e-2, "max_grad_norm": None},
    "compute": {"threads": 1},
}


def test_the_samples_of_a_federated_gan_come_nearer_to_real_images():
    fed = made(GAN)
    before = evaluate(fed)[0]["loss"]
    after = list(run(fed, 12))[-1].quality["loss"]
    assert after < 0.75 * before
    assert after < 0.95  # 1 is what one gets who always shows the mean image


def test_both_players_of_a_gan_are_aggregated_and_a_flipped_pair_is_kept_out(monkeypatch):
    clients = {"total": 5, "local_steps": 2, "batch_size": 16}
    raw = {**GAN, "clients": clients, "enable_attack": True, "attack": FLIP}
    raw |= {"enable_defense": True, "defense": {"rule": {"name": "median"}}}
    fed, rows = rows_of(raw, monkeypatch)
    rows[0] *= -5
    torch.testing.assert_close(fed.vector - fed.task.initial, rows.median(0).values, atol=1e-6, rtol=1e-4)
    parts = fed.task.layout.split(fed.vector - fed.task.initial)
    assert all(bool(moved.any()) for moved in parts.values())
    assert {name.split(".")[0] for name in parts} == {"generator", "discriminator"}


def test_the_architecture_is_aggregated_as_the_weights_are(monkeypatch):
    fed, rows = rows_of({**NAS, "clients": {**NAS["clients"], "partition": {"name": "iid"}}}, monkeypatch)
    parts = fed.task.layout.split(fed.vector - fed.task.initial)
    alphas = [name for name in parts if name.startswith(ARCHITECTURE)]
    assert sorted(alphas) == ["arch_normal", "arch_reduce"]
    for name, moved in parts.items():
        sent = torch.stack([fed.task.layout.split(row)[name] for row in rows])
        torch.testing.assert_close(moved, sent.mean(0), atol=1e-6, rtol=1e-4)
        assert bool(sent.any())


def test_a_flipped_architecture_is_kept_out_by_the_median(monkeypatch):
    raw = {**NAS, "enable_attack": True, "attack": FLIP}
    raw |= {"enable_defense": True, "defense": {"rule": {"name": "median"}}}
    fed, rows = rows_of(raw, monkeypatch)
    parts = fed.task.layout.split(fed.vector - fed.task.initial)
    sent = torch.stack([fed.task.layout.split(row)["arch_normal"] for row in rows])
    sent[0] *= -5
    torch.testing.assert_close(parts["arch_normal"], sent.median(0).values, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_search_ends_with_the_genotype_of_its_cells(nodes, tmp_path: Path):
    path = tmp_path / "nas.yaml"
    path.write_text(yaml.safe_dump({**NAS, "model": {"name": "darts", "width": 4, "nodes": nodes}}))
    folder = run_all(load(path, [f"output.folder={tmp_path / 'run'}"]), "test")
    found = json.loads((folder / "model" / "genotype.json").read_text())
    assert set(found) >= {"normal", "reduce"}
    for cell in (found["normal"], found["reduce"]):
        assert len(cell) == nodes
        for number, node in enumerate(cell):
            assert len({source for _, source in node}) == 2
            assert all(0 <= source < 2 + number and name in OPERATIONS[1:] for name, source in node)
