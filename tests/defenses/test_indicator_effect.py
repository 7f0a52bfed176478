"""What a planted indicator tells of attackers in a deep network: minutes, and data that are not in the repository."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.conftest import ROOT

DATA = ROOT.parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar10_jpeg_10k.npz").is_file(), reason="needs ../shared/data/cifar10_jpeg_10k.npz")
def test_attackers_keep_more_of_a_planted_task_than_honest_clients_do(tmp_path: Path):
    """Pooled over three seeds and two rounds: AUC 0.73 planted, 0.59 with nothing planted (one round: 0.73, 0.70)."""
    found = importlib.util.spec_from_file_location("measure_indicator", ROOT / "scripts" / "measure_indicator.py")
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    bench = script.Bench(DATA, tmp_path)
    planted, plain = (float(bench.row("classes", way)["auc"]) for way in (True, False))
    assert planted >= 0.65
    assert planted > plain
