"""MeaMed, MDA and LASA against their definitions."""

import itertools

import numpy as np
import pytest
import torch

from fedllm_sec.defenses.filters import lasa, magnitude_thresholds, mda, meamed, peel_diameter
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import Layout, UpdateMatrix
from tests.defenses.defense_rows import KINDS, assert_close, assert_repaired, attacked, both, context, matrix, rows_of


def meamed_reference(x, f):
    middle = np.median(x, axis=0)
    out = np.empty(x.shape[1])
    for j in range(x.shape[1]):
        nearest = sorted(x[:, j], key=lambda v: abs(v - middle[j]))[: len(x) - f]
        out[j] = sum(nearest) / len(nearest)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "f"), [(1, 0), (2, 0), (3, 1), (7, 3), (15, 4), (33, 8), (63, 31)])
def test_meamed_equals_its_reference(kind, n, f):
    updates, x = both(kind, n)
    assert_close(meamed(updates, context(), f=f).update, meamed_reference(x, f))


def test_meamed_by_hand():
    # medians 2 and 0; nearest three: 1, 2, 3 and -1, 0, 1
    updates = matrix([[1.0, -1.0], [2.0, 0.0], [3.0, 1.0], [100.0, 50.0], [-9.0, -7.0]])
    assert meamed(updates, context(2), f=2).update.tolist() == [2.0, 0.0]


def mda_reference(x, f):
    def spread(s):
        gaps = [((x[i] - x[j]) ** 2).sum() for i, j in itertools.combinations(s, 2)]
        return (max(gaps, default=0.0), sum(gaps))

    return x[list(min(itertools.combinations(range(len(x)), len(x) - f), key=spread))].mean(axis=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "f"), [(1, 0), (2, 0), (3, 1), (5, 2), (8, 2), (9, 4), (64, 0)])
def test_mda_equals_its_reference(kind, n, f):
    updates, x = both(kind, n)
    decision = mda(updates, context(), f=f)
    assert decision.notes["exact"] == 1.0
    assert_close(decision.update, mda_reference(x, f))


def test_mda_by_hand():
    decision = mda(matrix([[0.0], [1.0], [3.0], [9.0], [8.5]]), context(1), f=2)
    assert decision.kept.tolist() == [True, True, True, False, False]
    assert float(decision.update) == pytest.approx(4 / 3)
    assert decision.scores.tolist() == [3.0, 2.0, 3.0, 9.0, 8.5]


def test_mda_chooses_the_tighter_of_two_sets_with_one_diameter():
    # {0, 4, 1} and {0, 4, 2} both have diameter 4; the sum of squares decides: 16 + 1 + 9 against 16 + 4 + 4
    assert mda(matrix([[0.0], [4.0], [1.0], [2.0], [50.0]]), context(1), f=2).kept.tolist() == [
        True, False, True, True, False,
    ]  # fmt: skip
    decision = mda(matrix([[0.0], [4.0], [1.0], [2.0]]), context(1), f=1)
    assert decision.kept.tolist() == [True, False, True, True]


def test_mda_turns_greedy_beyond_its_subset_limit_and_says_so():
    updates, honest = attacked()
    decision = mda(updates, context(), f=3, max_subsets=10)
    assert decision.notes["exact"] == 0.0
    assert decision.kept.tolist() == [True] * 10 + [False] * 3
    assert_repaired(decision.update, honest)


def test_greedy_peeling_drops_the_lonelier_end_of_the_diameter():
    points = torch.tensor([0.0, 1.0, 2.0, 10.0], dtype=torch.float64)
    assert peel_diameter((points[:, None] - points[None]) ** 2, 3) == [0, 1, 2]


@pytest.mark.parametrize("size", [10.0, 1e18])
@pytest.mark.parametrize("rule", [meamed, mda])
def test_three_far_rows_do_not_move_the_result(rule, size):
    updates, honest = attacked(size)
    assert_repaired(rule(updates, context(), f=3).update, honest)


@pytest.mark.parametrize("rule", [meamed, mda])
def test_too_many_assumed_attackers_are_refused_with_a_way_out(rule):
    with pytest.raises(DefenseError, match=r"needs n >= 2f \+ 1 clients, got n=4, f=2\. Lower f"):
        rule(matrix([[0.0]] * 4), context(1), f=2)


