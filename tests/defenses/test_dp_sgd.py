"""DP-SGD: whose gradient is clipped, how much noise falls on it, and what that spends."""

import math

import pytest
import torch

from fedllm_sec.defenses.dp_sgd import DpSgd, advantage_bound, clipped_sum, epsilon_of, noise_for, rate_of
from fedllm_sec.errors import DefenseError, RecipeError
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import Client, LocalContext, LocalTraining
from fedllm_sec.seeds import generator_for

HALF = LocalTraining(batch_size=5, steps=4, optimizer="sgd")


def test_gradients_of_length_5_and_1_are_clipped_to_2_and_left():
    grads = torch.tensor([[3.0, 4.0], [0.6, -0.8], [torch.nan, 1.0], [0.0, 0.0]])
    assert clipped_sum(grads, 2.0).tolist() == pytest.approx([1.2 + 0.6, 1.6 - 0.8])


def test_noise_on_the_sum_of_clipped_gradients_is_divided_by_the_expected_batch():
    rule = DpSgd(clip=2.0, noise=3.0)
    rule.batches(10, 4, generator_for(0))
    torch.manual_seed(1)
    ctx = LocalContext(Client("a", None), 1, torch.zeros(20_000), None, Layout.single(20_000), 1)
    parameters = torch.nn.Parameter(torch.zeros(20_000))
    drawn = []
    for step in (0, 1, 0):
        parameters.grad = torch.ones(20_000)
        rule.before_step(parameters, step, ctx)
        drawn.append(parameters.grad.clone())
    assert float(drawn[0].std()) == pytest.approx(3 * 2 / 4, rel=0.03)
    assert float(drawn[0].mean()) == pytest.approx(1.0, abs=0.05)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_each_row_is_drawn_by_itself_with_probability_batch_over_shard():
    rule, batches = DpSgd(), None
    batches = rule.batches(10, 4, generator_for(3))
    sizes = [len(next(batches)) for _ in range(500)]
    assert min(sizes) < 2 < 6 < max(sizes)
    assert sum(sizes) / 500 == pytest.approx(4, rel=0.05)
    whole = rule.batches(3, None, generator_for(3))
    assert [next(whole), next(whole)] == [[0, 1, 2], [0, 1, 2]]
    assert (rate_of(10, HALF), rate_of(4, HALF)) == (0.5, 1.0)


def test_a_bound_of_epsilon_0_allows_delta_alone_and_a_large_one_everything():
    assert advantage_bound(0.0, 0.1) == pytest.approx(0.1)
    assert advantage_bound(math.log(3), 0.0) == pytest.approx(0.5)
    assert advantage_bound(1e9, 0.0) == pytest.approx(1.0)


def test_settings_that_contradict_are_refused():
    with pytest.raises(DefenseError, match=r"dp_sgd: needs noise or epsilon, got noise=1\.0, epsilon=2\.0"):
        DpSgd(noise=1.0, epsilon=2.0)
    with pytest.raises(DefenseError, match="dp_sgd: needs clip > 0"):
        DpSgd(clip=0.0)


def test_noise_is_found_for_an_epsilon_and_spends_it_over_all_rounds():
    pytest.importorskip("opacus")
    rule = DpSgd(epsilon=2.0)
    rule.plan([5, 20], HALF, rounds=3)
    for _ in range(3):
        rule.trained("a", 5, HALF)
    rule.trained("b", 20, HALF)
    told = rule.told([rule])
    assert 1.9 < told["epsilon"]["a"] <= 2.0
    assert told["epsilon"]["b"] < told["epsilon"]["a"]
    again = DpSgd(noise=rule.noise)
    again.load_state_dict(rule.state_dict())
    assert again.told([again])["epsilon"] == told["epsilon"]
    with pytest.raises(RecipeError, match=r"dp_sgd.epsilon: 0.0001: no noise is enough"):
        noise_for(1e-4, 1e-5, 1.0, 10**9)


def test_a_full_batch_spends_what_the_gaussian_mechanism_does():
    """Renyi: alpha / (2 noise^2) a step, so never less than the exact epsilon of 4 steps with noise 4: mu = 0.5."""
    pytest.importorskip("opacus")
    from fedllm_sec.defenses.accountant import gaussian_epsilon

    exact = gaussian_epsilon(0.5, 1e-5)
    assert exact <= epsilon_of(4.0, 1.0, 4, 1e-5) < 1.2 * exact
    assert epsilon_of(4.0, 0.1, 4, 1e-5) < exact


def test_there_is_no_epsilon_without_noise_or_beside_a_rule_that_looks_at_the_rows():
    pytest.importorskip("opacus")
    from fedllm_sec.defenses.client_side import Soteria, WhiteBloodCells
    from fedllm_sec.defenses.compression import Int8

    rule = DpSgd(noise=0.0)
    assert rule.told([rule])["because"] == "its noise is 0"
    rule = DpSgd()
    assert rule.told([rule, WhiteBloodCells(), Int8()])["because"] is None
    assert rule.told([Soteria(), rule]) == {
        "epsilon": None,
        "delta": 1e-5,
        "noise": 1.0,
        "protects": rule.told([rule])["protects"],
        "because": "Soteria looks at the rows and adds no noise",
    }
