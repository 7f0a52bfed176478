"""Anticipate: a backdoor that is trained through the next rounds of honest training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedllm_sec.errors import AttackError
from fedllm_sec.protocols import Labelled, LocalContext
from fedllm_sec.seeds import generator_for

Loss = Callable[[Tensor], Tensor]  # of a vector (d,)


def moved(vector: Tensor, loss: Tensor, *, lr: float | None, length: float) -> Tensor:
    """One honest step from a vector (d,), differentiable in it: by `lr` times the gradient, or None: of this length."""
    (gradient,) = torch.autograd.grad(loss, vector, create_graph=True)
    if lr is None:
        norm = float(gradient.detach().norm())
        lr = length / norm if norm > 0 else 0.0
    return vector - lr * gradient


@sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative
def anticipated(
    start: Tensor, own: Tensor, honest: Callable[[int], Loss], backdoor: Loss, *, steps: int, share: float,
    lr: float | None = None, length: float = 0.0,
) -> Tensor:  # fmt: skip
    """The gradient (d,) in the attacker's model `own` (d,) of the backdoor's loss, summed over the next `steps` models.

    t_1 = share own + (1 - share) h(start), t_(i+1) = h(t_i), with h a step of honest training by the loss honest(i).
    """
    received, mine = (vector.detach().clone().requires_grad_() for vector in (start, own))
    others = moved(received, honest(0)(received), lr=lr, length=length).detach()
    at = share * mine + (1 - share) * others
    total = backdoor(at)
    for i in range(1, steps):
        at = moved(at, honest(i)(at), lr=lr, length=length)
        total = total + backdoor(at)
    return torch.autograd.grad(total, mine)[0]


class Anticipate:
    """Train for the models that come after the next `steps` rounds, not for the one that is sent.

    Wen et al. 2022 (Thinking Two Moves Ahead), sec. 3: the attacker's model goes into the mean with what the others are
    guessed to send, an honest step on its own clean rows; the following rounds are such steps of everybody; the
    backdoor's loss of each of these models is added up, and its gradient taken through them all. `share` is the part of
    the next model that is the attacker's: by default 1 / n for n clients a round, 1 where model_replacement makes the
    update large enough to replace the model. `lr` is that of the guessed steps; without it such a step has the length
    of the last global step, which every client sees, so an attack that starts in round 1 needs `lr`.

    Stated here: the gradient is divided by `share`, so that clients.lr means what it does elsewhere; a guessed round is
    one step on `rows` rows drawn anew (the authors' code: one batch, for each local epoch); the backdoor's loss runs
    over `rows` rows of the shard, clean and poisoned as `rate` mixes them; the task's own gradient of the steps is
    computed in vain; images are taken as they are (no mirrors or shifts), BatchNorm by its statistics as received. It
    is a gradient of gradients: a step holds the activations of `steps` models, those of their gradients too, at once.
    """

    def __init__(self, *, steps: int = 3, share: float | None = None, lr: float | None = None, rows: int = 64) -> None:
        if steps < 2 or rows < 1:
            raise AttackError(f"anticipate: steps={steps}, rows={rows}: needs steps >= 2 and rows >= 1.")
        if share is not None and not 0 < share <= 1:
            raise AttackError(f"anticipate.share: {share}: must be more than 0 and at most 1.")
        if lr is not None and not (math.isfinite(lr) and lr > 0):
            raise AttackError(f"anticipate.lr: {lr}: must be a positive number.")
        self.steps, self.share, self.lr, self.rows = steps, share, lr, rows

    def brief(self, cohort: int, clean: Mapping[str, Any], poisoned: Mapping[str, Any]) -> None:
        """What is known before the first round: clients a round, and own rows before and after poisoning, by client."""
        self.share = 1 / cohort if self.share is None else self.share
        for id, shard in poisoned.items():
            if isinstance(shard, Labelled) and bool(shard.poisoned.all()):
                raise AttackError(
                    f"anticipate: all rows of client {id} are poisoned: it has none to guess honest training from. "
                    "Lower the rate of attack.data."
                )

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        shard, classifier = ctx.client.shard, ctx.classifier
        if classifier is None or not isinstance(shard, Labelled):
            raise AttackError("anticipate: acts on classifiers of images (task: classify). Choose another attack.")
        if self.lr is None and ctx.last_update is None:
            raise AttackError(
                f"anticipate: round {ctx.round} has no earlier global step to guess the next ones by. Set "
                "anticipate.lr, or attack.start to 2 or later."
            )
        if self.share is None:
            raise AttackError("anticipate.share: how many clients take part is not known here. Set it, 1 / n for n.")
        rng = generator_for(ctx.round, ctx.client.id, "foresight", step)
        clean = (~shard.poisoned).nonzero().flatten()

        def loss(among: Tensor) -> Loss:
            at = among[torch.randperm(len(among), generator=rng)[: self.rows].to(among.device)].to(shard.y.device)
            x, y = shard.x[at], shard.y[at]
            return lambda vector: torch.nn.functional.cross_entropy(classifier.logits(vector, x), y)

        batches = [loss(clean) for _ in range(self.steps)]
        gradient = anticipated(
            ctx.start.to(parameters), parameters, batches.__getitem__, loss(torch.arange(len(shard.y))),
            steps=self.steps, share=self.share, lr=self.lr,
            length=0.0 if ctx.last_update is None else float(ctx.last_update.norm()),
        )  # fmt: skip
        assert parameters.grad is not None
        parameters.grad.copy_(gradient / self.share)

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        """Nothing: what comes next is in the gradient."""
