"""DnC, CAF and SMEA against singular value decompositions of the rows themselves."""

import itertools

import numpy as np
import pytest
import torch

from fedllm_sec.defenses.spectral import caf, centred_products, dnc, draw_coordinates, levelled, smea
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.seeds import generator_for
from tests.defenses.defense_rows import KINDS, assert_close, assert_repaired, attacked, both, context, matrix, rows_of


def said(value: object) -> str:
    """A rule or its settings in a test's name."""
    return getattr(value, "__name__", str(value))


def dnc_reference(x, f, c=1.0):
    centred = x - x.mean(axis=0)
    scores = (centred @ np.linalg.svd(centred, full_matrices=False)[2][0]) ** 2
    return x[np.argsort(scores)[: len(x) - int(c * f)]].mean(axis=0), scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "f"), [(1, 0), (2, 0), (3, 1), (8, 3), (16, 5), (33, 8), (64, 31)])
def test_dnc_equals_its_reference(kind, n, f):
    updates, x = both(kind, n)
    decision = dnc(updates, context(), f=f)
    wanted, scores = dnc_reference(x, f)
    assert_close(decision.update, wanted)
    if n > 1:
        assert_close(decision.scores, scores)


def test_dnc_by_hand():
    # mean (0, 0); the top direction is the first axis; squared projections 16, 1, 9, 0 and the largest goes
    rows = [[4.0, 0.0], [-1.0, 0.5], [-3.0, 0.0], [0.0, -0.5]]
    decision = dnc(matrix(rows), context(2), f=1)
    assert decision.kept.tolist() == [False, True, True, True]
    assert decision.scores.tolist() == pytest.approx([16.0, 1.0, 9.0, 0.0], abs=0.1)
    assert decision.update.tolist() == pytest.approx([-4 / 3, 0.0])


def test_dnc_on_a_sample_intersects_the_draws():
    updates, honest = attacked()
    decision = dnc(updates, context(), f=3, coordinates=9, iterations=4)
    assert decision.kept[-3:].tolist() == [False] * 3
    assert_repaired(decision.update, honest)


def test_dnc_on_a_sample_of_everything_is_dnc():
    updates, _ = both("random", 9)
    sampled = dnc(updates, context(), f=2, coordinates=10_000, iterations=3)
    assert torch.equal(sampled.update, dnc(updates, context(), f=2).update)


def test_dnc_keeps_the_most_frequent_survivors_when_no_row_survives_every_draw():
    # one coordinate a draw, and row i stands out in coordinate i alone: each draw drops another row
    updates = matrix((10 * np.eye(3)).tolist())
    decision = dnc(updates, context(3), f=1, coordinates=1, iterations=40, c=1.0)
    assert decision.notes["fallback"] == 1.0
    assert bool(decision.kept.any())
    assert torch.isfinite(decision.update).all()


def test_coordinates_are_drawn_once_each_in_rising_order():
    drawn = draw_coordinates(50, 20, generator_for(1))
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert draw_coordinates(50, 50, generator_for(1)).tolist() == list(range(50))


def caf_reference(x, f):
    n, c = len(x), np.ones(len(x))
    best = (np.inf, x.mean(axis=0))
    while c.sum() > n - 2 * f or best[0] == np.inf:
        mean = c @ x / c.sum()
        root = np.sqrt(c / c.sum())[:, None] * (x - mean)
        values, directions = np.linalg.svd(root, full_matrices=False)[1:]
        if values[0] ** 2 < best[0]:
            best = (values[0] ** 2, mean)
        tau = ((x - mean) @ directions[0]) ** 2 * (c > 0)
        if f == 0 or tau.max() == 0:
            break
        c = c * (1 - tau / tau.max())
    return best[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "f"), [(1, 0), (2, 0), (3, 1), (8, 3), (16, 5), (33, 8), (64, 20)])
def test_caf_equals_its_reference(kind, n, f):
    updates, x = both(kind, n)
    assert_close(caf(updates, context(), f=f).update, caf_reference(x, f))


