"""FL-WBC disturbs what hardly moves; Soteria hides the features that give the input away."""

import pytest
import torch

from fedllm_sec.defenses.client_side import WhiteBloodCells, leakage, perturbation, soteria_gradient, soteria_mask
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import Client, LocalContext
from fedllm_sec.seeds import generator_for


def local_context(d):
    return LocalContext(Client("a", None), 1, torch.zeros(d), None, Layout.single(d), 3)


def test_noise_falls_only_where_the_change_hardly_changes():
    change = torch.zeros(20_000)
    last = torch.zeros(20_000)
    change[10_000:] = 5.0
    noise = perturbation(change, last, 0.1, generator_for(1))
    assert (noise[:10_000] != 0).all()
    assert (noise[10_000:] == 0).all()
    assert float(noise[:10_000].abs().mean()) == pytest.approx(0.1, rel=0.05)  # Laplace: E|Y| = scale
    assert float(noise[:10_000].std()) == pytest.approx(0.1 * 2**0.5, rel=0.05)


def train(rule, steps, d=1000, seed=3):
    """Gradient steps of -1 on the first half of the parameters and of alternating sign on the second."""
    torch.manual_seed(seed)
    parameters = torch.nn.Parameter(torch.zeros(d))
    pull = torch.ones(d)
    for step in range(steps):
        rule.before_step(parameters, step, local_context(d))
        with torch.no_grad():
            pull[d // 2 :] = 1.0 - 2.0 * (step % 2)
            parameters -= 0.01 * pull
        rule.after_step(parameters, step, local_context(d))
    return parameters.detach()


def test_the_first_step_is_left_alone_and_steady_parameters_are_disturbed_after_it():
    rule = WhiteBloodCells(strength=0.1)
    assert torch.equal(train(rule, 1), -0.01 * torch.ones(1000))
    moved = train(rule, 2)
    assert (moved[:500] != -0.02).all()
    assert float((moved[:500] + 0.02).std()) == pytest.approx(0.1 * 0.01 * 2**0.5, rel=0.2)
    assert torch.equal(moved[500:], torch.zeros(500))  # their change turned round: nothing to disturb


def test_a_rule_starts_anew_with_each_client_and_follows_its_seed():
    rule = WhiteBloodCells()
    first = train(rule, 3)
    assert torch.equal(train(rule, 3), first)
    assert torch.equal(train(WhiteBloodCells(), 3), first)
    assert not torch.equal(train(WhiteBloodCells(), 3, seed=4), first)


def test_dropout_draws_do_not_depend_on_the_rule():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train(WhiteBloodCells(), 3, seed=5)
    assert torch.equal(torch.rand(3), wanted)


def test_leakage_by_hand():
    # r = (2 x1, x1 + x2, 0) at x = (1, 3): slopes 2, sqrt 2, 0 over sizes 2, 4, 0
    inputs = torch.tensor([[1.0, 3.0]], requires_grad=True)
    features = inputs @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert leakage(inputs, features).tolist() == pytest.approx([1.0, 2**0.5 / 4, 0.0])


def test_leakage_is_the_mean_over_the_inputs_that_excite_a_feature():
    inputs = torch.tensor([[1.0], [4.0], [-5.0]], requires_grad=True)
    assert leakage(inputs, inputs.relu()).tolist() == pytest.approx([(1 / 1 + 1 / 4) / 2])


def test_a_feature_that_is_0_has_nothing_to_mask_and_is_not_chosen():
    assert soteria_mask(torch.tensor([0.0, 0.3, 0.2, 0.0]), 0.5).tolist() == [True, True, False, True]
    with pytest.raises(DefenseError, match="two features or more that are not 0, got features=1"):
        soteria_mask(torch.tensor([0.0, 0.3, 0.0]), 0.5)


def test_soteria_masks_the_smallest_leakage_and_keeps_the_rest():
    assert soteria_mask(torch.tensor([1.0, 0.2, 0.5, 0.9]), 0.5).tolist() == [True, False, False, True]
    assert soteria_mask(torch.tensor([1.0, 0.2]), 0.01).tolist() == [True, False]
    assert soteria_mask(torch.tensor([1.0, 0.2]), 0.99).tolist() == [True, False]
    inputs = torch.tensor([[1.0, 3.0]], requires_grad=True)
    features = inputs @ torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert soteria_gradient(gradient, inputs, features, share=0.5).tolist() == [[1.0, 0.0], [3.0, 0.0]]
    assert gradient.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_senseless_settings_are_refused():
    with pytest.raises(DefenseError, match="strength > 0"):
        WhiteBloodCells(strength=0.0)
    with pytest.raises(DefenseError, match="0 < share < 1"):
        soteria_mask(torch.ones(3), 1.0)
    with pytest.raises(DefenseError, match="gradient=\\(2, 3\\), features=\\(1, 2\\)"):
        soteria_gradient(torch.zeros(2, 3), torch.zeros(1, 1), torch.zeros(1, 2))
