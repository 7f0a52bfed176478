"""The observed language model run on rows of the observer's choice: losses of tokens, and local training in its place.

The model is not changed: its trained parameters are those of the vector that is given, for one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedllm_sec.attacks.privacy.seen import Observation, Row
from fedllm_sec.errors import AttackError
from fedllm_sec.seeds import generator_for

MOST_TOKENS = 1024  # of a pass, padding included: its logits are the largest thing in memory


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """The model without dropout, for a while."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def need_text(seen: Observation, method: str, rows: Sequence[Row]) -> None:
    """An error where there is no row of text to run the model on."""
    if not rows:
        raise AttackError(f"{method}: no rows of text were given to it. Observe a run of task causal_lm.")


def asked(seen: Observation, model: str, method: str) -> Tensor:
    """The vector (d,) of the client's own model, of the received one, or of the global one after the last round."""
    if model == "received":
        return seen.start
    if model == "global":
        if seen.final is None:
            raise AttackError(f"{method}: the global model of the last round is not there. Finish the run.")
        return seen.final.to(seen.start)
    if seen.what != "delta":
        raise AttackError(
            f"{method}: a gradient is no model whose losses could be taken. Observe what: delta, or ask model: global."
        )
    return seen.start + seen.sent


def batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """All row numbers, rows of like length together, at most `MOST_TOKENS` tokens at a time."""
    here: list[int] = []
    for number in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        if here and (len(here) + 1) * len(rows[here[0]].ids) > MOST_TOKENS:
            yield here
            here = []
        here.append(number)
    if here:
        yield here


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Tokens (rows, longest), padded on the right, where a causal model's earlier positions do not see it."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])


def logits_of(seen: Observation, parts: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (rows, positions, vocabulary) of the model with these trained parameters."""
    device = next(iter(parts.values())).device
    out = torch.func.functional_call(seen.model, parts, (), {"input_ids": ids.to(device), "use_cache": False})
    logits: Tensor = out.logits
    return logits


@torch.no_grad()
def token_losses(seen: Observation, vector: Tensor, rows: Sequence[Row]) -> list[Tensor]:
    """The log-losses, in nats, of each row's scored tokens by the model with this trained vector (d,): float64."""
    own = next(seen.model.parameters())
    parts = seen.layout.split(vector.to(own.device))
    found: dict[int, Tensor] = {}
    with still(seen.model):
        for numbers in batches(rows):
            ids = padded([rows[i].ids for i in numbers])
            logits = logits_of(seen, parts, ids[:, :-1])
            each = nn.functional.cross_entropy(logits.mT.float(), ids[:, 1:].to(logits.device), reduction="none")
            for losses, i in zip(each.double().cpu(), numbers, strict=True):
                found[i] = losses[rows[i].first - 1 : len(rows[i].ids) - 1]
    return [found[i] for i in range(len(rows))]


def mean_losses(seen: Observation, vector: Tensor, rows: Sequence[Row]) -> Tensor:
    """The mean log-loss of each row's scored tokens: (rows,) float64."""
    return torch.stack([losses.mean() for losses in token_losses(seen, vector, rows)])


def loss_of(seen: Observation, parts: dict[str, Tensor], rows: Sequence[Row]) -> Tensor:
    """The mean over all scored tokens of a batch, as local training has it; with its graph."""
    ids = padded([row.ids for row in rows])
    logits = logits_of(seen, parts, ids[:, :-1])
    targets = torch.full_like(ids[:, 1:], -100)
    for i, row in enumerate(rows):
        targets[i, row.first - 1 : len(row.ids) - 1] = ids[i, row.first : len(row.ids)]
    return nn.functional.cross_entropy(logits.mT.float(), targets.to(logits.device))


def trained_on(seen: Observation, rows: Sequence[Row], seed: int, number: int) -> Tensor:
    """What a client with these rows would have made of the received vector: (d,), by the observed run's training.

    Steps, batch, optimizer, learning rate and clipping are the client's; rows come in another order.
    """
    training, size = seen.training, seen.rows or len(rows)
    lr = seen.learning_rate()
    assert training is not None
    vector = seen.start.to(next(seen.model.parameters()).device).clone().requires_grad_()
    decay = training.weight_decay
    optimizer: torch.optim.Optimizer = torch.optim.AdamW([vector], lr=lr, betas=training.betas, weight_decay=decay)
    if training.optimizer == "sgd":
        momentum, nesterov = training.momentum, training.nesterov
        optimizer = torch.optim.SGD([vector], lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    rng = generator_for(seed, "shadow", number)
    left: list[int] = []
    with still(seen.model):
        for step in range(seen.steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * training.lr_at(1, 1, step, seen.steps) / training.lr
            left = left or torch.randperm(len(rows), generator=rng).tolist()
            here, left = left[:size], left[size:]
            optimizer.zero_grad()
            loss_of(seen, seen.layout.split(vector), [rows[i] for i in here]).backward()
            if training.max_grad_norm is not None:
                nn.utils.clip_grad_norm_([vector], training.max_grad_norm)
            optimizer.step()
    return vector.detach()
