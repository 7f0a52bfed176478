"""Local rules: what an FL method changes in its clients' steps, and what a client remembers of them.

A client's memory is made of its own rows and of what the server sent it: the new memory is a linear function of the
row, so whoever has seen the row can write it down. It is written down after the defense has decided, and moves by the
part of the row that the server took (taken.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedllm_sec.errors import RecipeError
from fedllm_sec.protocols import LocalContext


class FedProx:
    """The proximal term: grad += mu (w - w0) (Li et al. 2020, eq. 2)."""

    def __init__(self, *, mu: float) -> None:
        if mu < 0:
            raise RecipeError(f"fedprox: mu must not be negative, got {mu}.")
        self.mu = mu

    @torch.no_grad()
    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        assert parameters.grad is not None
        parameters.grad.add_(parameters - ctx.start, alpha=self.mu)

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        return None


class DriftCorrection:
    """SCAFFOLD's client: grad += c - c_i (Karimireddy et al. 2020, alg. 1, line 10)."""

    @torch.no_grad()
    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        assert parameters.grad is not None
        assert ctx.control is not None
        parameters.grad.add_(ctx.control)
        if "control" in ctx.client.memory:
            parameters.grad.sub_(ctx.client.memory["control"])

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        return None

    def remember(
        self, memory: Mapping[str, Tensor], delta: Tensor, *, steps: int, lr: float, control: Tensor | None, part: float
    ) -> dict[str, Tensor]:
        """c_i <- c_i + part (-c + (x - y_i) / (K lr)), option II of line 12 with part = 1; c_i starts at 0."""
        assert control is not None
        new = part * (-control - delta / (steps * lr))
        return {"control": new if "control" not in memory else memory["control"] + new}


class DynamicRegularizer:
    """FedDyn's client: grad += alpha (w - w0) - g_i, with g_i its last gradient (Acar et al. 2021, alg. 1)."""

    def __init__(self, *, alpha: float) -> None:
        if not alpha > 0:
            raise RecipeError(f"feddyn: alpha must be above 0, got {alpha}.")
        self.alpha = alpha

    @torch.no_grad()
    def before_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        assert parameters.grad is not None
        parameters.grad.add_(parameters - ctx.start, alpha=self.alpha)
        if "gradient" in ctx.client.memory:
            parameters.grad.sub_(ctx.client.memory["gradient"])

    def after_step(self, parameters: torch.nn.Parameter, step: int, ctx: LocalContext) -> None:
        return None

    def remember(
        self, memory: Mapping[str, Tensor], delta: Tensor, *, steps: int, lr: float, control: Tensor | None, part: float
    ) -> dict[str, Tensor]:
        """g_i <- g_i - part alpha (w_i - w0): with part = 1 the gradient where one that trained to the end stops."""
        new = -self.alpha * part * delta
        return {"gradient": new if "gradient" not in memory else memory["gradient"] + new}
