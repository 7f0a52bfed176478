"""Server rules: (vector, defended update) -> new vector. Their memory is made of defended updates only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.errors import RecipeError
from fedllm_sec.protocols import ServerContext


class Sgd:
    """x += lr * v, v = momentum * v + update."""

    def __init__(self, *, lr: float, momentum: float) -> None:
        if lr <= 0:
            raise RecipeError(f"algorithm: the server's learning rate is {lr}: must be above 0.")
        if not 0 <= momentum < 1:
            raise RecipeError(f"algorithm: the server's momentum is {momentum}: must be at least 0 and below 1.")
        self.lr, self.momentum = lr, momentum
        self.velocity: Tensor | None = None

    def __call__(self, vector: Tensor, update: Tensor, ctx: ServerContext) -> Tensor:
        if self.momentum:
            self.velocity = update if self.velocity is None else self.momentum * self.velocity + update
            update = self.velocity
        return vector + self.lr * update

    def state_dict(self) -> dict[str, Any]:
        return {} if self.velocity is None else {"velocity": self.velocity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.velocity = state.get("velocity")


class Adaptive:
    """FedAdam, FedYogi, FedAdagrad: x += lr * m / (sqrt(v) + tau), no bias correction (Reddi et al. 2021, alg. 2).

    v starts at tau^2, as in the paper's experiments.
    """

    def __init__(self, *, kind: str, lr: float, beta1: float, beta2: float, tau: float) -> None:
        if kind not in ("adam", "yogi", "adagrad"):
            raise RecipeError(f'fedopt.optimizer: there is no adaptive "{kind}". Known: adam, adagrad, yogi.')
        if lr <= 0 or tau <= 0 or not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
            raise RecipeError(
                f"fedopt: needs server_lr > 0, tau > 0 and betas in [0, 1), got {lr}, {tau}, {beta1}, {beta2}."
            )
        self.kind, self.lr, self.beta1, self.beta2, self.tau = kind, lr, beta1, beta2, tau
        self.m: Tensor | None = None
        self.v: Tensor | None = None

    def __call__(self, vector: Tensor, update: Tensor, ctx: ServerContext) -> Tensor:
        square = update.square()
        m = torch.zeros_like(update) if self.m is None else self.m
        v = torch.full_like(update, self.tau**2) if self.v is None else self.v
        self.m = self.beta1 * m + (1 - self.beta1) * update
        if self.kind == "adam":
            self.v = self.beta2 * v + (1 - self.beta2) * square
        elif self.kind == "yogi":
            self.v = v - (1 - self.beta2) * square * torch.sign(v - square)
        else:
            self.v = v + square
        return vector + self.lr * self.m / (self.v.sqrt() + self.tau)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.m is None else {"m": self.m, "v": self.v}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.m, self.v = state.get("m"), state.get("v")


class EffectiveSteps:
    """FedNova's server: x += lr * tau_eff * u, u the defended mean of rows that are each divided by their steps.

    tau_eff = sum_i p_i tau_i with p_i the defense's own row weights, so that a client it rejects has no say in it;
    uniform p_i where the rule has no weights, or negative ones. In the factors t / tau_i the rows were given, t stands
    for one common number of steps, so tau_eff / t = sum_i p_i / factor_i.
    """

    def __init__(self, *, lr: float) -> None:
        if not lr > 0:
            raise RecipeError(f"fednova: needs server_lr > 0, got {lr}.")
        self.lr = lr

    def __call__(self, vector: Tensor, update: Tensor, ctx: ServerContext) -> Tensor:
        assert ctx.factors is not None
        p = torch.ones_like(ctx.factors) if ctx.weights is None else ctx.weights.to(ctx.factors)
        if not (bool((p >= 0).all()) and float(p.sum()) > 0):
            p = torch.ones_like(ctx.factors)
        return vector + self.lr * float((p / p.sum() / ctx.factors).sum()) * update


class ControlledSgd:
    """SCAFFOLD's server: x += lr * u and c += |S|/N * mean_i (c_i_new - c_i) (Karimireddy et al. 2020, alg. 1).

    With option II a client's c_i moves by -c - delta_i / (K lr_local). So the mean over the round is
    -c - u / (K lr_local), with the defended u in the place of the mean of deltas: no control variate travels that the
    defense has not seen. For u = sum_i w_i delta_i of any weights, |S|/N and the parts of c_i become those of taken.py.
    """

    def __init__(self, *, lr: float) -> None:
        if not lr > 0:
            raise RecipeError(f"scaffold: needs server_lr > 0, got {lr}.")
        self.lr = lr
        self.c: Tensor | None = None

    def control(self, vector: Tensor) -> Tensor:
        """c (d,), which starts at 0."""
        return torch.zeros_like(vector) if self.c is None else self.c.clone()

    def __call__(self, vector: Tensor, update: Tensor, ctx: ServerContext) -> Tensor:
        c = self.control(vector)
        self.c = c - ctx.share * (ctx.weight * c + update / (ctx.steps * ctx.lr))
        return vector + self.lr * update

    def state_dict(self) -> dict[str, Any]:
        return {} if self.c is None else {"c": self.c}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.c = state.get("c")


class DynamicServer:
    """FedDyn's server: h -= alpha |P|/N u, x += u - h / alpha, with u the defended mean (Acar et al. 2021, alg. 1).

    So h is the mean of the clients' g_i. For other means than the uniform one |P|/N becomes the share of taken.py.
    """

    def __init__(self, *, alpha: float) -> None:
        self.alpha = alpha
        self.h: Tensor | None = None

    def __call__(self, vector: Tensor, update: Tensor, ctx: ServerContext) -> Tensor:
        h = torch.zeros_like(update) if self.h is None else self.h
        self.h = h - (self.alpha * ctx.share) * update
        return vector + update - self.h / self.alpha

    def state_dict(self) -> dict[str, Any]:
        return {} if self.h is None else {"h": self.h}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.h = state.get("h")
