"""Local rules on a vector small enough to follow by hand."""

from types import SimpleNamespace

import pytest
import torch

from fedllm_sec.attacks.conformance import train_with
from fedllm_sec.attacks.local.stealth import PGD, SDBA, ConstrainAndScale, Neurotoxin, quiet_coordinates
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import Client, LocalContext


def context(start, last, round=2):
    start = torch.tensor(start)
    last = None if last is None else torch.tensor(last)
    return LocalContext(Client("bad", None), round, start, last, Layout.single(len(start)), 1)


def parameter(values, grad):
    made = torch.nn.Parameter(torch.tensor(values))
    made.grad = torch.tensor(grad)
    return made


def test_neurotoxin_zeroes_the_gradient_where_the_last_step_was_largest():
    ctx = context([0.0, 0.0, 0.0, 0.0], [0.1, -5.0, 0.2, 3.0])
    p = parameter([0.0] * 4, [1.0] * 4)
    rule = Neurotoxin(top=0.5)
    rule.before_step(p, 0, ctx)
    assert p.grad.tolist() == [1.0, 0.0, 1.0, 0.0]
    with torch.no_grad():
        p.add_(1.0)  # momentum or weight decay may move them all the same
    rule.after_step(p, 0, ctx)
    assert p.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_neurotoxin_masks_nothing_before_a_step_was_seen():
    for last in (None, [0.0, 0.0]):
        p = parameter([0.0, 0.0], [1.0, 2.0])
        Neurotoxin(top=0.5).before_step(p, 0, context([0.0, 0.0], last))
        assert p.grad.tolist() == [1.0, 2.0]


TWO_LAYERS = Layout(("a.mlp.c_fc.weight", "a.attn.weight"), ((4,), (2,)))


def test_sdba_trains_the_quietest_share_of_the_layers_it_names_and_nothing_else():
    gradient = torch.tensor([3.0, -1.0, 0.0, 2.0, 0.0, 0.0])
    half = quiet_coordinates(gradient, TWO_LAYERS, {"c_fc": 0.5})
    assert half.tolist() == [False, True, True, False, False, False]
    assert quiet_coordinates(gradient, TWO_LAYERS, {"c_fc": 0.7}).sum() == 2  # 2.8, rounded down
    both = quiet_coordinates(gradient, TWO_LAYERS, {"c_fc": 1.0, "a.": 0.5})
    assert both.tolist() == [True] * 4 + [True, False]


def test_sdba_takes_the_gradient_of_its_rows_before_poisoning_and_puts_back_what_is_masked():
    asked = []

    def gradient(shard, batches):
        asked.append((shard, batches))
        return torch.tensor([3.0, -1.0, 0.0, 2.0, 0.0, 0.0])

    ctx = LocalContext(Client("bad", "poisoned"), 1, torch.zeros(6), None, TWO_LAYERS, 2, gradient=gradient)
    rule = SDBA(layers={"c_fc": 0.5}, batches=3)
    rule.brief(10, {"bad": "clean", "good": "other"}, {"bad": "poisoned"})
    p = parameter([0.0] * 6, [1.0] * 6)
    for step in range(2):
        rule.before_step(p, step, ctx)
        assert p.grad.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
        with torch.no_grad():
            p.add_(1.0)
        rule.after_step(p, step, ctx)
        assert p.tolist() == [0.0, step + 1.0, step + 1.0, 0.0, 0.0, 0.0]
    assert asked == [("clean", 3)]  # once a round
    with pytest.raises(AttackError, match=r"none of up_proj.*a\.mlp\.c_fc\.weight"):
        SDBA(layers={"up_proj": 1.0}).prepare(SimpleNamespace(layout=TWO_LAYERS), [2])


def test_pgd_projects_onto_the_ball_around_the_received_model():
    ctx = context([1.0, 1.0], [0.0, 2.0])
    p = parameter([4.0, 5.0], [0.0, 0.0])  # 3-4-5 away
    PGD(radius=10.0).after_step(p, 0, ctx)
    assert p.tolist() == [4.0, 5.0]
    PGD(radius=1.0).after_step(p, 0, ctx)
    torch.testing.assert_close(p.detach(), torch.tensor([1.6, 1.8]))
    p = parameter([4.0, 5.0], [0.0, 0.0])
    relative = PGD(relative=0.5)
    relative.before_step(p, 0, ctx)
    relative.after_step(p, 0, ctx)
    torch.testing.assert_close(p.detach(), torch.tensor([1.6, 1.8]))


def test_pgd_without_a_step_to_be_relative_to_is_an_error_and_a_zero_step_keeps_the_radius():
    rule, p = PGD(), parameter([4.0, 5.0], [0.0, 0.0])
    with pytest.raises(AttackError, match=r"attack\.start"):
        rule.after_step(p, 0, context([1.0, 1.0], None, round=1))
    rule.before_step(p, 0, context([1.0, 1.0], [0.0, 3.0]))
    rule.before_step(p, 0, context([1.0, 1.0], [0.0, 0.0]))
    assert rule.reach(context([1.0, 1.0], [0.0, 0.0])) == 3.0


def test_constrain_and_scale_mixes_in_the_pull_back_to_the_received_model():
    ctx = context([1.0, 1.0], None)
    p = parameter([4.0, 5.0], [1.0, 0.0])
    ConstrainAndScale(alpha=0.75).before_step(p, 0, ctx)
    torch.testing.assert_close(p.grad, torch.tensor([0.75 + 0.25 * 0.6, 0.25 * 0.8]))
    p = parameter([1.0, 1.0], [1.0, 0.0])  # no direction to pull in
    ConstrainAndScale(alpha=0.75).before_step(p, 0, ctx)
    assert p.grad.tolist() == [0.75, 0.0]


def test_rules_keep_training_inside_their_bounds():
    delta, ctx = train_with(PGD(relative=0.5), steps=20)
    assert float(delta.norm()) <= 0.5 * float(ctx.last_update.norm()) * 1.0001
    delta, ctx = train_with(Neurotoxin(top=0.25))
    order = ctx.last_update.abs().argsort(descending=True)
    assert not delta[order[:10]].any()
    assert bool(delta[order[10:]].all())
    lengths = [float(train_with(ConstrainAndScale(alpha=a), steps=20)[0].norm()) for a in (0.2, 0.5, 0.9)]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Neurotoxin(top=1.0),
        lambda: PGD(radius=0.0),
        lambda: ConstrainAndScale(alpha=1.0),
        lambda: SDBA(layers={}),
        lambda: SDBA(layers={"c_fc": 0.0}),
        lambda: SDBA(batches=0),
    ],
)
def test_settings_without_meaning_are_errors(make):
    with pytest.raises(AttackError):
        make()
