"""Where the rows of a round come from: clients trained here, on one process or on several ranks, or real devices.

The round loop is one; this is the only thing in it that differs between a simulation and a deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from fedllm_sec.protocols import Client, LocalResult, LocalRule

if TYPE_CHECKING:
    from fedllm_sec.rounds.federation import Federation

Train = Callable[[Client, Sequence[LocalRule]], LocalResult]


@dataclass(frozen=True)
class Asked:
    """What the server asks of the clients of a round."""

    round: int
    rounds: int
    start: Tensor  # (d,) the global vector
    last_update: Tensor | None  # (d,) the step before it
    control: Tensor | None  # (d,) what the FL method sends beside it
    train: Train  # how a client that lives in this process trains
    everywhere: bool = False  # whether every rank is to have the rows
    beside: int = 0  # b, numbers that come beside a row: the model's buffers


@dataclass(frozen=True)
class Came:
    """The rows of a round; `collected` is what `Machine.collect` gives, None on ranks that hold nothing."""

    cohort: Sequence[Client]  # whose rows these are, in the clients' own order
    collected: tuple[Tensor, Tensor, Tensor] | None  # (n, d) rows, (n, 3) claims and (n, b) buffers
    absent: Mapping[str, str] = field(default_factory=dict)  # id of a client that was waited for -> why no row came
    too_few: str | None = None  # why the round is to be skipped
    lost: bool = False  # whether not one client could train from the global model, with nobody having attacked so far


class Source(Protocol):
    """Rows of the cohort, as many as come."""

    def __call__(self, federation: Federation, cohort: Sequence[Client], asked: Asked) -> Came: ...


def trained_here(federation: Federation, cohort: Sequence[Client], asked: Asked) -> Came:
    """Every client trains in this process or in another of its ranks."""
    machine, threat = federation.machine, federation.threat
    n, width, where = len(cohort), federation.task.layout.size, federation.storage
    clients = [threat.dress(c, asked.round) if threat else c for c in cohort]
    turns = federation.progress(machine.turns(n), n)
    results = ((place, asked.train(clients[place], federation.guards)) for place in turns)
    collected = machine.collect(results, n, width, asked.everywhere, asked.beside, where)
    honest = threat is None or not threat.malicious or asked.round < threat.start
    lost = honest and collected is not None and not any(bool(row.isfinite().all()) for row in collected[0])
    return Came(cohort, collected, lost=lost)
