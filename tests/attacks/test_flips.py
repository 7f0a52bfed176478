"""F3BA by hand: which weights turn, which way, and what it cannot work with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fedllm_sec.attacks.conformance import train_with
from fedllm_sec.attacks.local.flips import F3BA, difference, least, pull, turned
from fedllm_sec.attacks.subject import classifier, images
from fedllm_sec.errors import AttackError
from fedllm_sec.models.logistic import logistic
from fedllm_sec.tasks.classify import Classify


def test_the_least_important_weights_get_the_sign_that_the_trigger_pulls_at():
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    mask = least(torch.tensor([[0.0, -9.0, 1.0], [-8.0, 2.0, 3.0]]), 0.5)  # the three lowest: -9, -8, 0
    assert mask.tolist() == [[True, True, False], [True, False, False]]
    layer = torch.nn.Linear(3, 2)
    towards = pull(layer, torch.tensor([[-0.5, 0.25, 0.0]]))
    assert towards.tolist() == [[-0.5, 0.25, 0.0]] * 2
    assert turned(weight, towards, mask).tolist() == [[-1.0, 2.0, 3.0], [-4.0, 5.0, -6.0]]
    assert turned(weight, torch.zeros(2, 3), mask).equal(weight)  # pulled nowhere


def test_the_pull_on_a_kernel_is_the_sum_of_what_it_passes_over():
    layer = torch.nn.Conv2d(1, 2, 2, bias=False)
    given = torch.arange(9.0).view(1, 1, 3, 3)  # windows of 2 x 2: top left corners 0, 1, 3, 4
    assert pull(layer, given)[:, 0].tolist() == [[[8.0, 12.0], [20.0, 24.0]]] * 2


def test_signs_turn_after_the_first_step_and_lengths_stay():
    rule = F3BA(share=0.2)
    _, ctx = train_with(rule)
    parameters = torch.nn.Parameter(ctx.start.clone())
    parameters.grad = torch.zeros(40)
    moves = []
    for step in range(3):
        before = parameters.detach().clone()
        rule.before_step(parameters, step, ctx)
        rule.after_step(parameters, step, ctx)
        moves.append((parameters.detach() != before).nonzero().flatten().tolist())
        assert torch.equal(parameters.detach().abs(), before.abs())
    assert moves[1:] == [[], []]
    lowest = (ctx.last_update * ctx.start)[:30].argsort()[:6].tolist()  # a fifth of the 30 weights below the last layer
    assert moves[0]
    assert set(moves[0]) <= set(lowest)
    seen = difference(ctx.classifier, ctx.start, ctx.classifier.model[2], ctx.client.shard.x[:20], rule.clean["bad"])
    signs = seen.sign().expand(2, 15).flatten()
    assert all(parameters[i].sign() == signs[i] for i in lowest if signs[i] != 0)


def test_what_f3ba_cannot_work_with_is_said():
    shard = images(6)
    with pytest.raises(AttackError, match="needs 0 < share <= 1"):
        F3BA(share=0.0)
    with pytest.raises(AttackError, match="carries a trigger"):
        F3BA().brief(10, {"c1": shard}, {"c1": replace(shard, poisoned=torch.arange(6) < 3)})
    with pytest.raises(AttackError, match="one linear layer"):
        F3BA().prepare(Classify(logistic((1, 8, 8), 3), torch.device("cpu")), [4])
    with pytest.raises(AttackError, match="needs two local steps"):
        F3BA().prepare(SimpleNamespace(layout=classifier().layout, function=classifier), [1])
    _, ctx = train_with(F3BA())
    with pytest.raises(AttackError, match="acts on classifiers of images"):
        F3BA().before_step(torch.nn.Parameter(ctx.start.clone()), 0, replace(ctx, classifier=None))
