"""The peak of a phase, where the system can say."""

from __future__ import annotations

import pytest
import torch

from fedllm_sec.matrix import memory


def test_a_phase_that_takes_and_frees_64_mib_is_seen():
    taken = memory.watch(torch.device("cpu"))
    block = torch.ones(16 * 2**20)  # 64 MiB, touched
    del block
    found = taken()
    if not found:
        pytest.skip("this system does not let a process reset its peak")
    assert 55 < found["defense"] < 128
    assert found["process"] > 50


def test_where_the_system_cannot_say_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_RESET", tmp_path / "missing" / "clear_refs")
    assert memory.watch(torch.device("cpu"))() == {}
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
    assert memory.watch(torch.device("cpu"))() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_allocated_memory_counts():
    device = torch.device("cuda")
    taken = memory.watch(device)
    block = torch.ones(16 * 2**20, device=device)
    del block
    assert 63 < taken()["defense"] < 66
