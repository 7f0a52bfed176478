"""Stages before, the rule and stages after, as one defense."""

import copy
from functools import partial

import pytest
import torch

from fedllm_sec.defenses import (
    CenteredClipping,
    FoolsGold,
    bucketing,
    crfl,
    krum,
    mean,
    median,
    multi_krum,
    nnm,
    norm_clipping,
    weak_dp,
    weak_dp_client,
)
from fedllm_sec.defenses.accountant import gaussian_epsilon
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.errors import DefenseError
from fedllm_sec.protocols import Decision
from tests.defenses.small import context, matrix

uniform = partial(mean, weights="uniform")


def test_stages_run_in_order_and_weights_are_those_of_the_clients():
    updates = matrix([[2.0], [4.0], [8.0]])
    decision = Pipeline([partial(norm_clipping, radius=4.0)], uniform).decide(updates, context(1))
    assert decision.update.tolist() == pytest.approx([10 / 3])
    assert decision.weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 6])  # the clipping factor is in the weight


def test_weights_of_mixed_rows_give_the_update_from_the_clients_rows():
    torch.manual_seed(0)
    updates = matrix(torch.randn(9, 20).tolist())
    stages = [norm_clipping, partial(nnm, f=2), partial(bucketing, s=2)]
    decision = Pipeline(stages, partial(multi_krum, f=1)).decide(updates, context(20))
    torch.testing.assert_close((decision.weights @ updates.rows.double()).float(), decision.update)


def test_a_rule_after_bucketing_keeps_the_clients_of_a_bucket_and_scores_none_of_them():
    updates = matrix([[0.0], [0.1], [0.2], [0.3], [0.4], [50.0]])
    decision = Pipeline([partial(bucketing, s=2)], partial(krum, f=0)).decide(updates, context(1))
    assert sorted(decision.weights.tolist()) == [0.0, 0.0, 0.0, 0.0, 0.5, 0.5]
    assert decision.kept.tolist() == (decision.weights > 0).tolist()
    assert not decision.kept[5]
    assert decision.scores is None  # a bucket's score is no client's


def test_a_rule_after_bucketing_that_keeps_no_group_has_kept_no_client():
    def nobody(updates, ctx):
        return Decision.keep(updates, torch.zeros(updates.n, dtype=torch.bool))

    updates = matrix([[0.0], [0.1], [0.2], [0.3], [0.4]])
    decision = Pipeline([partial(bucketing, s=2)], nobody).decide(updates, context(1))
    assert decision.kept.tolist() == [False] * 5


def test_rows_mapped_from_a_selection_still_belong_to_the_selected_clients():
    updates = matrix([[1.0], [2.0], [3.0], [4.0]]).select([3, 1])
    decision = Pipeline([norm_clipping], uniform).decide(updates, context(1))
    assert decision.weights.tolist() == pytest.approx([0.5 * 3 / 4, 0.5])  # the median length is 3


def test_noise_on_rows_keeps_the_weights():
    decision = Pipeline([partial(weak_dp_client, radius=10.0)], uniform).decide(matrix([[1.0], [2.0]]), context(1))
    assert decision.weights.tolist() == [0.5, 0.5]


def test_after_stages_act_on_the_new_vector_one_after_the_other():
    pipeline = Pipeline([], median, [partial(crfl, rho=1.0), partial(crfl, rho=0.5)])
    kept = pipeline.finish(torch.tensor([3.0, 4.0]), context(2, rounds=1))
    assert kept.tolist() == pytest.approx([0.3, 0.4])


def test_state_of_all_parts_is_saved_and_restored():
    def made():
        return Pipeline([norm_clipping], FoolsGold(), [partial(weak_dp, sigma=0.0)])

    first, second = matrix([[1.0, 0.0], [1.0, 1.0]]), matrix([[0.0, 2.0], [-1.0, 1.0]])
    straight, resumed = made(), made()
    straight.decide(first, context(2))
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    wanted = straight.decide(second, context(2))
    assert torch.equal(resumed.decide(second, context(2)).update, wanted.update)


def test_a_rehearsal_gives_the_answer_and_leaves_no_trace():
    pipeline = Pipeline([], CenteredClipping(tau=1.0))
    updates = matrix([[5.0], [5.0]])
    assert pipeline.rehearse(updates, context(1)).update.tolist() == [1.0]
    assert pipeline.decide(updates, context(1)).update.tolist() == [1.0]


