"""Three-sigma and the cross-round check: what they compute, what they remember, how they fall back."""

import numpy as np
import pytest
import torch

from fedllm_sec.defenses.history import CrossRound, ThreeSigma, upper_bound
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.seeds import generator_for
from tests.defenses.defense_rows import KINDS, assert_close, assert_repaired, attacked, both, context, matrix, rows_of

SIZES = [1, 2, 3, 8, 17, 64]


def distances_reference(x):
    """Distances to the geometric median, by plain Weiszfeld steps."""
    z = x.mean(axis=0)
    for _ in range(3000):
        far = np.maximum(np.linalg.norm(x - z, axis=1), 1e-12 * np.abs(x).max())
        z = (x / far[:, None]).sum(axis=0) / (1 / far).sum()
    return np.linalg.norm(x - z, axis=1)


def kept_reference(scores, k):
    centre = np.median(scores)
    return scores <= centre + k * 1.4826 * np.median(np.abs(scores - centre)) + 1e-6 * centre


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_three_sigma_equals_its_reference(kind, n):
    updates, x = both(kind, n)
    for k in (1.0, 3.0):
        wanted = x[kept_reference(distances_reference(x), k)].mean(axis=0)
        assert_close(ThreeSigma(k=k)(updates, context()).update, wanted)


