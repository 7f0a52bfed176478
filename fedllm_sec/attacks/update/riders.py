"""Attackers who copy: free riders who resend what exists, and mimics who repeat an honest client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.attacks.update.sight import honest_rows, noisy, repeat
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import ThreatView


class Lazy:
    """A free rider, who does not train (Lin et al. 2019, sec. 3; Fraboni et al. 2021, with noise as a mask).

    `last_global` resends the step the server took last round, `own_stale` the first update this client ever
    made. In a round in which there is nothing to resend yet it trains like the others. `noise` adds normal
    noise of that many root mean squares of the row, so that copies differ from each other and from the
    original.
    """

    def __init__(self, *, variant: Literal["last_global", "own_stale"] = "last_global", noise: float = 0.0) -> None:
        if not (math.isfinite(noise) and noise >= 0):
            raise AttackError(f"lazy.noise: {noise}: must be 0 or a positive number.")
        self.variant, self.noise = variant, noise
        self.first: dict[str, Tensor] = {}  # client id -> its first update (d,)

    def __call__(self, view: ThreatView) -> Tensor:
        own = view.own.float()
        if self.variant == "own_stale":
            ids = view.own_ids or tuple(str(i) for i in range(len(own)))
            for id, row in zip(ids, own, strict=True):
                self.first.setdefault(id, row.cpu().clone())
            rows = torch.stack([self.first[id].to(own.device) for id in ids])
        elif view.last_update is None:
            rows = own.clone()
        else:
            rows = repeat(view.last_update.float(), len(own))
        if self.noise > 0:
            size = kernels.row_norms(UpdateMatrix.of(rows)) / math.sqrt(rows.shape[1])
            rows = noisy(rows, (size * self.noise).tolist(), view.rng)
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"first": dict(self.first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first = dict(state["first"])


def projections(rows: Tensor) -> Tensor:
    """|<z, x_i - mean>| along the direction z of largest variance, relative to the largest: (h,) float64.

    With Y the centred rows and u the top eigenvector of Y Y^T, z is Y^T u up to length, so Y z is parallel to u. Y Y^T
    is the doubly centred matrix of squared distances, times -1/2.
    """
    between = kernels.sq_distances(UpdateMatrix.of(rows))
    off = between - between.mean(0) - between.mean(1)[:, None] + between.mean()
    values, vectors = torch.linalg.eigh(off / -2)
    if float(values[-1]) <= 0:
        return torch.zeros(len(rows), dtype=torch.float64)
    along: Tensor = vectors[:, -1].abs()
    return along.div(along.max())


class Mimic:
    """All attackers copy one honest client, so that its data weigh more than they should (Karimireddy et
    al. 2022).

    Copied is the client with the largest |<z, x_i - mean>|, z the direction in which the honest rows vary
    most (appendix B there). With `warmup` > 0 these numbers are added up by client id over so many rounds,
    and then the same client is copied for good (another one in rounds it sits out). Deviations: z is the
    exact top direction of the round, from the Gram matrix, not a running estimate; rows are centred, so
    that what all share has no part.
    """

    def __init__(self, *, warmup: int = 0) -> None:
        if warmup < 0:
            raise AttackError(f"mimic.warmup: {warmup}: must be 0 or a number of rounds.")
        self.warmup = warmup
        self.rounds = 0
        self.totals: dict[str, float] = {}

    def __call__(self, view: ThreatView) -> Tensor:
        rows = honest_rows(view, "mimic")
        ids = view.other_ids or tuple(str(i) for i in range(len(rows)))
        if self.warmup == 0:
            return repeat(rows[int(projections(rows).argmax())].float(), len(view.own))
        if self.rounds < self.warmup:
            self.rounds += 1
            for id, value in zip(ids, projections(rows).tolist(), strict=True):
                self.totals[id] = self.totals.get(id, 0.0) + value
        at = max(range(len(ids)), key=lambda i: self.totals.get(ids[i], -1.0))
        return repeat(rows[at].float(), len(view.own))

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "totals": dict(self.totals)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds, self.totals = int(state["rounds"]), dict(state["totals"])
