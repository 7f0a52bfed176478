"""Clients with loss surfaces that differ in curvature, so that local steps drift, and a federation of them by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fedllm_sec.attacks.threat import Threat
from fedllm_sec.defenses import MENU
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.protocols import Algorithm, Client, LocalTraining, ThreatView
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation
from tests.toy import Quadratic


class Bowl(Quadratic):
    """Minimise the mean of 1/2 sum a (w - t)^2 over the rows (a, t) of a shard (rows, 2, d)."""

    def loss(self, shard: Tensor, rows: Sequence[int]) -> Tensor:
        a, t = shard[list(rows)].unbind(1)
        return 0.5 * (a * (self.parameters - t).square()).sum(1).mean()


def bowl(curvature: list[float], target: list[float], rows: int = 1) -> Tensor:
    """A shard of equal rows."""
    return torch.tensor([[curvature, target]]).repeat(rows, 1, 1)


# two clients that disagree strongly: each is steep where the other is flat
STEEP = [bowl([1.0, 0.05], [10.0, 0.0]), bowl([0.05, 1.0], [-10.0, 4.0])]


def optimum(shards: Sequence[Tensor]) -> Tensor:
    """The minimum (d,) of the plain mean of the clients' losses."""
    a, t = torch.stack([s.mean(0) for s in shards]).double().unbind(1)
    return ((a * t).sum(0) / a.sum(0)).float()


def sgd(steps: int | None = 1, lr: float = 0.1, **changes: Any) -> LocalTraining:
    return LocalTraining(batch_size=100, steps=steps, optimizer="sgd", lr=lr, max_grad_norm=None, **changes)


def federate(
    shards: Sequence[Tensor],
    algorithm: Algorithm,
    training: LocalTraining,
    rule: str = "mean",
    attack: Callable[[ThreatView], Tensor] | None = None,
    per_round: int | None = None,
    **settings: Any,
) -> Federation:
    """Clients c0, c1, ... on bowls; c0 is malicious where there is an attack."""
    d = shards[0].shape[-1]
    return Federation(
        task=Bowl(d),
        clients=[Client(f"c{i}", shard) for i, shard in enumerate(shards)],
        training=training,
        machine=Machine(Accelerator(cpu=True)),
        algorithm=algorithm,
        defense=Pipeline([], resolve(rule, settings, MENU, "defense.rule"), []),
        threat=Threat(malicious=frozenset({"c0"}), seed=0, update=(attack,)) if attack is not None else None,
        evaluation=None,
        vector=torch.zeros(d),
        per_round=per_round,
    )
