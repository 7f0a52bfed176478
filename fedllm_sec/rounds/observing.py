"""Keeping what some clients send, for whoever is curious. Observing changes nothing: only copies are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import LocalContext, LocalRule

# client, round, what it sent (d,), the vector that it had received (d,)
Keep = Callable[[str, int, Tensor, Tensor], None]


@dataclass(eq=False)
class Observer:
    """The honest-but-curious server, or whoever listens on the wire: both see the row as sent, before any screening.

    `what: delta` is that row, forged or defended as it may be; `gradient` is what a client that shares gradients would
    have sent: that of its first local step, after its own defenses and clipping. Rows go to `keep`, one at a time, so
    that as many are held as clients are observed, and none of them between rounds.
    """

    rounds: frozenset[int]
    clients: frozenset[str]
    what: str  # delta | gradient
    keep: Keep
    seen: dict[str, Tensor] = field(default_factory=dict)  # client -> gradient (d,) of its first step in this round

    def rules(self, client: str, round: int) -> Sequence[LocalRule]:
        """What to call around a client's steps: last, so that it sees what other rules have left."""
        looked = self.what == "gradient" and round in self.rounds and client in self.clients
        return (_FirstGradient(self.seen),) if looked else ()

    def saw(self, updates: UpdateMatrix, start: Tensor, round: int) -> None:
        """The rows of a round as they arrive, on the process that has them."""
        if round not in self.rounds:
            return
        for place, id in enumerate(updates.ids):
            if id in self.clients and self.what == "delta":
                self.keep(id, round, updates.rows[place].detach().to(start, copy=True), start)
            elif id in self.seen:
                self.keep(id, round, self.seen.pop(id), start)


NOBODY = Observer(frozenset(), frozenset(), "delta", lambda client, round, sent, start: None)


class _FirstGradient:
    """A local rule that only looks: the gradient of the first step, as the optimizer was given it."""

    def __init__(self, seen: dict[str, Tensor]) -> None:
        self.seen = seen

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        """Too early: the gradient is not clipped yet."""

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        if step == 0:
            assert parameters.grad is not None
            self.seen[ctx.client.id] = parameters.grad.detach().clone()
