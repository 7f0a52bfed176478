"""Chameleon's loss written out, which part of the model trains when, and what it cannot work with."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedllm_sec.attacks.conformance import train_with
from fedllm_sec.attacks.local.contrastive import Chameleon, contrast
from fedllm_sec.errors import AttackError
from fedllm_sec.models.logistic import logistic
from fedllm_sec.seeds import generator_for
from fedllm_sec.tasks.classify import Classify


def test_the_contrast_equals_its_formula():
    rows = torch.randn(7, 3, generator=generator_for(1, "rows"), dtype=torch.float64)
    labels, weights = torch.tensor([0, 0, 1, 1, 1, 2, 0]), torch.tensor([1.0, 1, 2, 2, 2, 1, 1]).double()
    z = [row / row.norm() for row in rows]
    total = 0.0
    for i in range(7):
        others = [j for j in range(7) if j != i]
        below = sum(math.exp(float(z[i] @ z[j]) / 0.3) for j in others)
        same = [j for j in others if labels[j] == labels[i]]
        if same:
            logs = [math.log(math.exp(float(z[i] @ z[j]) / 0.3) / below) for j in same]
            total -= float(weights[i]) * sum(logs) / len(same)
    assert float(contrast(rows, labels, weights, 0.3)) == pytest.approx(total / 6)  # one row is alone with its label


def test_rows_of_one_label_attract_and_others_repel():
    rows = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.9, 0.3]], requires_grad=True)
    loss = contrast(rows, torch.tensor([0, 0, 1]), torch.ones(3), 0.5)
    (gradient,) = torch.autograd.grad(loss, rows)
    moved = rows.detach() - 0.1 * gradient

    def cosine(x: Any, i: int, j: int) -> float:
        return float(torch.cosine_similarity(x[i], x[j], dim=0))

    assert cosine(moved, 0, 1) > cosine(rows.detach(), 0, 1)
    assert cosine(moved, 0, 2) < cosine(rows.detach(), 0, 2)


def test_the_encoder_trains_first_and_the_classifier_after_it():
    # 40 parameters, the last 8 the classifier's; 3 of 5 steps are the encoder's
    for steps, encoder, moves in ((5, 0.6, (True, True)), (2, 0.99, (True, True))):
        delta, _ = train_with(Chameleon(encoder=encoder), steps=steps)
        assert (bool(delta[:32].any()), bool(delta[32:].any())) == moves
    rule, (_, ctx) = Chameleon(encoder=0.6), train_with(Chameleon())
    assert [rule.contrasts(step, ctx) for step in range(5)] == [True] * 3 + [False] * 2
    parameters = torch.nn.Parameter(ctx.start.clone())
    for step, part, other in ((0, slice(0, 32), slice(32, 40)), (4, slice(32, 40), slice(0, 32))):
        parameters.grad = torch.ones(40)
        rule.before_step(parameters, step, ctx)
        assert parameters.grad[part].any()
        assert not parameters.grad[other].any()
        before = parameters.detach().clone()
        with torch.no_grad():
            parameters.mul_(0.9)  # weight decay moves everything
        rule.after_step(parameters, step, ctx)
        assert torch.equal(parameters[other], before[other])
        assert not torch.equal(parameters[part], before[part])


def test_what_chameleon_cannot_work_with_is_said():
    with pytest.raises(AttackError, match=r"chameleon\.encoder: 1"):
        Chameleon(encoder=1)
    with pytest.raises(AttackError, match="needs rows >= 2"):
        Chameleon(temperature=math.inf)
    task = Classify(logistic((1, 8, 8), 3), torch.device("cpu"))
    with pytest.raises(AttackError, match="the model is one linear layer"):
        Chameleon().prepare(task, [4])
    _, ctx = train_with(Chameleon())
    with pytest.raises(AttackError, match="acts on classifiers of images"):
        Chameleon().before_step(torch.nn.Parameter(ctx.start.clone()), 0, replace(ctx, classifier=None))
