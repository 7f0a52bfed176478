"""What local training a method can work with: each function gives the training to use, or says what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedllm_sec.errors import RecipeError
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.protocols import LocalTraining


def _plain_sgd(training: LocalTraining, name: str, reason: str) -> list[str]:
    if training.optimizer != "sgd":
        return [f"clients.optimizer: {training.optimizer!r}: {name} {reason}. Set clients.optimizer: sgd."]
    if training.momentum:
        return [f"clients.momentum: {training.momentum:g}: {name} {reason}. Set clients.momentum: 0."]
    return []


def _unclipped(training: LocalTraining, name: str, reason: str) -> list[str]:
    if training.max_grad_norm is None:
        return []
    return [f"clients.max_grad_norm: {training.max_grad_norm}: {name} {reason}. Set clients.max_grad_norm: null."]


def one_full_batch_step(training: LocalTraining, sizes: Sequence[int] | None) -> LocalTraining:
    """FedSGD: every client sends lr times the gradient of its whole shard."""
    problems = _plain_sgd(training, "fedsgd", "sends a gradient, which another optimizer would reshape")
    problems += _unclipped(training, "fedsgd", "sends a gradient as it is")
    if (training.steps or training.epochs) != 1:
        problems.append(
            f"clients.local_steps: {training.steps or training.epochs}: fedsgd takes one step on the whole shard. "
            "Set clients.local_steps: 1, or use fedavg."
        )
    if problems:
        raise RecipeError(problems)
    return replace(training, batch_size=None, steps=1, epochs=None)


def countable_steps(training: LocalTraining, sizes: Sequence[int] | None) -> LocalTraining:
    """FedNova divides by ||a_i||_1, which is known for SGD, with momentum or without."""
    if training.optimizer != "sgd":
        raise RecipeError(
            f"clients.optimizer: {training.optimizer!r}: fednova divides rows by what their steps of SGD sum to. Set "
            "clients.optimizer: sgd."
        )
    return training


def way(steps: Tensor | float, training: LocalTraining) -> Tensor:
    """||a_i||_1 of so many SGD steps: how often their gradients count in the row, in learning rates (n,).

    tau without momentum; with it [tau - rho (1 - rho^tau) / (1 - rho)] / (1 - rho) (Wang et al. 2020, sec. 4). The last
    of tau gradients counts once, the one before 1 + rho times; Nesterov's look ahead is one more term in each.
    """
    rho, tau = training.momentum, torch.as_tensor(steps, dtype=torch.float64)
    late = rho * (1 - rho**tau) / (1 - rho)  # rho + ... + rho^tau
    return (tau - (rho * late if training.nesterov else late)) / (1 - rho)


def equal_sgd_steps(training: LocalTraining, sizes: Sequence[int] | None) -> LocalTraining:
    """SCAFFOLD's option II reads the mean gradient off the row: (x - y_i) / (K lr)."""
    problems = _plain_sgd(training, "scaffold", "reads gradients off the rows, (x - y) / (K lr)")
    problems += _unclipped(training, "scaffold", "reads gradients off the rows, and would read clipped ones")
    steps = sorted({training.steps_of(size) for size in sizes or ()})
    if len(steps) > 1:
        problems.append(
            f"clients.local_epochs: {training.epochs}: shards of different sizes give {steps[0]} to {steps[-1]} local "
            "steps, and scaffold's control variates need the same number everywhere. Set clients.local_steps instead."
        )
    if problems:
        raise RecipeError(problems)
    return training


def step_factors(steps: Tensor, training: LocalTraining, *, cap: float) -> Tensor:
    """way(t) / way(tau_i) for claimed steps tau_i (n,), with t their median: rows as long as those of t steps.

    FedNova's 1 / ||a_i||_1 up to what is common, which its server rule takes out again; so rows keep the length of
    deltas, and equal claims change nothing. A claim counts for t / cap to t * cap; one that is no number of at least 1
    for t.
    """
    usable = steps.isfinite() & (steps >= 1)
    if not bool(usable.any()):
        return torch.ones_like(steps)
    middle = midpoint(steps[usable])
    counted = torch.where(usable, steps, middle).clamp(middle / cap, middle * cap)
    return (way(middle, training) / way(counted, training)).to(steps.dtype)
