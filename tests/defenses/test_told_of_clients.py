"""What surrounds the rules, over the whole menu: whose verdict it is, who is remembered, whose random stream it is."""

import inspect
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from fedllm_sec.defenses import MENU, bucketing, flame, krum, mean, nnm, norm_clipping, weak_dp, weak_dp_client
from fedllm_sec.defenses.pipeline import Pipeline, keys_of, mixture, state_of
from fedllm_sec.defenses.subject import EXAMPLES, PLANTED, StandIn
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.recipe.resolve import resolve, settings_of
from fedllm_sec.seeds import generator_for
from fedllm_sec.testing import check_defense
from tests.defenses.defense_rows import ON_ADAPTERS
from tests.defenses.small import context, formed, matrix

NEEDED = {"f": 1, "theta": 3, "rho": 9.0, "source": "noise"}  # settings without a default
RULES = [name for name, entry in MENU.items() if entry.kind == "rule" and name not in ON_ADAPTERS]
BEFORE = [name for name, entry in MENU.items() if entry.kind == "before"]
MIXING = ("nnm", "bucketing")
CASES = [*((rule, {}) for rule in RULES), ("three_sigma", {"score": "foolsgold"}), ("foolsgold", {"history": False})]
uniform = partial(mean, weights="uniform")


def made(name, **changed):
    known = settings_of(MENU[name].make)
    needed = {key: NEEDED[key] for key, setting in known.items() if setting.default is inspect.Parameter.empty}
    if name in ("trimmed_mean", "slsgd"):
        needed = {"f": 1}
    return resolve(name, {**needed, **changed}, MENU, "test")


def sixteen(d=30):
    rows = torch.randn(16, d, generator=generator_for(3, "rows")) + 1
    return UpdateMatrix.of(rows, ids=[f"c{i:02d}" for i in range(16)], counts=[float(i + 1) for i in range(16)])


def ctx(d=30):
    known = {"root_update": torch.ones(d), "root_rows": EXAMPLES, "classifier": StandIn(), "indicator": PLANTED}
    return replace(context(d, rounds=10), **known)


def is_combination(decision, rows):
    return decision.weights is not None and torch.allclose(
        (decision.weights @ formed(rows).double()).float(), decision.update, rtol=1e-4, atol=1e-5
    )


# ---------------------------------------------------------------- a verdict on rows is no verdict on clients


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize(("rule", "settings"), CASES, ids=[f"{rule}{settings or ''}" for rule, settings in CASES])
def test_what_is_told_of_clients_is_true_of_clients(before, rule, settings):
    updates, stage = sixteen(), made(before)
    rows = stage(updates, ctx())
    plain = made(rule, **settings)(rows, ctx())
    alone = made(rule, **settings)
    alone(updates, ctx())
    remembers = bool(set(updates.ids) & set(keys_of(state_of(alone))))
    pipeline = Pipeline([stage], made(rule, **settings))
    if remembers and before == "bucketing":  # rows that are other clients in every round
        with pytest.raises(DefenseError, match="remembers clients by id from round to round, and bucketing"):
            pipeline.decide(updates, ctx())
        return
    told = pipeline.decide(updates, ctx())
    if is_combination(plain, rows) and before != "weak_dp_client":  # whose noise is nobody's row
        assert is_combination(told, updates)
    assert (told.kept is None) == (plain.kept is None)
    if before in MIXING:
        assert told.scores is None
        if told.kept is not None and told.weights is not None:
            assert torch.equal(told.kept, told.weights != 0)
    else:  # each row is one client's, clipped or noised
        assert (told.scores is None) == (plain.scores is None)
        assert told.kept is None or int(told.kept.sum()) == int(plain.kept.sum())


def test_a_mixed_row_that_krum_takes_keeps_all_whose_rows_are_in_it():
    # nnm with f = 2 of [0, 1, 2, 3, 10]: each row the mean of its three nearest
    updates = matrix([[0.0], [1.0], [2.0], [3.0], [10.0]])
    decision = Pipeline([partial(nnm, f=2)], partial(krum, f=1)).decide(updates, context(1))
    assert decision.weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])
    assert decision.kept.tolist() == [True, True, True, False, False]
    assert decision.scores is None


def test_clients_that_a_stage_left_out_are_not_kept_and_have_no_score():
    def shortest(updates, ctx):
        return updates.select([3, 1, 0])

    updates = matrix([[1.0], [2.0], [50.0], [2.4]])
    decision = Pipeline([shortest], partial(krum, f=0)).decide(updates, context(1))
    assert decision.kept.tolist() == [False, True, False, False]
    assert decision.weights.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert decision.scores is None


def test_of_rows_that_were_replaced_under_other_names_nothing_is_told():
    def other(updates, ctx):
        return UpdateMatrix.of(2 * formed(updates), ids=["x", "y", "z"])

    decision = Pipeline([other], partial(krum, f=0)).decide(matrix([[1.0], [2.0], [3.0]]), context(1))
    assert (decision.weights, decision.kept, decision.scores) == (None, None, None)


