"""Rules made for adapters against NumPy, and the gauge that beats the one that looks at A alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm_sec.attacks.update.gauge import lora_gauge
from fedllm_sec.defenses.adapters import a_features, clair, deviations, horus, low_rank_and_rows
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.factors import Products, aligned
from fedllm_sec.protocols import ThreatView
from fedllm_sec.seeds import generator_for
from tests.defenses.defense_rows import context, matrix

LAYOUT = Layout(("0.lora_A", "0.lora_B", "1.lora_A", "1.lora_B"), ((4, 30), (20, 4)) * 2)
START = torch.randn(LAYOUT.size, generator=generator_for(1, "start"))
STEP = torch.randn(LAYOUT.size, generator=generator_for(1, "step"))


def cohort(bad=None, n=12):
    """Rows around a common step; the last three are `bad`."""
    rows = 0.1 * (STEP + torch.randn(n, LAYOUT.size, generator=generator_for(1, "rows")))
    if bad is not None:
        rows[-3:] = bad
    return UpdateMatrix.of(rows, layout=LAYOUT)


def ctx(**given):
    return context(layout=LAYOUT, global_vector=START, **given)


def reference(rows, start, towards, bound):
    """Weights: scores from the A factors of both layers, cosines with `towards` (None: the mean of the kept)."""
    z = []
    for place in (slice(0, 120), slice(200, 320)):
        a0 = start[place].reshape(4, 30)
        values = []
        for row in rows:
            a = a0 + row[place].reshape(4, 30)
            s = np.linalg.svd(a, compute_uv=False) ** 2
            values.append([s.sum() ** 0.5, s[:2].sum() / s.sum(), (a * a0).sum() / s.sum() ** 0.5 / np.linalg.norm(a0)])
        gaps = np.abs(np.array(values) - np.median(values, axis=0))
        z.append(gaps / (1.4826 * np.median(gaps, axis=0)))
    scores = np.concatenate(z, axis=1).mean(axis=1)
    kept = scores <= bound
    g = rows[kept].mean(0) if towards is None else towards
    w = np.maximum(0, rows @ g / np.linalg.norm(rows, axis=1)) * kept
    return w / w.sum(), scores


@pytest.mark.parametrize("last", [None, STEP])
def test_horus_equals_its_reference(last):
    bad = 4.0 * torch.randn(3, LAYOUT.size, generator=generator_for(1, "bad"))
    updates = cohort(bad)
    decision = horus(updates, ctx(last_update=last))
    towards = None if last is None else last.double().numpy()
    weights, scores = reference(updates.rows.double().numpy(), START.double().numpy(), towards, 3.0)
    np.testing.assert_allclose(decision.scores.numpy(), scores, rtol=1e-6)
    np.testing.assert_allclose(decision.weights.numpy(), weights, rtol=1e-5, atol=1e-9)
    assert decision.kept.tolist() == [True] * 9 + [False] * 3
    assert decision.notes == {"fallback": 0.0}


def test_features_and_deviations_by_hand():
    a = torch.tensor([[[3.0, 0], [0, 4]], [[0, 0], [0, 0]]], dtype=torch.float64)
    wanted = [[5.0, 16 / 25, 3 / 5], [0.0, 0.0, 0.0]]
    start = torch.tensor([[1.0, 0], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(a_features(a, start), torch.tensor(wanted, dtype=torch.float64))
    values = torch.tensor([[1.0, 7], [2, 7], [3, 7], [4, 7], [100, 9]], dtype=torch.float64)
    found = 1.4826 * deviations(values)  # gaps of the first are 2 1 0 1 97, their median 1
    torch.testing.assert_close(found[:, 0], torch.tensor([2.0, 1, 0, 1, 97], dtype=torch.float64))
    assert found[:, 1].tolist() == [0] * 5


def test_a_gauge_that_leaves_the_poisoned_product_as_it_is_makes_horus_keep_it():
    honest = cohort().rows[:9]
    poisoned = cohort().rows[-3:].clone()
    poisoned[:, 120:200] = poisoned[:, 320:400] = -3.0  # B alone
    view = ThreatView(
        own=poisoned, others=None, global_vector=START, last_update=None, defense=None, layout=LAYOUT,
        own_counts=(1.0,) * 3, cohort_size=12, round=2, rng=generator_for(1, "gauge"),
    )  # fmt: skip
    turned = lora_gauge(view, kind="rotate")
    assert horus(cohort(turned), ctx()).kept.tolist() == [True] * 9 + [False] * 3
    middle = honest.mean(0)  # of all gauges the one whose A is nearest to the honest mean's
    hidden = middle + aligned(turned - middle, Products.of(LAYOUT, START + middle))[0]
    decision = horus(cohort(hidden), ctx())
    assert decision.kept.all()
    products = Products.of(LAYOUT, START)
    same_gauge = aligned(cohort(turned).rows, products)[0]
    assert horus(replace(cohort(), rows=same_gauge), ctx()).kept.all()  # B is poisoned, and nobody looks at it
    for rows in (turned, hidden):
        for pair in products.pairs:
            made, meant = (pair.tall(START + r) @ pair.wide(START + r) for r in (rows, poisoned))
            torch.testing.assert_close(made, meant, rtol=1e-4, atol=1e-4)


def test_rows_against_the_global_way_weigh_nothing_and_all_of_them_the_same():
    updates = cohort()
    assert horus(updates, ctx(last_update=-STEP)).notes == {"fallback": 1.0}
    rows = updates.rows.clone()
    rows[0, 120:200], rows[0, 320:400] = -rows[0, 120:200], -rows[0, 320:400]
    rows[0, :120], rows[0, 200:320] = 0.1 * rows[0, :120], 0.1 * rows[0, 200:320]
    decision = horus(replace(updates, rows=rows), ctx(last_update=STEP), bound=100.0)
    assert float(decision.weights[0]) == 0.0
    assert float(decision.weights.sum()) == pytest.approx(1.0)


def test_horus_needs_adapters():
    with pytest.raises(DefenseError, match=r"horus: needs adapters, whose parameters are named \.\.\.lora_A"):
        horus(matrix([[1.0], [2.0]]), context(1))
    with pytest.raises(DefenseError, match="horus: needs bound > 0"):
        horus(cohort(), ctx(), bound=0.0)


def outlier_pursuit(x, weight):
    """The split of whole rows (n, d): both parts are shrunk in turn, and what is missing is handed on."""
    rows, missing, step = np.zeros_like(x), np.zeros_like(x), np.linalg.norm(x, 2) / 4
    for _ in range(500):
        u, s, v = np.linalg.svd(x - rows + missing, full_matrices=False)
        low = (u * np.maximum(s - step, 0)) @ v
        left = x - low + missing
        rows = left * np.maximum(1 - weight * step / np.linalg.norm(left, axis=1, keepdims=True), 0)
        missing += x - low - rows
    return low, rows


def cost(low, rows, weight):
    return np.linalg.svd(low, compute_uv=False).sum() + weight * np.linalg.norm(rows, axis=1).sum()


def test_clair_equals_the_split_of_whole_rows_and_no_other_split_is_cheaper():
    basis = torch.randn(2, 50, generator=generator_for(2, "basis"))
    x = (3.0 + torch.randn(14, 2, generator=generator_for(2, "own"))) @ basis
    x += 0.05 * torch.randn(14, 50, generator=generator_for(2, "noise"))
    x[-2:] += 4 * torch.randn(2, 50, generator=generator_for(2, "bad"))
    weight, whole = 3 / (7 * 1.4**0.5), x.double().numpy()
    low, rows = outlier_pursuit(whole, weight)
    np.testing.assert_allclose(low + rows, whole, atol=1e-9)
    for seed in range(5):
        moved = 1e-3 * torch.randn(14, 50, generator=generator_for(2, seed)).double().numpy()
        assert cost(low, rows, weight) < cost(low + moved, rows - moved, weight)
    decision = clair(matrix(x.tolist()), context(50))
    np.testing.assert_allclose(decision.scores.numpy(), np.linalg.norm(rows, axis=1), rtol=1e-4, atol=1e-3)
    assert decision.kept.tolist() == [True] * 12 + [False] * 2
    np.testing.assert_allclose(decision.update.numpy(), whole[:12].mean(0), rtol=1e-5, atol=1e-6)


def test_what_clients_share_is_low_rank_and_one_that_goes_elsewhere_is_not():
    x = torch.tensor([[3.0, 0]] * 9 + [[0.0, 4]], dtype=torch.float64)
    low, rows = low_rank_and_rows(x, 3 / 7)
    torch.testing.assert_close(low, torch.tensor([[3.0, 0]] * 9 + [[0.0, 0]], dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows, x - low, atol=1e-5, rtol=0)


def test_a_row_inside_the_shared_subspace_passes_whatever_its_sign_and_one_far_away_is_dropped():
    rows = cohort().rows.clone()
    rows[-1] = -rows[:-1].mean(0)
    assert clair(UpdateMatrix.of(rows), context(LAYOUT.size)).kept.all()
    rows[-2:] = 1e30 * torch.randn(2, LAYOUT.size, generator=generator_for(2, "far"))
    assert clair(UpdateMatrix.of(rows), context(LAYOUT.size)).kept.tolist() == [True] * 10 + [False] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"share": 0.2}, "clair: needs 0 < share < 9/49, got share=0.2"), ({"k": 0.0}, "clair: needs k > 0, got k=0.0")],
)
def test_clair_says_what_it_needs(settings, message):
    with pytest.raises(DefenseError, match=message):
        clair(matrix([[1.0], [2.0]]), context(1), **settings)
