"""A model that is not finite ends the run with the round and the way out; the last finite one stays."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fedllm_sec.records.summary import diverged_since
from fedllm_sec.report.page import summary_text
from fedllm_sec.report.runs import read_runs
from fedllm_sec.report.words import finding
from fedllm_sec.train import main

DIGITS = {
    "task": "classify",
    "rounds": 6,
    "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 200, "test_rows": 50},
    "clients": {"total": 4, "local_steps": 1, "batch_size": 20, "lr": 0.05, "optimizer": "sgd"},
    "algorithm": {"name": "fedavg", "server_lr": 3e38},
}


@pytest.mark.parametrize("server_lr", ["3.0e+38", "1.0e+30"])  # within float32, but not its square
def test_a_server_step_that_is_too_long_ends_the_run_and_keeps_the_last_finite_model(server_lr, tmp_path, capsys):
    path, folder = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({**DIGITS, "output": {"folder": str(folder)}}).replace("3.0e+38", server_lr))
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


@pytest.mark.parametrize("rounds", [2, 3])  # the last round, and one in the middle
def test_a_model_from_which_no_client_trains_to_finite_numbers_ends_the_run(rounds: int, tmp_path: Path, capsys):
    path, folder = tmp_path / "r.yaml", tmp_path / "out"
    model = {"name": "cnn", "hidden": 8}  # two layers: a gradient is a product of lengths, and too long here
    algorithm = {"name": "fedavg", "server_lr": 1e18}
    raw = {**DIGITS, "rounds": rounds, "model": model, "algorithm": algorithm, "output": {"folder": str(folder)}}
    path.write_text(yaml.safe_dump(raw))
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert "error: round 2: no client's training from the global model, of length " in said
    assert "The model of round 1 is kept. Lower algorithm.server_lr or clients.lr" in said
    assert len((folder / "history.jsonl").read_text().splitlines()) == 1
    attacked = {"enable_attack": True, "attack": {"malicious": {"count": 1}, "update": [{"name": "byzantine_zero"}]}}
    path.write_text(yaml.safe_dump({**raw, **attacked, "output": {"folder": f"{folder}-attacked"}}))
    assert main([str(path)]) == 0  # an attack may have done it: the run goes to its end and a grid has its row
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round ")]
    assert len(rows) == rounds
    assert all("  DIVERGED: held-out loss not finite since round 1  " in line for line in rows)
    runs = read_runs([tmp_path / "out-attacked"])
    said = "Diverged: held-out loss not finite"
    assert finding(runs)[0] == f"{said} since round 1."
    assert summary_text(runs).startswith(f"{said} since round 1. ")
    two = finding([replace(runs[0], name=name) for name in ("a", "b")])
    assert two[0] == f"{said} in a since round 1 and in b since round 1."
    many = finding([replace(runs[0], name=f"r{k}") for k in range(6)])
    assert many[0].endswith("in r3 since round 1 and in 2 more runs.")
    assert json.loads((tmp_path / "out-attacked" / "summary.json").read_text())["diverged"] == 1


def test_a_held_out_loss_that_is_not_finite_at_the_end_is_an_error_where_nobody_attacks(tmp_path: Path, capsys):
    path, folder = tmp_path / "r.yaml", tmp_path / "out"
    model, algorithm = {"name": "cnn", "hidden": 8}, {"name": "fedavg", "server_lr": 1e18}
    raw = {**DIGITS, "rounds": 1, "model": model, "algorithm": algorithm, "output": {"folder": str(folder)}}
    path.write_text(yaml.safe_dump(raw))
    assert main([str(path)]) == 1
    assert "error: the held-out loss is not finite since round 1 in" in capsys.readouterr().err
    found = json.loads((folder / "summary.json").read_text())
    assert (found["diverged"], found["quality"]["loss"]) == (1, "nan")


def test_divergence_is_counted_from_the_first_of_the_last_rounds_without_a_finite_loss():
    measured = [SimpleNamespace(round=r, quality={"loss": loss}) for r, loss in enumerate([2.0, math.nan, 1.0])]
    lost = [SimpleNamespace(round=r, quality={"loss": loss}) for r, loss in ((3, math.nan), (5, math.inf))]
    assert diverged_since(measured) is None
    assert diverged_since([*measured, *lost]) == 3