# ---------------------------------------------------------------- LASA

LAYERS = Layout(("a", "b", "c"), ((5, 4), (3,), (20,)))


def lasa_reference(x, sparsity, norm_bound, sign_bound):
    n, d = x.shape
    norms = np.linalg.norm(x, axis=1)
    x = x * np.minimum(1, np.median(norms) / np.where(norms > 0, norms, 1))[:, None]
    for row in x:
        row[np.abs(row) < np.sort(np.abs(row))[int(sparsity * d)]] = 0
    out = np.empty(d)
    for place in LAYERS.slices().values():
        part = x[:, place]
        signs = np.sign(part).sum(axis=1) / np.maximum(1, np.abs(np.sign(part)).sum(axis=1))
        kept = np.ones(n, bool)
        for v, bound in ((np.linalg.norm(part, axis=1), norm_bound), ((1 + signs) / 2, sign_bound)):
            if v.std() > 0:
                kept &= np.abs(v - np.median(v)) / v.std() <= bound + 1e-9
        out[place] = part[kept if kept.any() else slice(None)].mean(axis=0)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 64])
def test_lasa_equals_its_reference(kind, n):
    updates, x = both(kind, n)
    updates = UpdateMatrix.of(updates.rows, layout=LAYERS)
    for sparsity, norm_bound, sign_bound in ((0.3, 2.0, 1.0), (0.0, 1.0, 1.0), (0.7, 1.0, 2.0)):
        settings = {"sparsity": sparsity, "norm_bound": norm_bound, "sign_bound": sign_bound}
        decision = lasa(updates, context(layout=LAYERS), **settings)
        assert_close(decision.update, lasa_reference(x.copy(), sparsity, norm_bound, sign_bound))


def test_lasa_by_hand():
    # No clipping (equal norms of 5). Half of each row goes: 4 and 3 stay, -4 stays in the last. The last
    # row's sign balance is 0 where the others have 1, so its score is 1 / std = 2 and it is dropped.
    rows = [[4.0, 3.0, 0.0, 0.0], [4.0, 3.0, 0.0, 0.0], [4.0, 3.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0],
            [-4.0, -3.0, 0.0, 0.0]]  # fmt: skip
    decision = lasa(matrix(rows), context(4), sparsity=0.5)
    assert decision.update.tolist() == [3.75, 3.25, 0.0, 0.0]
    assert decision.scores.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_lasa_finds_the_exact_threshold_in_any_block_width():
    rows = rows_of("heavy_tailed", 5, 300)
    rows[0] = 0.0
    for chunk_mb in (None, 0.0005):
        updates = UpdateMatrix.of(rows, chunk_mb=chunk_mb)
        for keep in (1, 7, 150, 300):
            norms, thresholds = magnitude_thresholds(updates, keep)
            assert torch.equal(thresholds, rows.abs().sort(dim=1, descending=True).values[:, keep - 1])
            assert torch.allclose(norms, rows.double().norm(dim=1))


@pytest.mark.parametrize("size", [3.0, 1e18])
def test_lasa_drops_rows_with_turned_signs(size):
    updates, honest = attacked(size, bad=2)
    updates = UpdateMatrix.of(updates.rows, layout=LAYERS)
    decision = lasa(updates, context(layout=LAYERS), sparsity=0.0)
    assert decision.scores[-2:].tolist() == [1.0, 1.0]
    assert_repaired(decision.update, honest)


def test_lasa_takes_everyone_in_a_layer_where_nobody_passes():
    # norms 5, 5, 5, 5, 1 (median 5, std 1.6): the last fails. Sign purities 1, 1, 0, 0, 1/2 (median 1/2, std
    # 0.447): the first four fail.
    rows = [[2.5] * 4] * 2 + [[-2.5] * 4] * 2 + [[0.5, -0.5, 0.5, -0.5]]
    decision = lasa(matrix(rows), context(4), sparsity=0.0, norm_bound=1.0)
    assert decision.notes["empty_layers"] == 1.0
    assert decision.update.tolist() == pytest.approx([0.1, -0.1, 0.1, -0.1])


def test_lasa_refuses_settings_that_keep_nothing():
    with pytest.raises(DefenseError, match="0 <= sparsity < 1"):
        lasa(matrix([[1.0]]), context(1), sparsity=1.0)
