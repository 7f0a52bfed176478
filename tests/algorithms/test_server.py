"""Server rules against torch.optim and by hand."""

from __future__ import annotations

import pytest
import torch

from fedllm_sec.algorithms import fedopt
from fedllm_sec.algorithms.server import Adaptive, ControlledSgd, DynamicServer, EffectiveSteps, Sgd
from fedllm_sec.errors import RecipeError
from fedllm_sec.protocols import ServerContext

UPDATES = [torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.0, 3.0])]
FOUR_OF_EIGHT = ServerContext(steps=5.0, lr=0.1, share=4 / 8)


def adaptive(kind: str, beta1: float = 0.9) -> Adaptive:
    return Adaptive(kind=kind, lr=0.1, beta1=beta1, beta2=0.99, tau=1e-3)


def test_plain_server_adds_the_update():
    assert Sgd(lr=1.0, momentum=0.0)(torch.tensor([1.0]), torch.tensor([0.5]), FOUR_OF_EIGHT).tolist() == [1.5]


def test_sgd_with_momentum_equals_torch_sgd():
    server, ours = fedopt(optimizer="sgd", server_lr=0.1, beta1=0.9).server, torch.zeros(2)
    theirs = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for update in UPDATES:
        ours = server(ours, update, FOUR_OF_EIGHT)
        theirs.grad = -update
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach())


def test_adagrad_without_momentum_equals_torch_adagrad():
    server, ours = adaptive("adagrad", beta1=0.0), torch.zeros(2)
    theirs = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adagrad([theirs], lr=0.1, initial_accumulator_value=1e-6, eps=1e-3)
    for update in UPDATES:
        ours = server(ours, update, FOUR_OF_EIGHT)
        theirs.grad = -update
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach())


def test_adams_moments_equal_torch_adams_and_only_its_bias_correction_is_missing():
    server, ours = adaptive("adam"), torch.zeros(2)
    theirs = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99))
    for t, update in enumerate(UPDATES, 1):
        before = ours
        ours = server(ours, update, FOUR_OF_EIGHT)
        theirs.grad = -update
        optimizer.step()
        state = optimizer.state[theirs]
        torch.testing.assert_close(server.m, -state["exp_avg"])
        torch.testing.assert_close(server.v, state["exp_avg_sq"] + 0.99**t * 1e-6)  # v starts at tau^2, torch's at 0
        torch.testing.assert_close(ours - before, 0.1 * server.m / (server.v.sqrt() + 1e-3))


def test_first_step_of_each_adaptive_rule_by_hand():
    update, tau = torch.tensor([2.0]), 0.1
    for kind, v in (("adam", 0.99 * 0.01 + 0.01 * 4), ("yogi", 0.01 + 0.01 * 4), ("adagrad", 0.01 + 4)):
        server = Adaptive(kind=kind, lr=1.0, beta1=0.9, beta2=0.99, tau=tau)
        moved = server(torch.zeros(1), update, FOUR_OF_EIGHT)
        assert moved.item() == pytest.approx(0.2 / (v**0.5 + tau), rel=1e-5)


def test_yogi_moves_its_variance_by_the_size_of_the_update_alone():
    server = Adaptive(kind="yogi", lr=1.0, beta1=0.9, beta2=0.5, tau=10.0)
    server(torch.zeros(1), torch.tensor([2.0]), FOUR_OF_EIGHT)
    assert server.v.item() == 98.0  # 100 - 0.5 * 4, where adam would give 52


def test_effective_steps_are_those_of_the_rows_the_defense_weighs():
    factors = torch.tensor([4.0, 2.0, 1.0, 0.1]).double()  # t = 4 common steps: claims of 1, 2, 4 and 40 steps
    kept = torch.tensor([0.25, 0.25, 0.5, 0.0]).double()
    server, zero, update = EffectiveSteps(lr=1.0), torch.zeros(1), torch.ones(1)
    weighed = ServerContext(4.0, 0.1, weights=kept, factors=factors)
    assert server(zero, update, weighed).item() == pytest.approx((0.25 * 1 + 0.25 * 2 + 0.5 * 4) / 4)
    scaled = ServerContext(4.0, 0.1, weights=kept / 3, factors=factors)  # a rule that clips: weights sum to 1/3
    assert server(zero, update, scaled).item() == pytest.approx(2.75 / 4)
    unsaid = ServerContext(4.0, 0.1, factors=factors)
    assert server(zero, update, unsaid).item() == pytest.approx((1 + 2 + 4 + 40) / 16)


def test_scaffolds_control_by_hand():
    server = ControlledSgd(lr=2.0)
    x = server(torch.zeros(1), torch.tensor([1.0]), FOUR_OF_EIGHT)
    assert x.item() == 2.0
    assert server.c.item() == pytest.approx(-1.0)  # 0 - 1/2 (0 + 1 / (5 * 0.1))
    server(x, torch.tensor([-0.5]), FOUR_OF_EIGHT)
    assert server.c.item() == pytest.approx(0.0)  # -1 - 1/2 (-1 - 0.5 / 0.5)


def test_feddyns_step_by_hand():
    server = DynamicServer(alpha=0.5)
    x = server(torch.zeros(1), torch.tensor([1.0]), FOUR_OF_EIGHT)
    assert server.h.item() == -0.25  # alpha |P| / N = 0.25
    assert x.item() == 1.5  # 1 - h / alpha


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sgd(lr=0.5, momentum=0.5),
        lambda: adaptive("yogi"),
        lambda: ControlledSgd(lr=1.0),
        lambda: DynamicServer(alpha=0.1),
    ],
)
def test_a_restored_server_goes_on_as_the_old_one(make):
    straight, x = make(), torch.zeros(2)
    for update in UPDATES:
        x = straight(x, update, FOUR_OF_EIGHT)
    first, y = make(), torch.zeros(2)
    y = first(y, UPDATES[0], FOUR_OF_EIGHT)
    second = make()
    second.load_state_dict(first.state_dict())
    for update in UPDATES[1:]:
        y = second(y, update, FOUR_OF_EIGHT)
    assert torch.equal(x, y)


def test_impossible_settings_are_named():
    with pytest.raises(RecipeError, match='no adaptive "adamm"'):
        Adaptive(kind="adamm", lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3)
    with pytest.raises(RecipeError, match="learning rate is 0"):
        Sgd(lr=0.0, momentum=0.0)
    with pytest.raises(RecipeError, match="must be at least 0 and below 1"):
        Sgd(lr=1.0, momentum=1.0)
    with pytest.raises(RecipeError, match="server_lr > 0"):
        ControlledSgd(lr=-1.0)
    with pytest.raises(RecipeError, match="server_lr > 0"):
        EffectiveSteps(lr=0.0)