def test_caf_by_hand():
    # c = 1, 1, 1: mean 2, projections 4, 4, 16, c becomes 3/4, 3/4, 0 with sum 1.5 > 3 - 2: the mean of the
    # first two is next, with no spread left
    decision = caf(matrix([[0.0], [0.0], [6.0]]), context(1), f=1)
    assert float(decision.update) == 0.0
    assert decision.weights.tolist() == pytest.approx([0.5, 0.5, 0.0])


def smea_reference(x, f):
    def spread(s):
        rows = x[list(s)]
        return np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)[0]

    return x[list(min(itertools.combinations(range(len(x)), len(x) - f), key=spread))].mean(axis=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "f"), [(1, 0), (2, 0), (3, 1), (6, 2), (9, 4), (64, 0)])
def test_smea_equals_its_reference(kind, n, f):
    updates, x = both(kind, n)
    decision = smea(updates, context(), f=f)
    assert decision.notes["exact"] == 1.0
    assert_close(decision.update, smea_reference(x, f))


def test_smea_by_hand():
    # {0, 1, 2} has variance 2/3 along its line, {1, 2, 7} far more
    decision = smea(matrix([[0.0], [1.0], [2.0], [7.0]]), context(1), f=1)
    assert decision.kept.tolist() == [True, True, True, False]
    assert float(decision.update) == 1.0


@pytest.mark.parametrize("size", [10.0, 1e18])
@pytest.mark.parametrize(("rule", "settings"), [(dnc, {}), (caf, {}), (smea, {}), (smea, {"max_subsets": 5})], ids=said)
def test_three_far_rows_do_not_move_the_result(rule, settings, size):
    updates, honest = attacked(size)
    assert_repaired(rule(updates, context(), f=3, **settings).update, honest)


def test_a_common_part_ten_thousand_times_larger_changes_nothing():
    rows = rows_of("random", 12) * 2.0**-10
    common = 16.0 * torch.ones(43)
    shifted = UpdateMatrix.of((rows + common).float())
    plain = UpdateMatrix.of(shifted.rows - common)  # exact in float32
    for rule in (dnc, caf, smea):
        got = rule(shifted, context(), f=3).weights
        assert torch.allclose(got, rule(plain, context(), f=3).weights, atol=1e-9)


def test_products_about_a_weighted_mean_follow_from_distances():
    x = rows_of("random", 6).double()
    w = torch.tensor([0.1, 0.0, 0.3, 0.2, 0.2, 0.2], dtype=torch.float64)
    centred = x - w @ x
    squares = ((x[:, None] - x[None]) ** 2).sum(-1)
    assert torch.allclose(centred_products(squares, w), centred @ centred.T)


def test_values_that_differ_by_rounding_are_one_value_and_others_stay():
    values = torch.tensor([3.0, 1.0, 1.0 + 1e-9, 2.0, 0.0, 1e-13, 2.01], dtype=torch.float64)
    assert levelled(values).tolist() == [3.0, 1.0, 1.0, 2.0, 0.0, 0.0, 2.01]


@pytest.mark.parametrize(("rule", "settings"), [(smea, {}), (smea, {"max_subsets": 1}), (dnc, {})], ids=said)
def test_of_two_equal_rows_the_one_with_the_lower_id_stays_whatever_rounding_says(rule, settings):
    split = 0
    for case in range(60):
        rows = torch.randn(7, 64, generator=generator_for(case, "rows"))
        j = 1 + case % 6
        rows[j] = rows[0]
        kept = rule(matrix(rows.tolist()), context(64), f=1, **settings).kept.tolist()
        split += kept[0] != kept[j]
        assert kept[0] or not kept[j], case
    assert split >= 20  # rounding used to choose the lower id to go in a third of these


@pytest.mark.parametrize("rule", [caf, smea])
def test_half_attackers_are_refused(rule):
    with pytest.raises(DefenseError, match=r"needs n >= 2f \+ 1 clients, got n=4, f=2"):
        rule(matrix([[0.0]] * 4), context(1), f=2)


def test_dnc_refuses_repeats_without_a_sample():
    with pytest.raises(DefenseError, match="Set coordinates"):
        dnc(matrix([[0.0]] * 4), context(1), f=1, iterations=5)
