"""What local training a method can work with: each function gives the training to use, or says what to change."""

from __future__ import annotations

import math
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
    of tau gradients counts once, the one before 1 + rho times; Nesterov's look ahead is one more term in each. Where
    the learning rate falls over the steps, to shares s_j of the round's, it is sum_j s_j (1 - rho^(j+1)) / (1 - rho),
    j from 0, of whole steps.
    """
    rho, tau = training.momentum, torch.as_tensor(steps, dtype=torch.float64)
    if training.lr_in_round != "constant":
        tau = tau.round()
    late = rho * _shares(tau, rho, training.lr_in_round)  # rho s_0 + ... + rho^tau s_(tau-1)
    return (_shares(tau, 1.0, training.lr_in_round) - (rho * late if training.nesterov else late)) / (1 - rho)


def _shares(tau: Tensor, rho: float, schedule: str) -> Tensor:
    """sum_j s_j rho^j over j from 0 to tau - 1, (n,): in closed form, as a claim may be any number."""
    last = (tau - 1).clamp_min(1)  # s of one step is 1
    if schedule == "linear":  # s_j = 1 - 0.9 j / last
        if rho == 1:
            return torch.where(tau > 1, 0.55 * tau, tau)
        slope = rho * (1 - tau * rho ** (tau - 1) + (tau - 1) * rho**tau) / (1 - rho) ** 2  # sum_j j rho^j
        return _powers(tau, rho) - 0.9 / last * slope
    if schedule == "cosine":  # s_j = 0.55 + 0.45 cos(pi j / last)
        if rho == 1:
            return torch.where(tau > 1, 0.55 * tau, tau)
        turn = torch.polar(torch.full_like(tau, rho), math.pi / last)
        wave = ((1 - torch.polar(rho**tau, math.pi * tau / last)) / (1 - turn)).real
        return 0.55 * _powers(tau, rho) + 0.45 * wave
    return _powers(tau, rho)


def _powers(tau: Tensor, rho: float) -> Tensor:
    return tau if rho == 1 else (1 - rho**tau) / (1 - rho)


def equal_sgd_steps(training: LocalTraining, sizes: Sequence[int] | None) -> LocalTraining:
    """SCAFFOLD's option II reads the mean gradient off the row: (x - y_i) / (K lr)."""
    problems = _plain_sgd(training, "scaffold", "reads gradients off the rows, (x - y) / (K lr)")
    problems += _unclipped(training, "scaffold", "reads gradients off the rows, and would read clipped ones")
    if training.lr_in_round != "constant":
        problems.append(
            f"clients.lr_in_round: {training.lr_in_round}: scaffold reads gradients off the rows, (x - y) / (K lr), of "
            "steps that count alike. Set clients.lr_in_round: constant."
        )
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