def test_weights_are_followed_through_stages_that_replace_the_rows_they_were_given():
    torch.manual_seed(0)
    updates = matrix(torch.randn(9, 20).tolist()).select([8, 2, 3, 4, 5, 6, 7])
    still = partial(weak_dp_client, radius=100.0, sigma=0.0)
    stages = [norm_clipping, still, partial(nnm, f=2), still, partial(bucketing, s=2)]
    decision = Pipeline(stages, partial(krum, f=0)).decide(updates, context(20))
    torch.testing.assert_close((decision.weights @ formed(updates).double()).float(), decision.update)
    assert torch.equal(decision.kept, decision.weights != 0)


def test_what_is_not_mixed_in_is_exactly_nothing():
    updates = matrix([[1.0], [2.0], [4.0]]).mix(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1 / 3]]))
    turned = updates.mix(torch.diag(torch.tensor([0.3, 0.7, 0.1])))
    assert (mixture(turned, updates) != 0).tolist() == torch.eye(3, dtype=torch.bool).tolist()


def smooth(updates, ctx):
    """Each row and a tenth of everybody's, as new rows under the clients' names."""
    rows = formed(updates)
    return UpdateMatrix.of(0.9 * rows + 0.1 * rows.mean(0), ids=updates.ids, counts=updates.counts)


def test_the_kit_finds_rows_that_bear_a_clients_name_and_hold_another_clients():
    with pytest.raises(AssertionError, match=r'own rows: the row with the id "client[0-9]+" holds another client'):
        check_defense(smooth, kind="before")


# ---------------------------------------------------------------- stages that fit together


def test_a_bucket_claims_what_its_clients_claim():
    updates = matrix([[float(i)] for i in range(5)], counts=[100, 1, 2, 3, 4])
    mixed = bucketing(updates, context(1), s=2)
    shares = (mixed.mixing > 0).double()
    assert mixed.counts == tuple((shares @ torch.tensor([100.0, 1, 2, 3, 4]).double()).tolist())
    assert sum(mixed.counts) == 110
    alone = bucketing(updates, context(1), s=1)  # another order: each claim goes with its row
    assert [count for _, count in sorted(zip(formed(alone)[:, 0].tolist(), alone.counts, strict=True))] == [
        100, 1, 2, 3, 4,
    ]  # fmt: skip


def test_claimed_counts_weigh_after_bucketing():
    updates = matrix([[float(i)] for i in range(10)], counts=[100] + [1] * 9)
    by_count = Pipeline([partial(bucketing, s=2)], partial(mean, weights="counts", cap=1e9)).decide(updates, context(1))
    heavy = by_count.weights[0]
    assert float(heavy) == pytest.approx(101 / 109 / 2)  # its bucket claims 101 of 109, of which its row is a half
    assert sorted(by_count.weights.tolist())[:8] == pytest.approx([1 / 109] * 8)
    assert Pipeline([partial(bucketing, s=2)], uniform).decide(updates, context(1)).weights[0] == pytest.approx(0.1)


def test_a_rule_that_finds_too_few_rows_after_bucketing_says_who_made_them():
    updates = matrix([[float(i)] for i in range(10)])
    with pytest.raises(
        DefenseError, match=r"got n=5, f=2.* given the 5 rows bucket0, \.\.\. that bucketing made of 10"
    ):
        Pipeline([partial(bucketing, s=2)], partial(krum, f=2)).decide(updates, context(1))


# ---------------------------------------------------------------- a stream for each consumer


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def test_noises_of_one_round_are_independent_of_each_other():
    """In a run `decide` and `finish` are given contexts of one seed; so they are here, for each noise by itself."""
    d = 20_000
    rows, start = UpdateMatrix.of(torch.ones(4, d), ids=list("abcd")), torch.zeros(d)
    noisy = partial(weak_dp, sigma=1.0, absolute=True)
    first = Pipeline([], uniform, [noisy]).finish(start, context(d))
    both = Pipeline([], uniform, [noisy, noisy]).finish(start, context(d))
    noises = {
        "before": Pipeline([partial(weak_dp_client, radius=1e3)], uniform).decide(rows, context(d)).update - 1,
        "flame": Pipeline([], flame).decide(rows, context(d)).update - 1,
        "weak_dp": first,
        "weak_dp again": both - first,
    }
    for (one, a), (other, b) in itertools.combinations(noises.items(), 2):
        assert float(a.norm()) > 0
        assert float(b.norm()) > 0
        assert abs(cosine(a, b)) < 0.04, (one, other)  # 1.000 is one vector
    again = Pipeline([], uniform, [noisy, noisy]).finish(start, context(d))
    assert torch.equal(again, both)  # the same seed gives the same noise


def test_a_stage_more_changes_nobody_elses_draws():
    rows = sixteen()
    one = Pipeline([], flame).decide(rows, ctx()).update

    def nothing(updates, ctx):
        return updates

    assert torch.equal(Pipeline([nothing], flame).decide(rows, ctx()).update, one)
