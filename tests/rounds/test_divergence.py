"""A model that is not finite ends the run with the round and the way out; the last finite one stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedllm_sec.train import main

DIGITS = {
    "task": "classify",
    "rounds": 6,
    "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 200, "test_rows": 50},
    "clients": {"total": 4, "local_steps": 1, "batch_size": 20, "lr": 0.05, "optimizer": "sgd"},
    "algorithm": {"name": "fedavg", "server_lr": 1e40},
}


@pytest.mark.parametrize("server_lr", ["1.0e+40", "1.0e+30"])  # beyond float32; within it, but not its square
def test_a_server_step_that_is_too_long_ends_the_run_and_keeps_the_last_finite_model(server_lr, tmp_path, capsys):
    path, folder = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({**DIGITS, "output": {"folder": str(folder)}}).replace("1.0e+40", server_lr))
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert "error: round 1: the global model would not be finite any more" in said
    assert "The model of round 0 is kept. Lower algorithm.server_lr" in said
    assert (folder / "history.jsonl").read_text() == ""
    assert not (folder / "summary.json").exists()
    path.write_text(path.read_text().replace(server_lr, "1.0"))
    assert main([str(path), f"output.folder={folder}-2"]) == 0


@pytest.mark.parametrize("server_lr", [0.5, 1.0])
def test_an_ordinary_run_goes_on(server_lr: float, tmp_path: Path):
    path = tmp_path / "r.yaml"
    raw = {**DIGITS, "rounds": 2, "algorithm": {"name": "fedavg", "server_lr": server_lr}}
    path.write_text(yaml.safe_dump({**raw, "output": {"folder": str(tmp_path / "out")}}))
    assert main([str(path)]) == 0
