"""Local training that hides or lasts: Neurotoxin, SDBA, a norm ball, and an anomaly term in the loss.

A rule is called around every optimizer step of a malicious client; its memory of one round is made at step 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import LocalContext


class Neurotoxin:
    """Train only where the others rarely move, so that they do not overwrite it (Zhang et al. 2022, algorithm 1).

    The gradient is zero on the share `top` of coordinates that last round's global step moved most, and these
    coordinates are put back to the received value after each step, which also undoes momentum and weight decay
    there. In the first round no step has been seen and nothing is masked.
    """

    def __init__(self, *, top: float = 0.1) -> None:
        if not 0 < top < 1:
            raise AttackError(f"neurotoxin.top: {top}: must be between 0 and 1, a share of the coordinates.")
        self.top = top
        self.masked: Tensor | None = None  # (k,) coordinates that stay

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        if step == 0:
            self.masked = self.coordinates(ctx.last_update)
        if self.masked is not None and parameters.grad is not None:
            parameters.grad[self.masked] = 0.0

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        if self.masked is not None:
            with torch.no_grad():
                parameters[self.masked] = ctx.start.to(parameters)[self.masked]

    def coordinates(self, last_update: Tensor | None) -> Tensor | None:
        """The coordinates that moved most; at least one and never those that did not move."""
        if last_update is None or not bool(last_update.any()):
            return None
        sizes = last_update.abs()
        found = sizes.topk(max(1, round(self.top * len(sizes)))).indices
        return found[sizes[found] > 0]


# Part of a parameter's name -> the share of its coordinates, of the smallest gradient on clean rows, that SDBA trains:
# the numbers of the authors' commands for LSTMs, GPT-2 and T5; Llama's two matrices stand where GPT-2 has its c_fc.
SDBA_LAYERS = {"weight_ih": 0.2, "weight_hh": 1.0, "mlp.c_fc": 1.0, "mlp.gate_proj": 1.0, "mlp.up_proj": 1.0,
               "DenseReluDense": 0.9}  # fmt: skip


def quiet_coordinates(gradient: Tensor, layout: Layout, layers: Mapping[str, float]) -> Tensor:
    """Which coordinates (d,) lie in a layer that `layers` names and are among its share of smallest |gradient|: bool.

    A name counts by the first of `layers` that it holds; a share is rounded down, and equal gradients count in order.
    """
    quiet = torch.zeros(layout.size, dtype=torch.bool, device=gradient.device)
    for name, place in layout.slices().items():
        share = next((share for part, share in layers.items() if part in name), 0.0)
        sizes = gradient[place].abs()
        quiet[place.start + sizes.argsort(stable=True)[: math.floor(share * len(sizes) + 1e-9)]] = True
    return quiet


class SDBA:
    """Train only chosen layers, and in them only where clean rows ask for little (Choe et al. 2024, SDBA, sec. IV).

    Layer-wise masking: all but the parameters whose names hold a key of `layers` stay as received. Top-k masking: of
    each of these, only the given share with the smallest |g| is trained, g the gradient of clean rows at the received
    model, taken anew in every round of the attack. Without `layers` they are the authors': in GPT-2 the first matrix of
    every MLP (whole), in T5 those of the MLPs (0.9), in LSTMs the inner weights (0.2 and whole). On LoRA the factors of
    such a layer are such parameters, A and B each by itself. `pgd` beside it is the authors' projection.

    Stated here: Llama's gate_proj and up_proj count as GPT-2's c_fc. g comes from `batches` batches of the attacker's
    own rows as they were before poisoning (all of them where none is poisoned); the authors take 30 to 90 other
    participants' batches. What is masked is also put back after each step, against momentum and weight decay. At B = 0,
    LoRA's usual start, the gradient of A is 0 everywhere, and its first coordinates count as the smallest.
    """

    def __init__(self, *, layers: dict[str, float] | None = None, batches: int = 8) -> None:
        self.layers: Mapping[str, float] = SDBA_LAYERS if layers is None else layers
        if not self.layers or not all(0 < share <= 1 for share in self.layers.values()):
            raise AttackError(f"sdba.layers: {dict(self.layers)}: needs a name or more, each with a share from 0 to 1.")
        if batches < 1:
            raise AttackError(f"sdba.batches: {batches}: must be at least 1.")
        self.batches = batches
        self.clean: dict[str, Any] = {}  # client id -> its rows before poisoning
        self.masked: Tensor | None = None  # (d,) bool, what stays as received

    def prepare(self, task: Any, steps: Sequence[int]) -> None:
        """An error where no trained parameter lies in a layer of `layers`."""
        names = task.layout.names
        if not any(part in name for part in self.layers for name in names):
            raise AttackError(
                f"sdba.layers: none of {', '.join(self.layers)} is part of the name of a trained parameter (such as "
                f"{names[0]} or {names[-1]}). Name the layers."
            )

    def brief(self, cohort: int, clean: Mapping[str, Any], poisoned: Mapping[str, Any]) -> None:
        """What is known before the first round: clients a round, and own rows before and after poisoning, by client."""
        self.clean = {id: clean[id] for id in poisoned if id in clean}

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        if step == 0:
            assert ctx.gradient is not None
            gradient = ctx.gradient(self.clean.get(ctx.client.id, ctx.client.shard), self.batches)
            self.masked = ~quiet_coordinates(gradient, ctx.layout, self.layers)
        assert self.masked is not None
        if parameters.grad is not None:
            parameters.grad.masked_fill_(self.masked, 0.0)

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        assert self.masked is not None
        with torch.no_grad():
            parameters.copy_(torch.where(self.masked, ctx.start.to(parameters), parameters))


class PGD:
    """Projected gradient descent: after each step back into a ball around the received model (Wang et al. 2020, sec.
    3).

    `radius` is the ball's radius as a number; without it the radius is `relative` times the length of last round's
    global step. In a round before any step was seen a relative radius is an error, so start the attack in round 2.
    A round whose step was zero keeps the radius of the one before.
    """

    def __init__(self, *, radius: float | None = None, relative: float = 1.0) -> None:
        for name, value in (("radius", radius), ("relative", relative)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise AttackError(f"pgd.{name}: {value}: must be a positive number.")
        self.radius, self.relative = radius, relative
        self.seen: float | None = None  # length of the last global step that was not zero

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        if step == 0 and ctx.last_update is not None:
            self.see(ctx.last_update)

    def see(self, last_update: Tensor) -> None:
        """Remember the length of the last global step (d,); a step of 0 is none."""
        self.seen = float(last_update.double().norm()) or self.seen

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        radius = self.reach(ctx)
        start = ctx.start.to(parameters)
        with torch.no_grad():
            delta = parameters - start
            length = float(delta.double().norm())
            if length > radius:
                parameters.copy_(start + delta * (radius / length))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]

    def reach(self, ctx: LocalContext) -> float:
        """The ball's radius in this round."""
        if self.radius is not None:
            return self.radius
        if self.seen is None:
            raise AttackError(
                f"pgd: round {ctx.round} has no earlier global step to be relative to. Set pgd.radius, or "
                "attack.start to 2 or later."
            )
        return self.relative * self.seen


class ConstrainAndScale:
    """The loss alpha * task + (1 - alpha) * anomaly (Bagdasaryan et al. 2020, sec. 4.3).

    The anomaly term is the distance ||w - w_g|| to the received model, as a server that looks at lengths would see it;
    its gradient is the unit vector towards w. After training, `model_replacement` does the scaling. The task loss runs
    over a shard of clean and poisoned rows, so it is the paper's mix of both (`rate` of the data attack).
    """

    def __init__(self, *, alpha: float = 0.7) -> None:
        if not 0 < alpha < 1:
            raise AttackError(
                f"constrain_and_scale.alpha: {alpha}: must be between 0 and 1; 1 would be plain training."
            )
        self.alpha = alpha

    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        if parameters.grad is None:
            return
        away = parameters.detach() - ctx.start.to(parameters)
        length = float(away.double().norm())
        parameters.grad.mul_(self.alpha)
        if length > 0:
            parameters.grad.add_(away, alpha=(1 - self.alpha) / length)

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        """Nothing: the anomaly term is in the gradient."""
