"""Where and with what a run was made: what environment.json holds."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any


def environment(command: str, *, device: str, processes: int, placement: str, mixed_precision: str) -> dict[str, Any]:
    """Where and with what the run was made."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "numba", "bitsandbytes")
    return {
        "command": command,
        "fedllm_sec": installed("fedllm_sec"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in packages},
        "device": device,
        "processes": processes,
        "placement": placement,
        "mixed_precision": mixed_precision,
    }


def _commit() -> str | None:
    """The git commit of the package's source, "-dirty" where it was changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
