"""Where and with what a run was made: what environment.json holds."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numba", "bitsandbytes")


def environment(command: str, *, device: str, processes: int, placement: str, mixed_precision: str) -> dict[str, Any]:
    """Where and with what the run was made."""
    return {
        "command": command,
        "fedllm_sec": _installed("fedllm_sec"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "device": device,
        "processes": processes,
        "placement": placement,
        "mixed_precision": mixed_precision,
    }


def versions() -> dict[str, str | None]:
    """The versions of the packages that results depend on; None of one that is not installed."""
    return {name: _installed(name) for name in PACKAGES}


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def typed(command: str, words: Sequence[str]) -> str:
    """The command line that was typed to start `command` ("train") with these words.

    It is that of this process, or of the launcher which started it; of a call from Python, what could be typed.
    """
    for line in (_parents(), list(sys.orig_argv)):
        said = any(part in (f"fedllm_sec.{command}", command) for part in line)
        if said and words and line[-len(words) :] == list(words):
            first, *rest = line
            script = rest[0] if rest and Path(first).name.startswith("python") else "-"
            if not script.startswith("-") and Path(script).suffix != ".py":
                first, *rest = rest  # a program whose first line names its interpreter
            return shlex.join([Path(first).name, *rest])
    return shlex.join(["fedllm-sec", command, *words])


def _parents() -> list[str]:
    """The command line of the process that started this one, where the system tells."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").rstrip("\0").split("\0")
    except (OSError, UnicodeDecodeError):
        return []


def _commit() -> str | None:
    """The git commit of the package's source, "-dirty" where it was changed; None outside a checkout.

    Git is asked in ways that take no lock: a run that is killed here must not leave one in its user's repository.
    """
    here = Path(__file__).resolve().parent

    def told(*words: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return told("rev-parse", "HEAD") + ("-dirty" if told("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
