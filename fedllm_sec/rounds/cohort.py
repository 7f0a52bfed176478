"""Who takes part in a round. `build` foresees attackers and cohorts with it, so nothing else may decide that."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedllm_sec.protocols import Client


def sample(clients: Sequence[Client], per_round: int | None, rng: torch.Generator) -> list[Client]:
    """The cohort of a round: `per_round` clients without replacement, in the clients' own order."""
    if per_round is None or per_round >= len(clients):
        return list(clients)
    return [clients[i] for i in sorted(torch.randperm(len(clients), generator=rng)[:per_round].tolist())]
