"""How long the phases of a round take."""

from __future__ import annotations

import time


class Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        spent, self.last = now - self.last, now
        return round(spent, 4)