@pytest.mark.parametrize("n", [12, 40])
def test_three_sigma_with_moments_is_the_papers_mean_and_standard_deviation(n):
    updates, x = both("heavy_tailed", n)
    scores = distances_reference(x)
    wanted = x[scores <= scores.mean() + 3 * scores.std(ddof=1)].mean(axis=0)
    assert_close(ThreeSigma(estimate="moments")(updates, context()).update, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_three_sigma_against_the_running_mean_of_its_own_updates(kind):
    rule, given = ThreeSigma(reference="running_mean", k=2.0), []
    for seed in range(4):
        updates, x = both(kind, 9, seed=seed)
        if given:
            scores = np.linalg.norm(x - np.mean(given, axis=0), axis=1)
        else:
            scores = distances_reference(x)
        given.append(x[kept_reference(scores, 2.0)].mean(axis=0))
        assert_close(rule(updates, context()).update, given[-1], 1e-5)


def test_three_sigma_by_hand():
    # The geometric median of points on a line is the middle one, 2. Distances 2, 1, 0, 1, 18: median 1,
    # deviations 1, 0, 1, 0, 17 with median 1, bound 1 + 3 * 1.4826 = 5.4478.
    decision = ThreeSigma()(matrix([[0.0], [1.0], [2.0], [3.0], [20.0]]), context(1))
    assert decision.scores.tolist() == pytest.approx([2, 1, 0, 1, 18])
    assert decision.kept.tolist() == [True, True, True, True, False]
    assert float(decision.update) == 1.5


def test_upper_bounds_by_hand():
    scores = torch.tensor([2.0, 1.0, 0.0, 1.0, 18.0], dtype=torch.float64)
    assert upper_bound(scores, 3.0, "robust") == pytest.approx(5.4478)
    # mean 4.4, squared deviations 5.76 + 11.56 + 19.36 + 11.56 + 184.96 = 233.2, over 4
    assert upper_bound(scores, 2.0, "moments") == pytest.approx(4.4 + 2 * 58.3**0.5)


def test_moments_that_could_never_drop_anybody_are_an_error():
    with pytest.raises(DefenseError, match=r"\(n - 1\) / sqrt\(n\) > k.*got n=10, k=3.0. Lower k"):
        ThreeSigma(estimate="moments")(both("random", 10)[0], context())
    with pytest.raises(DefenseError, match="cross_round: needs"):
        CrossRound(estimate="moments")(both("random", 10)[0], context())


def test_three_sigma_by_foolsgold_drops_copies_that_keep_coming():
    rule, rng = ThreeSigma(score="foolsgold"), generator_for(9, "independent")
    for _ in range(3):
        rows = torch.randn(9, 400, generator=rng)
        rows[6:] = rows_of("random", 1, 400)
        decision = rule(UpdateMatrix.of(rows), context(400))
    assert decision.kept.tolist() == [True] * 6 + [False] * 3
    assert_close(decision.update, rows[:6].double().mean(0).numpy())


def test_the_running_mean_and_the_sums_come_back_from_the_state():
    for settings in ({"reference": "running_mean"}, {"score": "foolsgold"}):
        straight = ThreeSigma(**settings)
        for seed in range(3):
            straight(both("random", 7, seed=seed)[0], context())
        resumed = ThreeSigma(**settings)
        resumed.load_state_dict(straight.state_dict())
        last = both("random", 7, seed=5)[0]
        assert torch.equal(resumed(last, context()).scores, straight(last, context()).scores)


@pytest.mark.parametrize("size", [10.0, 1e18])
@pytest.mark.parametrize("rule", [ThreeSigma, CrossRound])
def test_three_far_rows_are_dropped(rule, size):
    updates, honest = attacked(size)
    decision = rule()(updates, context())
    assert not decision.kept[-3:].any()
    assert_repaired(decision.update, honest)


# ---------------------------------------------------------------- cross-round


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_cross_round_equals_its_reference(kind, n):
    rule, last, whole = CrossRound(k=1.0, longer=1.5), {}, None
    for seed in range(3):
        updates, x = both(kind, n, seed=seed)
        ctx = context(last_update=None if whole is None else torch.from_numpy(whole).float())
        below = kept_reference(distances_reference(x), 1.0)
        kept, lengths = [], np.linalg.norm(x, axis=1)
        for i, row in enumerate(x):
            same = i in last and cosine(row, last[i]) >= 0.5 and lengths[i] <= 1.5 * np.linalg.norm(last[i])
            along = whole is None or cosine(row, ctx.last_update.double().numpy()) >= 0.5
            kept.append(bool(below[i] or (same and along and lengths[i] <= 1.5 * np.median(lengths))))
        whole = x[kept].mean(axis=0)
        last.update({i: x[i] for i in range(n) if kept[i]})
        decision = rule(updates, ctx)
        assert decision.kept.tolist() == kept
        assert_close(decision.update, whole)


def test_cross_round_by_hand():
    rule = CrossRound()
    rule(matrix([[1.0, 0.0], [1.0, 0.1], [1.1, 0.0], [0.9, 0.0], [1.0, -0.1]]), context(2))
    # Client 4 goes on in its own direction and that of the last update, somewhat farther: not suspect, kept.
    # Client 3 turns around by as much: suspect, and far from the geometric median: dropped.
    rows = [[1.0, 0.0], [1.0, 0.1], [1.1, 0.0], [-1.9, 0.0], [1.9, 0.0]]
    last = context(2, last_update=torch.tensor([1.0, 0.0]))
    decision = rule(matrix(rows), last)
    assert decision.notes["suspects"] == 1.0
    assert decision.kept.tolist() == [True, True, True, False, True]
    assert rule.last.rows["3"].tolist() == pytest.approx([0.9, 0.0])  # a dropped row is not remembered
    # Client 4 again, five times as far: a cosine cannot see that, its length can.
    decision = rule(matrix([*rows[:3], [0.9, 0.0], [9.5, 0.0]]), last)
    assert decision.notes["suspects"] == 1.0
    assert decision.kept.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(("compare", "start"), [("updates", 0.0), ("models", 0.0), ("models", 1.0)])
def test_rows_a_thousand_times_too_long_are_dropped_whatever_is_compared(compare, start):
    # ten clients whose cosines are about 0.8; from round 2 on two send their honest row times 1,000
    rule, whole = CrossRound(compare=compare), None
    for round in (1, 2, 3):
        honest = rows_of("random", 1, 400) + 0.5 * rows_of("random", 10, 400, seed=round)
        rows = honest.clone()
        rows[8:] *= 1000.0 if round > 1 else 1.0
        vector = torch.full((400,), start)
        decision = rule(UpdateMatrix.of(rows), context(400, last_update=whole, global_vector=vector))
        whole = decision.update
        assert decision.kept.tolist() == [True] * 8 + [round == 1] * 2
        assert float(whole.norm()) <= 1.1 * float(honest.mean(0).norm())


def test_models_are_compared_on_request_and_a_turned_row_of_honest_length_is_then_nobodys_suspicion():
    start, steps = torch.full((400,), 5.0), rows_of("random", 6, 400)
    turned = steps.clone()
    turned[5] *= -1
    suspects = {}
    for compare in ("updates", "models"):
        rule = CrossRound(compare=compare)
        rule(UpdateMatrix.of(steps), context(400, global_vector=start))
        suspects[compare] = rule(UpdateMatrix.of(turned), context(400, global_vector=start)).notes["suspects"]
    assert suspects == {"updates": 1.0, "models": 0.0}
    assert torch.allclose(rule.last.rows["0"], start + steps[0])


def test_zero_rows_and_zero_updates_are_suspects_without_nan():
    rule = CrossRound()
    zeros = matrix([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    for _ in range(2):
        decision = rule(zeros, context(2, last_update=torch.zeros(2)))
        assert decision.notes["suspects"] == 3.0
        assert torch.isfinite(decision.update).all()


def test_the_history_belongs_to_client_ids():
    rule = CrossRound()
    rule(matrix([[1.0, 0.0], [0.0, 1.0]], ids=["a", "b"]), context(2))
    swapped = matrix([[0.0, 2.0], [2.0, 0.0], [1.0, 1.0]], ids=["b", "a", "new"])
    assert rule(swapped, context(2)).notes["suspects"] == 1.0  # the new client


def test_rows_of_another_length_than_the_history_are_refused():
    rule = CrossRound()
    rule(matrix([[1.0, 0.0]]), context(2))
    with pytest.raises(DefenseError, match='history of client "0" has 2 values, its row 3'):
        rule(matrix([[1.0, 0.0, 0.0]]), context(3))
