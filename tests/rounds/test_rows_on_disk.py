"""Rows of a round in host memory or in files without a name: the same rounds, little resident, nothing left behind."""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm_sec.attacks import MENU as ATTACKS
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build import storage as build_storage
from fedllm_sec.errors import FedError
from fedllm_sec.matrix import storage
from fedllm_sec.matrix.storage import Storage, fitting, new_rows, remembered, taken
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.rounds.federation import run
from tests.rounds.test_federation import federation

CPU = torch.device("cpu")


def played(rule: str, attack: str, kept: Storage, **settings: Any) -> tuple[torch.Tensor, list[Any]]:
    """Two rounds of 7 clients, 2 of them attackers who see all; each client's step moves it onto its target (6,)."""
    targets = (torch.randn(7, 6, generator=torch.Generator().manual_seed(0)) + 3).tolist()
    update = [resolve(attack, {}, ATTACKS, "attack.update")]
    threat = Threat(malicious=frozenset({"c1", "c4"}), seed=0, update=update, knowledge="cohort+defense")
    fed = federation(targets, rule, threat, **settings)
    fed.storage = kept
    records = list(run(fed, 2))
    for record in records:
        record.seconds.clear(), record.memory_mb.clear()
    return fed.vector, records


@pytest.mark.parametrize(
    ("rule", "attack"),
    [("multi_krum", "alie"), ("median", "min_max"), ("geometric_median", "fang"), ("flame", "mimic"),
     ("centered_clipping", "tailored"), ("freqfed", "ipm"), ("cross_round", "ipm"), ("foolsgold", "ipm")],
)  # fmt: skip
def test_rows_on_disk_and_in_host_memory_give_the_rounds_of_rows_on_the_device(rule, attack, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MOST_BYTES", -(2**60))  # pages are given back all the time
    settings = {"f": 2} if rule == "multi_krum" else {}
    wanted, records = played(rule, attack, Storage(), **settings)
    for kept in (Storage("disk", folder=tmp_path / "rows"), Storage("host")):
        vector, same = played(rule, attack, kept, **settings)
        assert torch.equal(vector, wanted)
        assert same == records
    assert os.listdir(tmp_path / "rows") == []


def test_bfloat16_rows_are_what_the_rule_and_the_attackers_get(tmp_path):
    exact, _ = played("mean", "byzantine_flip", Storage())
    vector, records = played("mean", "byzantine_flip", Storage("disk", torch.bfloat16, tmp_path))
    assert torch.allclose(vector, exact, rtol=0.02, atol=0.02)
    assert not torch.equal(vector, exact)
    assert len(records) == 2


def test_within_a_storage_on_disk_two_rows_and_more_and_histories_lie_in_files_and_one_row_does_not(tmp_path):
    with Storage("disk", folder=tmp_path).in_use():
        two, one = new_rows(2, 5), new_rows(1, 5)
        two.copy_(torch.arange(10.0).view(2, 5))
        storage._drop()
        assert two.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
        assert taken(two, [1, 0, 1])[:, 0].tolist() == [5, 0, 5]
        assert len(list(storage._MAPPED)) == 1
        assert one.shape == (1, 5)
        history = remembered(5)
        assert len(list(storage._MAPPED)) == 2
        assert history.fill_(2.0).tolist() == [2.0] * 5
    assert os.listdir(tmp_path) == []
    del two, history
    assert len(list(storage._MAPPED)) == 0  # the space is free again


def test_a_disk_without_room_ends_the_run_with_what_is_missing_and_what_to_do(tmp_path):
    with pytest.raises(FedError, match=r"4,000,000\.0 MB for 1000 rows cannot be had there .* MB are free.*"):
        Storage("disk", folder=tmp_path).rows(1000, 10**9, CPU)
    (tmp_path / "file").write_text("")
    with pytest.raises(FedError, match="cannot be had there"):
        Storage("disk", folder=tmp_path / "file").rows(2, 3, CPU)
    with pytest.raises(FedError, match="need a folder"):
        Storage("disk").rows(2, 3, CPU)


def test_rows_go_to_the_first_place_of_which_they_take_half_at_most(monkeypatch):
    free = {"cpu": 100, "cuda": 10}
    monkeypatch.setattr(storage, "available", lambda device: free[device.type])
    cuda = torch.device("cuda")
    assert [fitting(n, CPU) for n in (50, 51)] == ["device", "disk"]
    assert [fitting(n, cuda) for n in (5, 6, 50, 51)] == ["device", "host", "host", "disk"]


def test_what_attackers_are_shown_counts_in_the_size_of_the_rows(monkeypatch):
    monkeypatch.setattr(storage, "available", lambda device: 10**9)
    monkeypatch.setattr(build_storage, "available", lambda device: 10**9)
    recipe = namedtuple("recipe", "clients compute output attacked attack")(
        namedtuple("clients", "total per_round")(10, None),
        namedtuple("compute", "rows rows_dtype")(None, "bfloat16"),
        namedtuple("output", "folder")("runs/x"),
        True,
        namedtuple("attack", "knowledge")("cohort"),
    )
    assert build_storage.rows_bytes(recipe, 1000) == 10 * 1000 * 2 * 2
    kept = build_storage.storage(recipe, 10**8, CPU)
    assert kept == Storage("disk", torch.bfloat16, Path("runs/x"))
    assert build_storage.kept_in_words(recipe, 10**8, CPU) == (
        "4 GB of bfloat16 on disk, in files without a name in runs/x: 1 GB of cpu memory are free, and rows take half "
        "of it at most"
    )
