"""The Triton kernels as a compiler for GPUs makes them, on any machine: none spills a register."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_no_kernel_for_an_h100_uses_the_stack():
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "gpu_compile.py"), "--sm", "90"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split("|") for line in run.stdout.splitlines() if "products, 64 rows" in line]
    assert len(lines) == 12  # three types, shifted or not, one tile or two
    assert all(int(line[5]) == 0 for line in lines)
