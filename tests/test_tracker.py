"""What a recipe's tracker gets."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm_sec.train import main

RECIPE: dict[str, Any] = {
    "rounds": 2,
    "task": "classify",
    "model": {"name": "logistic"},
    "data": {"name": "digits"},
    "clients": {"total": 4, "local_steps": 2, "batch_size": 20},
    "compute": {"threads": 1},
    "variants": {"one": {}, "two": {"seed": 2}},
}


def written(folder: Path, tracker: str) -> str:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output": {"folder": str(folder / "runs"), "tracker": tracker}}))
    return str(path)


def test_tensorboard_has_the_numbers_of_each_round_of_each_variant(tmp_path: Path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main([written(tmp_path, "tensorboard")]) == 0
    for variant in ("one", "two"):
        found = events.EventAccumulator(str(tmp_path / "runs" / variant))
        found.Reload()
        for tag in ("quality/loss", "quality/accuracy", "update_norm"):
            assert [event.step for event in found.Scalars(tag)] == [1, 2], (variant, tag)


def test_a_tracker_that_is_not_installed_is_an_error_not_a_no_op(tmp_path: Path, monkeypatch, capsys):
    whole = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else whole(name, *more)
    )
    assert main([written(tmp_path, "wandb")]) == 2
    assert "output.tracker: 'wandb' is not installed. pip install wandb" in capsys.readouterr().err
    assert not list(tmp_path.rglob("history.jsonl"))
