"""FL methods with memory give the same run in one process and in two, and their mistakes are told before any data."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file

from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError
from tests.test_equivalence import finish, launch, run

DIGITS: dict[str, Any] = {
    "seed": 3,
    "rounds": 3,
    "task": "classify",
    "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 200, "test_rows": 100},
    "clients": {
        "total": 5, "per_round": 3, "local_steps": 3, "batch_size": 8, "lr": 0.1, "optimizer": "sgd",
        "max_grad_norm": None, "partition": {"name": "iid"},
    },
    "evaluate": {"rows": 100, "start": True},
    "compute": {"threads": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", ["scaffold", pytest.param("feddyn", marks=pytest.mark.slow)])
def test_clients_that_move_between_processes_keep_their_memory(name, tmp_path):
    raw = {**DIGITS, "algorithm": {"name": name}}
    two = launch(raw, tmp_path / "two", 2)
    folders = [run(raw, tmp_path / "one"), tmp_path / "two" / "run"]
    finish(two)
    histories = [folder.joinpath("history.jsonl").read_bytes() for folder in folders]
    assert histories[0] == histories[1]
    assert histories[0].startswith(b'{"round": 0, "cohort": [], ')  # the start is measured on both
    first, second = (load_file(folder / "checkpoint.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert any("memory" in key for key in first)
    assert all(first[key].equal(second[key]) for key in first)


@pytest.mark.parametrize(
    ("algorithm", "clients", "words"),
    [
        ({"name": "scaffold"}, {"optimizer": "adamw", "max_grad_norm": 1.0}, ["clients.optimizer", "max_grad_norm"]),
        ({"name": "fednova"}, {"optimizer": "adamw"}, ["fednova divides rows"]),
        ({"name": "fedsgd"}, {}, ["one step on the whole shard"]),
        ({"name": "fedgan"}, {}, ["fedgan is for task: gan"]),
        ({"name": "fednas"}, {}, ["fednas is for task: nas"]),
        ({"name": "fedopt", "optimizer": "adamm"}, {}, ["algorithm.optimizer", "adamm"]),
        ({"name": "fednova", "cap": 0.5}, {}, ["cap must be at least 1"]),
        ({"name": "feddyn", "alpha": 0.0}, {}, ["alpha"]),
    ],
)
def test_a_method_that_cannot_work_says_so_before_any_data_are_read(algorithm, clients, words):
    raw = {**DIGITS, "algorithm": algorithm, "clients": {**DIGITS["clients"], **clients}}
    with pytest.raises(RecipeError) as caught:
        planned(checked(raw))
    for word in words:
        assert word in str(caught.value)
