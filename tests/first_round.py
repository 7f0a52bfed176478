"""A federation of a raw recipe, and what its clients send in the first round."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from fedllm_sec.build.federation import build, run
from fedllm_sec.build.names import checked
from fedllm_sec.rounds.compute import Machine


def made(raw: dict[str, Any]):
    torch.set_num_threads(1)
    return build(checked(raw), Machine(Accelerator(cpu=True)))


def rows_of(raw: dict[str, Any], monkeypatch) -> tuple[Any, torch.Tensor]:
    """The federation after one round, and the rows (n, d) of its clients' training, before any attack on them."""
    fed, seen = made(raw), []
    collect = fed.machine.collect

    def watch(*given):
        found = collect(*given)
        seen.append(found[0].clone())
        return found

    monkeypatch.setattr(fed.machine, "collect", watch)
    list(run(fed, 1))
    return fed, seen[0]
