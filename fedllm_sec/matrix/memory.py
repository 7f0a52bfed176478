"""How much memory a phase of a round took beyond what was held when it began."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def watch(device: torch.device) -> Callable[[], dict[str, float]]:
    """Start watching; the function that comes back says what the phase took: {"defense", "process"} in MiB.

    "defense" is the peak since now minus what was in use now, "process" the process's peak up to now. Both count the
    GPU's allocated memory if `device` is one, else resident memory. The dict is empty where the system cannot say
    (only Linux lets a process reset its own peak, and not in every container). Memory that the allocator already holds
    free is not new, so a phase that takes up such memory again may show 0. Watching resets the peak that the
    operating system or CUDA keeps: what others read from there (`/usr/bin/time -v`) then counts from here only, which
    is why "process" is kept.
    """
    if device.type == "cuda":
        highest, held = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: _peaks(torch.cuda.max_memory_allocated(device) - held, highest)
    resident = _resident("VmHWM", "VmRSS")
    if resident is None or not _reset():
        return dict
    process, before = resident

    def taken() -> dict[str, float]:
        now = _resident("VmHWM")
        return {} if now is None else _peaks(now[0] - before, process)

    return taken


def _peaks(extra: int, process: int) -> dict[str, float]:
    return {"defense": round(max(0, extra) / 2**20, 2), "process": round(process / 2**20, 2)}


def _resident(*names: str) -> list[int] | None:
    """The named sizes of this process in bytes."""
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        return [1024 * int(lines[name].split()[0]) for name in names]
    except (OSError, KeyError, ValueError):
        return None


def _reset() -> bool:
    try:
        _RESET.write_text("5")  # proc(5): the peak becomes what is resident now
    except OSError:
        return False
    return True
