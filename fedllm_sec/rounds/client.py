"""The one training loop: every client of every model trains here."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedllm_sec.defenses.dp_sgd import DpSgd
from fedllm_sec.errors import RecipeError
from fedllm_sec.matrix.shown import copied
from fedllm_sec.matrix.updates import new_rows
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
        return torch.optim.SGD(
            [task.parameters],
            lr=training.lr,
            momentum=training.momentum,
            nesterov=training.nesterov,
            weight_decay=training.weight_decay,
        )
    return torch.optim.AdamW(
        [task.parameters], lr=training.lr, betas=training.betas, weight_decay=training.weight_decay, fused=True
    )


def endless(task: Task, shard: Any, size: int, rng: torch.Generator) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from task.batches(shard, size, rng)


def private_of(rules: Sequence[LocalRule]) -> DpSgd | None:
    """The first of the rules that draws its own batches."""
    return next((rule for rule in rules if isinstance(rule, DpSgd)), None)


def batches_of(task: Task, shard: Any, batch: int | None, rng: torch.Generator, own: DpSgd | None) -> Iterator[Any]:
    """Row numbers of step after step, as a rule draws them or epoch after epoch."""
    size = task.size(shard)
    return own.batches(size, batch, rng) if own is not None else endless(task, shard, batch or max(1, size), rng)


def gradient_of(task: Task, stepper: Stepper, size: int, rng: torch.Generator, shard: Any, batches: int) -> Tensor:
    """The gradient (d,) at the present parameters, summed over `batches` batches drawn from a shard.

    Under fp16 it is scaled. The task's own gradient, its buffers and what dropout draws next are as before.
    """
    parameters, beside = task.parameters, getattr(task, "buffers", None)
    assert parameters.grad is not None
    held, kept = parameters.grad.clone(), None if beside is None else beside.read()
    with torch.random.fork_rng(devices=[parameters.device] if parameters.device.type == "cuda" else []):
        parameters.grad.zero_()
        for rows in itertools.islice(endless(task, shard, size, rng), batches):
            stepper.backward(task, shard, rows)
    found = parameters.grad.clone()
    parameters.grad.copy_(held)
    if kept is not None:
        beside.write(kept)  # type: ignore[union-attr]
    return found


def seed_layers(device: torch.device, seed: int) -> None:
    """Seed what dropout draws from, which knows no generator of its own.

    torch.manual_seed writes down the stack for each kind of device that is not in use: 0.5 ms, 2 % of a LeNet's round.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


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
    buffers: Tensor | None = None,
    before: int = 0,
) -> LocalResult:
    """Train from `start` (d,), and `buffers` (b,) where the model has some, on the client's shard; give the delta (d,).

    Batches and dropout depend on (seed, before + round, client) alone, `before` being the rounds that were done before
    the run's first: the model is put into training mode here and leaves it at
    the end, whatever ran before. `start` is not changed: rules see copies of what the server sent. The loss is the mean
    over all rows trained on: a batch counts by what it weighs in a mean, so that a short last one does not count like a
    full one.
    """
    rng = generator_for(seed, before + round, client.id, "batches")
    size = task.size(client.shard)
    steps = training.steps_of(size)
    shown = (start, last_update, control) if not rules else (start.clone(), copied(last_update), copied(control))
    function = task.function(buffers) if rules and hasattr(task, "function") else None
    gradient = None
    if rules:
        drawn = generator_for(seed, before + round, client.id, "gradient")
        gradient = functools.partial(gradient_of, task, stepper, training.batch_size or max(1, size), drawn)
    context = LocalContext(client, round, shown[0], shown[1], task.layout, steps, shown[2], function, gradient)
    parameters = task.parameters
    with torch.no_grad():
        parameters.copy_(start)
    beside = getattr(task, "buffers", None)
    if beside is not None:
        assert buffers is not None
        beside.write(buffers)
    optimizer.state.clear()

    task.model.train()
    seed_layers(parameters.device, seed_for(seed, before + round, client.id, "dropout"))
    losses, weights = [], []
    own = private_of(rules)
    batches = batches_of(task, client.shard, training.batch_size, rng, own)
    for step in range(steps):
        parameters.grad.zero_()  # type: ignore[union-attr]
        rows = next(batches)
        backward = stepper.backward if own is None else functools.partial(own.backward, machine=stepper)
        losses.append(backward(task, client.shard, rows))
        weights.append(task.weight(client.shard, rows))
        stepper.unscale(optimizer)
        for rule in rules:
            rule.before_step(parameters, step, context)
            if parameters.grad is None:
                raise RecipeError(f"{type(rule).__name__}: before_step took parameters.grad away. Change it in place.")
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([parameters], training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = training.lr_at(round, rounds, step, steps)
        stepper.step(optimizer)
        for rule in rules:
            rule.after_step(parameters, step, context)
    task.model.eval()
    delta = new_rows(len(start), device=start.device, dtype=start.dtype)
    torch.sub(parameters.detach(), start, out=delta)
    mean_loss = float("nan")
    if any(weights):
        found = torch.stack(losses).double().cpu()
        mean_loss = float(found @ torch.tensor(weights, dtype=torch.float64)) / sum(weights)
    return LocalResult(client.id, delta, float(size), steps, mean_loss, beside.read() if beside is not None else None)
