"""fedllm_sec: attack and defend federated fine-tuning of language models.

Start with `fedllm_sec.protocols`, then `fedllm_sec.rounds.federation`. The numerics alone are two calls:

    d = fedllm_sec.aggregate(rows, "multi_krum", f=2)   # rows: (n, d), d.update: (d,)
    bad = fedllm_sec.forge(honest, "alie", m=2)         # (h, d) honest rows, (m, d) malicious ones
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedllm_sec import kernels as kernels
    from fedllm_sec.api import aggregate as aggregate
    from fedllm_sec.api import aggregate_state_dicts as aggregate_state_dicts
    from fedllm_sec.api import cost as cost
    from fedllm_sec.attacks.privacy import reconstruct as reconstruct
    from fedllm_sec.attacks.privacy import reveal_labels as reveal_labels
    from fedllm_sec.build.audit import audit as audit
    from fedllm_sec.matrix import Layout as Layout
    from fedllm_sec.matrix import UpdateMatrix as UpdateMatrix
    from fedllm_sec.protocols import Decision as Decision
    from fedllm_sec.protocols import RoundContext as RoundContext

__version__ = "0.1.0"

# The public names and where they live. Looked up on first use, so that importing fedllm_sec stays light.
_PUBLIC = {
    "aggregate": "fedllm_sec.api",
    "aggregate_state_dicts": "fedllm_sec.api",
    "forge": "fedllm_sec.attacks.forge",
    "audit": "fedllm_sec.build.audit",
    "cost": "fedllm_sec.api",
    "reconstruct": "fedllm_sec.attacks.privacy",
    "reveal_labels": "fedllm_sec.attacks.privacy",
    "Decision": "fedllm_sec.protocols",
    "RoundContext": "fedllm_sec.protocols",
    "UpdateMatrix": "fedllm_sec.matrix",
    "Layout": "fedllm_sec.matrix",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("fedllm_sec.kernels")
    if name in ("aggregate", "aggregate_state_dicts"):  # so that their first call takes no longer than a later one
        importlib.import_module("fedllm_sec.kernels").load()
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fedllm_sec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, "kernels"])
