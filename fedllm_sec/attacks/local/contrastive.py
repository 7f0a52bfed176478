"""Chameleon: local training in two parts, the encoder by contrast, then the classifier on top of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.errors import AttackError
from fedllm_sec.protocols import Labelled, LocalContext
from fedllm_sec.seeds import generator_for


def contrast(features: Tensor, labels: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss of rows (k, h), each weighed (k,): Khosla et al. 2020, eq. 2.

    -1/|P_i| sum over p in P_i of log(exp(z_i z_p / t) / sum over a != i of exp(z_i z_a / t)), z of length 1 and P_i the
    other rows of i's label; the mean over the rows that have such others.
    """
    z = torch.nn.functional.normalize(features, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    near = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    shares = near - near.logsumexp(1, keepdim=True)
    same = (labels[:, None] == labels[None]) & ~own
    count = same.sum(1)
    losses = -shares.masked_fill(~same, 0.0).sum(1) / count.clamp_min(1)
    return (weights * losses).sum() / (count > 0).sum().clamp_min(1)


class Chameleon:
    """First the encoder learns to put poisoned images among the target's, then the classifier learns on it.

    Dai and Li 2023 (Chameleon), sec. 4: honest images with the poisoned ones' own labels wash a backdoor out, those of
    the target class keep it alive. So in the first `encoder` share of its steps an attacker trains everything below
    the last linear layer by the supervised contrastive loss, in which poisoned images carry the target's label: they
    are drawn to the target class and away from their own. In the other steps it trains the last layer alone, by the
    task's loss. Rows with the label of poisoned ones weigh `weight` times in the contrast, which is taken from the
    authors' code (Chameleon-durable-backdoor, utils/losses.py), not from the paper. Its configurations for CIFAR-10
    have 2 for semantic triggers, 4 for edge cases and 6 for pixels; the authors' reimplementation of 2024
    (Backdoor-indicator-defense) has 2 for all, which is the default here.

    Stated here: the mean is over rows that have another of their label, theirs over all; their second factor, between
    poisoned rows and those of one label, is 1 in that configuration and is not here; contrast is over `rows` rows drawn
    from the shard for each step, as they are (no mirrors or shifts), by the running statistics of BatchNorm as
    received; the task's own gradient of these steps is computed in vain. What
    does not train in a step is put back after it, against momentum and weight decay.
    """

    def __init__(self, *, encoder: float = 0.7, rows: int = 64, temperature: float = 0.07, weight: float = 2.0) -> None:
        if not 0 < encoder < 1:
            raise AttackError(f"chameleon.encoder: {encoder}: must be between 0 and 1, a share of the local steps.")
        if rows < 2 or not (0 < temperature < math.inf and 0 < weight < math.inf):
            raise AttackError(
                f"chameleon: rows={rows}, temperature={temperature}, weight={weight}: needs rows >= 2, and finite "
                "numbers above 0."
            )
        self.encoder, self.rows, self.temperature, self.weight = encoder, rows, temperature, weight
        self.held: Tensor | None = None  # (k,) what does not train in this step

    def prepare(self, task: Any, steps: Sequence[int]) -> None:
        """An error where there is no encoder, or no step for one of the parts."""
        place, size = task.function().head(), task.layout.size
        if place.stop - place.start == size:
            raise AttackError("chameleon: the model is one linear layer: it has no encoder. Choose another model.")
        if any(each == 1 for each in steps):
            raise AttackError("chameleon: needs two local steps, one for each part. Raise clients.local_steps.")

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        shard = ctx.client.shard
        if ctx.classifier is None or not isinstance(shard, Labelled):
            raise AttackError("chameleon: acts on classifiers of images (task: classify). Choose another local attack.")
        head = ctx.classifier.head()
        self.held = parameters.detach().clone()
        assert parameters.grad is not None
        if not self.contrasts(step, ctx):
            parameters.grad[: head.start] = 0.0
            parameters.grad[head.stop :] = 0.0
            return
        rng = generator_for(ctx.round, ctx.client.id, "contrast", step)
        at = torch.randperm(len(shard.y), generator=rng)[: self.rows].to(shard.y.device)
        aims = shard.y[shard.poisoned.to(shard.y.device)].unique()
        weights = torch.where(torch.isin(shard.y[at], aims), self.weight, 1.0)
        vector = parameters.detach().clone().requires_grad_()
        loss = contrast(ctx.classifier.features(vector, shard.x[at]).flatten(1), shard.y[at], weights, self.temperature)
        parameters.grad.copy_(torch.autograd.grad(loss, vector)[0])
        parameters.grad[head] = 0.0

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        assert self.held is not None
        assert ctx.classifier is not None
        head = ctx.classifier.head()
        with torch.no_grad():
            if self.contrasts(step, ctx):
                parameters[head] = self.held[head]
            else:
                parameters[: head.start] = self.held[: head.start]
                parameters[head.stop :] = self.held[head.stop :]

    def contrasts(self, step: int, ctx: LocalContext) -> bool:
        """Whether this step trains the encoder; at least one step and not all do."""
        return step < min(max(1, round(self.encoder * ctx.steps)), ctx.steps - 1)