def spent(before, rule, after, server_lr=1.0, rounds=4):
    """What four rounds of two rows of three values have spent."""
    pipeline, vector = Pipeline(before, rule, after), torch.zeros(3)
    for _ in range(rounds):
        ctx = context(3, start=vector.tolist())
        update = pipeline.decide(matrix([[1.0, 0, 0], [0, 9.0, 0]]), ctx).update
        vector = pipeline.finish(ctx.global_vector + server_lr * update, ctx)
    return pipeline.privacy(1e-5)


CLIP, NOISE = partial(norm_clipping, radius=1.0), partial(weak_dp, sigma=2.0, absolute=True)


@pytest.mark.filterwarnings("ignore:weak_dp")
def test_privacy_is_told_only_where_clipping_mean_and_noise_back_it():
    backed = spent([CLIP], uniform, [NOISE])
    assert backed == {"epsilon": pytest.approx(4.3772, abs=1e-4), "delta": 1e-5, "because": None}
    assert backed["epsilon"] == pytest.approx(gaussian_epsilon(2 * (2 * 1.0 / 2) / 2.0, 1e-5))
    for stages, because in (
        (([CLIP], uniform, []), "neither weak_dp nor weak_dp_client adds noise"),
        (([CLIP], uniform, [partial(weak_dp, sigma=2.0)]), "relative to the step"),
        (([CLIP], uniform, [partial(weak_dp, sigma=0.0, absolute=True)]), "sigma is 0"),
        (([norm_clipping], uniform, [NOISE]), "not clipped to a number"),
        (([], uniform, [NOISE]), "not clipped to a number"),
        (([CLIP], mean, [NOISE]), "not the mean with equal weights"),  # weights are claims
        (([CLIP], median, [NOISE]), "not the mean with equal weights"),
        (([CLIP], uniform, [NOISE], 0.5), "does not add the update as it is"),
        (([weak_dp_client], median, []), "no number as radius"),
        (([weak_dp_client], median, [partial(crfl, rho=10.0)]), "no number as radius"),
    ):
        told = spent(*stages)
        assert told["epsilon"] is None
        assert because in told["because"]


@pytest.mark.filterwarnings("ignore:weak_dp")
def test_noise_on_each_row_is_private_whatever_is_made_of_the_rows():
    own = partial(weak_dp_client, radius=1.0, sigma=2.0, absolute=True)  # a row moves by 2, its noise is 2: mu = 1
    for rule, server_lr in ((median, 1.0), (mean, 0.5)):
        assert spent([own], rule, [], server_lr)["epsilon"] == pytest.approx(gaussian_epsilon(2.0, 1e-5))
    whole = partial(weak_dp_client, radius=1.0, sigma=2.0)  # of length 2: 2 / sqrt(3) on each of 3 values
    assert spent([whole], median, [])["epsilon"] == pytest.approx(gaussian_epsilon(2 * 3**0.5, 1e-5))


@pytest.mark.filterwarnings("ignore:weak_dp")
def test_what_else_the_server_sends_leaves_no_epsilon_for_the_model():
    pipeline = Pipeline([CLIP], uniform, [NOISE])
    assert pipeline.privacy(sent="a second vector") == {"epsilon": None, "delta": 1e-5, "because": "a second vector"}
    rows = Pipeline([partial(weak_dp_client, radius=1.0, sigma=2.0)], uniform)  # made of noisy rows too
    assert rows.privacy(sent="a second vector")["because"] is None


@pytest.mark.filterwarnings("ignore:weak_dp")
def test_what_is_spent_is_remembered():
    first, second = Pipeline([CLIP], uniform, [NOISE]), Pipeline([CLIP], uniform, [NOISE])
    ctx = context(3)
    first.finish(ctx.global_vector + first.decide(matrix([[1.0, 0, 0], [0, 9.0, 0]]), ctx).update, ctx)
    second.load_state_dict(first.state_dict())
    assert second.privacy() == first.privacy()
    assert first.privacy()["epsilon"] > 0


def test_a_rule_of_one_s_own_whose_update_is_no_number_is_told_as_that():
    def lost(updates, ctx):
        return Decision(torch.full((updates.d,), torch.nan))

    with pytest.raises(DefenseError, match="lost: gave back an update with values that are no finite numbers"):
        Pipeline([], lost).decide(matrix(torch.ones(4, 6)), context(6))
