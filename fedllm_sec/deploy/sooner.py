"""Flower's waits, shortened: it looks after 1 s, 2 s, 4 s, ... for the parts of a message that are still on their way.

A message is announced before its parts are there, and whoever looks often finds it announced: most of what a short
round waited. It is replaced in private modules of Flower, hence the narrow range of versions.
"""

from __future__ import annotations

import functools
import time
from types import ModuleType

SHARE, LATEST = 1 / 40, 3.0  # by what share of a wait its end may be seen too late, and by how many seconds
FIRST, MOST = 0.05, 0.5  # seconds until parts are looked for again: at first, and as it doubles


def look_sooner(module: ModuleType) -> None:
    """Parts of messages that this module of Flower pulls are looked for after FIRST to MOST seconds, for as long."""
    for name in ("pull_objects", "pull_and_inflate_object_from_tree"):
        if hasattr(module, name):
            pull = getattr(module, name)
            waits = {"initial_backoff": FIRST, "backoff_cap": MOST, "max_tries_per_object": None}
            setattr(module, name, functools.partial(pull, **waits))


class Idle:
    """One wait: how long to pause between two looks, `least` seconds and more the longer nothing has come."""

    def __init__(self, least: float) -> None:
        self.least, self.began = least, time.monotonic()

    def pause(self) -> float:
        return min(LATEST, max(self.least, SHARE * (time.monotonic() - self.began)))
