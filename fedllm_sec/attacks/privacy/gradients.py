"""The gradient that dummy inputs would give, and the delta of several local steps on them, both differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedllm_sec.attacks.privacy.seen import Observation, known_rows
from fedllm_sec.errors import AttackError

MOST_STEPS = 16  # that are unrolled: each keeps its graph in memory, and each backward pass walks all of them


def soft_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of class numbers (n,), or of one distribution for each row (n, classes)."""
    return nn.functional.cross_entropy(logits, labels)


@sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative
def gradient_of(network: nn.Module, names: Sequence[str], fed: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradient of the mean loss by the named parameters, with its graph."""
    own = dict(network.named_parameters())
    loss = soft_cross_entropy(network(fed), labels)
    return list(torch.autograd.grad(loss, [own[name] for name in names], create_graph=True))


def rows_to_find(seen: Observation) -> int:
    """How many inputs a batch, or a delta's batches together, hold; an error where their order is not known.

    A client that trains on its whole shard meets the same rows in every step. One that does not finish an epoch meets
    new rows in each. Rows that come again in another order cannot be unrolled: the observer does not know the order.
    """
    rows = known_rows(seen)
    if seen.what == "gradient" or seen.steps == 1 or (seen.size is not None and seen.size <= rows):
        return rows
    if seen.size is not None and rows * seen.steps > seen.size:
        raise AttackError(
            f"privacy: {seen.steps} steps of {rows} rows go more than once through a shard of {seen.size}, in an order "
            "that the observer does not know. Lower clients.local_steps, or observe what: gradient."
        )
    return rows * seen.steps


def need_unrollable(seen: Observation) -> None:
    """An error where local training cannot be repeated on dummy inputs."""
    training = seen.training
    seen.learning_rate()
    assert training is not None
    if not seen.plain_sgd:
        raise AttackError(
            f"privacy: {training.optimizer} steps are not unrolled, only those of sgd without momentum (adamw's "
            "division by a moving scale leaves little but signs). Observe what: gradient, or set clients.optimizer: "
            "sgd."
        )
    if seen.steps > MOST_STEPS:
        raise AttackError(
            f"privacy: {seen.steps} local steps are too many to unroll, {MOST_STEPS} is the most. Lower "
            "clients.local_steps, or observe what: gradient."
        )


@sdpa_kernel(SDPBackend.MATH)
def unrolled_delta(seen: Observation, network: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The delta of the client's k SGD steps, had it trained on x in this order, by the layout's names, with its graph.

    Geiping et al. 2020, sec. 6.1. Clipping and weight decay act as in the client's own loop.
    """
    training, lr, rows = seen.training, seen.learning_rate(), known_rows(seen)
    assert training is not None
    own = dict(network.named_parameters())
    begun = [own[name].detach() for name in seen.layout.names]
    now: list[Tensor] = [p.clone().requires_grad_() for p in begun]
    for step in range(seen.steps):
        here = slice(0, len(x)) if len(x) <= rows else slice(step * rows, (step + 1) * rows)
        used = {**own, **dict(zip(seen.layout.names, now, strict=True))}
        logits = torch.func.functional_call(network, used, (seen.fed(x[here]),))
        slope = torch.autograd.grad(soft_cross_entropy(logits, labels[here]), now, create_graph=True)
        if training.max_grad_norm is not None:
            length = torch.stack([g.square().sum() for g in slope]).sum().add(1e-24).sqrt()
            slope = tuple(g * (training.max_grad_norm / (length + 1e-6)).clamp(max=1.0) for g in slope)
        now = [p - lr * (g + training.weight_decay * p) for p, g in zip(now, slope, strict=True)]
    return [p - q for p, q in zip(now, begun, strict=True)]


def made_from(seen: Observation, network: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """What the client would have sent for these inputs in [0, 1], by the layout's names."""
    if seen.what == "gradient":
        return gradient_of(network, seen.layout.names, seen.fed(x), labels)
    return unrolled_delta(seen, network, x, labels)


def total_variation(x: Tensor) -> Tensor:
    """The mean difference of neighbouring pixels, down and across, of images (n, channels, height, width)."""
    if x.ndim < 3 or min(x.shape[-2:]) < 2:
        return x.new_zeros(())
    down, across = x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
    return down.abs().mean() + across.abs().mean()


def cosine_distance(made: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """1 - cosine of two vectors given in parts: 0 where they point the same way."""
    dot = torch.stack([(a * b).sum() for a, b in zip(made, target, strict=True)]).sum()
    lengths = [torch.stack([a.square().sum() for a in part]).sum() for part in (made, target)]
    return 1 - dot / (lengths[0] * lengths[1]).clamp_min(1e-30).sqrt()
