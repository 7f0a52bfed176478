"""The smoke recipes on a GPU: they train there, and begin as they do on the CPU. `scripts/gpu_day.sh` runs these."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def first_losses(recipe: str, folder: Path, **environment: str) -> dict[str, float]:
    """The training loss of each client in round 1 of each variant."""
    command = [sys.executable, "-m", "fedllm_sec.train", str(ROOT / f"recipes/smoke/{recipe}.yaml")]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(
        [*command, f"output.folder={folder}"], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-1500:]
    found = {}
    for history in sorted(folder.rglob("history.jsonl")):
        losses = json.loads(history.read_text().splitlines()[0])["losses"]
        found |= {f"{history.parent.relative_to(folder)} {id}": loss for id, loss in losses.items() if loss is not None}
    return found


@pytest.mark.parametrize("recipe", ["algorithms", "gan", "nas", "reference", "text", "vision"])
def test_a_smoke_recipe_begins_on_the_gpu_as_on_the_cpu(recipe: str, tmp_path: Path):
    there = first_losses(recipe, tmp_path / "gpu")
    here = first_losses(recipe, tmp_path / "cpu", ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    assert there == pytest.approx(here, rel=0.05)
