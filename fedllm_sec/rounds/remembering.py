"""What clients write down after a round: once the defense has decided, and by the part of their row that was taken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm_sec.defenses.buffers import combined
from fedllm_sec.protocols import Algorithm, Client


@dataclass(frozen=True)
class Trained:
    """What one client's own training gave it in a round."""

    client: Client
    row: Tensor  # (d,)
    steps: int
    forging: bool = False  # it sends another row


def own_training(
    cohort: Sequence[Client], collected: tuple[Tensor, ...] | None, forging: Iterable[str]
) -> list[Trained]:
    """What each of the cohort knows of its own row: a view of the matrix (n, d), so that nothing is held twice.

    The rows of `forging` clients are copied, since others will stand in their places. Steps are in the claims (n, 3).
    """
    if collected is None:
        return []
    rows, claims, *_ = collected
    others = frozenset(forging)
    return [
        Trained(client, row.clone(), int(steps), True) if client.id in others else Trained(client, row, int(steps))
        for client, row, steps in zip(cohort, rows, claims[:, 1].tolist(), strict=True)
    ]


def remember(
    algorithm: Algorithm, trained: Sequence[Trained], parts: Tensor, lr: float, control: Tensor | None
) -> None:
    """The memory of each client moves by its part (n,); with a part of 0 (skipped, quarantined, rejected) it stays.

    So does that of a client whose own training diverged. A client that forges remembers its own training whole where
    anything of the other row was taken: no part of it would match what the server has added, and it is to train on as
    an honest one does. The server's own training on clean data, which comes after the cohort's where it has any,
    counts as the row that was taken most.
    """
    assert algorithm.remember is not None
    most = parts.max()[None] if len(parts) else parts.new_zeros(1)  # no row came from any device
    for own, part in zip(trained, torch.cat([parts, most]).tolist(), strict=False):
        if part > 0 and bool(own.row.isfinite().all()):
            memory, moves = own.client.memory, 1.0 if own.forging else part
            row = own.row.to(parts.device, torch.float32)
            memory.update(algorithm.remember(memory, row, steps=own.steps, lr=lr, control=control, part=moves))


OWN_BUFFERS = "buffers"  # in a client's memory, where it keeps its own


def keep_own(
    floats: int, clients: Sequence[Client], cohort: Sequence[Client], buffers: Tensor, present: Tensor
) -> Tensor:
    """Each client of the cohort keeps its own buffers (n, b + c) for its next round; gives the mean over all who do.

    Buffers that are not finite are forgotten. Where nobody keeps any, the `present` ones (b + c,) stay.
    """
    for client, own in zip(cohort, buffers, strict=True):
        if bool(own.isfinite().all()):
            client.memory[OWN_BUFFERS] = own.clone()
    held = [client.memory[OWN_BUFFERS].to(buffers) for client in clients if OWN_BUFFERS in client.memory]
    return combined(torch.stack(held), floats, torch.ones(len(held), dtype=torch.float64)) if held else present
