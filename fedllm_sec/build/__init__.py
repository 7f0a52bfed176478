"""From a recipe to a run that can begin. The way is one line: checked, planned, assembled.

names       raw -> checked recipe: names and settings of methods against the menus
plan        what follows without data or model; what cannot work is refused here (also: threat, transfer)
federation  assemble: data, model, everything together; what only they can tell is refused here
parts, text, arrays, characters    what each kind of task brings: rows, shards, the task, held-out rows
loaded      what a process reads once for several runs
rehearsal, explain, cost           what is tried, said and counted before training (smoothing: what is tested after)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedllm_sec.build.federation import assemble as assemble
    from fedllm_sec.build.federation import build as build
    from fedllm_sec.build.federation import run as run
    from fedllm_sec.build.federation import save as save
    from fedllm_sec.build.names import checked as checked
    from fedllm_sec.build.plan import Plan as Plan
    from fedllm_sec.build.plan import planned as planned

# Looked up on first use: a command that has a mistyped name to tell says it before torch is imported.
_PUBLIC = {
    "assemble": "federation",
    "build": "federation",
    "run": "federation",
    "save": "federation",
    "checked": "names",
    "Plan": "plan",
    "planned": "plan",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"fedllm_sec.build.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'fedllm_sec.build' has no attribute {name!r}")
