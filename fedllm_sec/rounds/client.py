"""The one training loop: every client of every model trains here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedllm_sec.protocols import Client, LocalContext, LocalResult, LocalRule, LocalTraining, Task
from fedllm_sec.seeds import generator_for, seed_for


class Stepper(Protocol):
    """How a gradient is computed and applied on this machine (precision, accumulation, processes)."""

    def backward(self, task: Task, shard: Any, rows: Sequence[int]) -> Tensor: ...
    def step(self, optimizer: torch.optim.Optimizer) -> None: ...
    def unscale(self, optimizer: torch.optim.Optimizer) -> None: ...


def make_optimizer(task: Task, training: LocalTraining) -> torch.optim.Optimizer:
    """One optimizer for all clients: its state is cleared, not rebuilt, between them."""
    if training.optimizer == "sgd":
        return torch.optim.SGD([task.parameters], lr=training.lr, weight_decay=training.weight_decay)
    return torch.optim.AdamW(
        [task.parameters], lr=training.lr, betas=training.betas, weight_decay=training.weight_decay, foreach=False
    )


def endless(task: Task, shard: Any, size: int, rng: torch.Generator) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from task.batches(shard, size, rng)


def train_locally(
    task: Task,
    client: Client,
    start: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    stepper: Stepper,
    training: LocalTraining,
    rules: Sequence[LocalRule] = (),
    round: int,
    rounds: int,
    seed: int,
    last_update: Tensor | None = None,
    control: Tensor | None = None,
) -> LocalResult:
    """Train from `start` (d,) on the client's shard and give the delta (d,).

    Batches and dropout depend on (seed, round, client) alone. `start` is not changed.
    """
    rng = generator_for(seed, round, client.id, "batches")
    size = task.size(client.shard)
    steps = training.steps_of(size)
    context = LocalContext(client, round, start, last_update, task.layout, steps, control)
    parameters = task.parameters
    with torch.no_grad():
        parameters.copy_(start)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = training.lr_at(round, rounds)

    torch.manual_seed(seed_for(seed, round, client.id, "dropout"))  # dropout knows no generator of its own
    losses = []
    batches = endless(task, client.shard, training.batch_size or max(1, size), rng)
    for step in range(steps):
        parameters.grad.zero_()  # type: ignore[union-attr]
        losses.append(stepper.backward(task, client.shard, next(batches)))
        stepper.unscale(optimizer)
        for rule in rules:
            rule.before_step(parameters, step, context)
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([parameters], training.max_grad_norm)
        stepper.step(optimizer)
        for rule in rules:
            rule.after_step(parameters, step, context)
    delta = parameters.detach() - start
    mean_loss = float(torch.stack(losses).mean()) if losses else float("nan")
    return LocalResult(client.id, delta, float(size), steps, mean_loss)
