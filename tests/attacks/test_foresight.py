"""Anticipate by hand: which gradient it follows, and what it cannot work with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedllm_sec.attacks.conformance import train_with
from fedllm_sec.attacks.local.foresight import Anticipate, anticipated
from fedllm_sec.attacks.subject import images
from fedllm_sec.errors import AttackError
from fedllm_sec.seeds import generator_for


def test_the_gradient_through_the_next_rounds_equals_its_closed_form():
    rng = generator_for(1, "quadratics")
    start, own, honest, goal = (torch.randn(5, generator=rng, dtype=torch.float64) for _ in range(4))
    share, lr = 0.25, 0.3
    at = share * own + (1 - share) * (start - lr * (start - honest))
    wanted, slope = torch.zeros(5, dtype=torch.float64), share
    for _ in range(3):
        wanted += slope * (at - goal)
        at, slope = at - lr * (at - honest), slope * (1 - lr)
    found = anticipated(
        start, own, lambda i: lambda t: (t - honest).square().sum() / 2, lambda t: (t - goal).square().sum() / 2,
        steps=3, share=share, lr=lr,
    )  # fmt: skip
    assert torch.allclose(found, wanted, atol=1e-12)


def test_the_gradient_passes_through_fused_attention():
    keys = torch.randn(1, 4, 6, generator=generator_for(1, "keys"))
    at = torch.randn(24, generator=generator_for(1, "at"))

    def loss(t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(t.view(1, 4, 6), keys, keys).square().sum()

    found = anticipated(at, at, lambda i: loss, loss, steps=2, share=0.5, lr=0.1)
    ahead = anticipated(at, at + 1e-3 * found, lambda i: loss, loss, steps=2, share=0.5, lr=0.1)
    assert found.norm() > 0
    assert (ahead - found).norm() < 0.1 * found.norm()


def test_a_guessed_step_has_the_length_of_the_last_global_one():
    # from (3, 4) towards 0 by a length of 1: the others are at (2.4, 3.2); alone, the attacker's half of the model is
    # pulled towards 0 by half of the mean of (3, 4) and (2.4, 3.2)
    start = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = anticipated(
        start, start, lambda i: lambda t: t.square().sum() / 2, lambda t: t.square().sum() / 2,
        steps=1, share=0.5, length=1.0,
    )  # fmt: skip
    assert torch.allclose(found, torch.tensor([1.35, 1.8], dtype=torch.float64))


def test_what_anticipate_cannot_work_with_is_said():
    with pytest.raises(AttackError, match="needs steps >= 2"):
        Anticipate(steps=1)
    with pytest.raises(AttackError, match=r"anticipate\.share: 0"):
        Anticipate(share=0.0)
    with pytest.raises(AttackError, match=r"anticipate\.lr: inf"):
        Anticipate(lr=float("inf"))
    with pytest.raises(AttackError, match="all rows of client c1 are poisoned"):
        Anticipate().brief(10, {}, {"c1": replace(images(6), poisoned=torch.ones(6, dtype=torch.bool))})
    with pytest.raises(AttackError, match=r"Set anticipate\.lr, or attack\.start"):
        train_with(Anticipate(), round=1)
    _, ctx = train_with(Anticipate())
    with pytest.raises(AttackError, match="how many clients take part is not known"):
        Anticipate().before_step(torch.nn.Parameter(ctx.start.clone()), 0, ctx)
    with pytest.raises(AttackError, match="acts on classifiers of images"):
        Anticipate().before_step(torch.nn.Parameter(ctx.start.clone()), 0, replace(ctx, classifier=None))
