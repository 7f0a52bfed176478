"""Every rule equals its float64 reference to 1e-6, at every scale and for odd and even numbers of clients."""

from functools import partial

import numpy as np
import pytest
import torch

from fedllm_sec import defenses as menu
from fedllm_sec.defenses.checks import random_order
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import RoundContext
from fedllm_sec.seeds import generator_for
from tests.defenses import references as ref

D = 43
COUNTS = (1, 2, 3, 4, 7, 8, 11, 16, 33, 64)
KINDS = ("random", "heavy_tailed", "tiny", "huge")


def rows_of(kind, n, seed=0):
    rng = generator_for(5, kind, n, seed)
    rows = 0.3 * torch.randn(D, generator=rng) + torch.randn(n, D, generator=rng)
    if kind == "heavy_tailed":
        rows = rows / torch.randn(n, D, generator=rng).abs().clamp_min(1e-3)
    return rows * {"tiny": 1e-3, "huge": 1e3}.get(kind, 1.0)


def context(seed=0):
    layout = Layout.single(D)
    return RoundContext(1, torch.zeros(D), layout, generator_for(5, "rule", seed))


def assert_close(got, wanted, tolerance=1e-6):
    gap = np.linalg.norm(got.double().numpy() - wanted)
    assert gap <= tolerance * np.linalg.norm(wanted), f"relative gap {gap / np.linalg.norm(wanted):.2e}"


every_size = pytest.mark.parametrize("n", COUNTS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def both(kind, n):
    rows = rows_of(kind, n)
    return UpdateMatrix.of(rows, counts=[1.0 + (7 * i) % 11 for i in range(n)]), rows.double().numpy()


@every_kind
@every_size
def test_mean_equals_its_reference(kind, n):
    updates, x = both(kind, n)
    assert_close(menu.mean(updates, context(), weights="uniform").update, x.mean(axis=0))
    wanted = ref.mean(x, ref.capped(updates.counts, 1.5))
    assert_close(menu.mean(updates, context(), cap=1.5).update, wanted)


@every_kind
@every_size
def test_median_equals_its_reference(kind, n):
    updates, x = both(kind, n)
    assert_close(menu.median(updates, context()).update, ref.median(x))


@every_kind
@every_size
def test_trimmed_mean_and_slsgd_equal_their_reference(kind, n):
    updates, x = both(kind, n)
    for f in {0, 1, (n - 1) // 2}:
        if n > 2 * f:
            assert_close(menu.trimmed_mean(updates, context(), f=f).update, ref.trimmed_mean(x, f))
            moved = menu.slsgd(updates, context(), f=f, alpha=0.5).update
            assert_close(moved, 0.5 * ref.trimmed_mean(x, f))
    assert_close(menu.slsgd(updates, context(), option=1, alpha=0.5).update, 0.5 * x.mean(axis=0))


@every_kind
@every_size
def test_robust_learning_rate_equals_its_reference(kind, n):
    updates, x = both(kind, n)
    for theta in {0, n // 3, n}:
        got = menu.robust_learning_rate(updates, context(), theta=theta).update
        assert_close(got, ref.robust_learning_rate(x, theta))


@every_kind
@every_size
def test_krum_and_multi_krum_equal_their_reference(kind, n):
    updates, x = both(kind, n)
    for f in {0, (n - 3) // 4, (n - 3) // 2}:
        if n < 2 * f + 3 or f < 0:
            continue
        wanted, best = ref.multi_krum(x, f, n - f)
        got = menu.multi_krum(updates, context(), f=f)
        assert set(got.kept.nonzero().flatten().tolist()) == set(best)
        assert_close(got.update, wanted)
        assert_close(menu.krum(updates, context(), f=f).update, ref.multi_krum(x, f, 1)[0])


@every_kind
@pytest.mark.parametrize("n", [3, 7, 8, 11, 16, 33])
def test_bulyan_equals_its_reference(kind, n):
    updates, x = both(kind, n)
    for f in {0, 1, (n - 3) // 4}:
        if n >= 4 * f + 3:
            assert_close(menu.bulyan(updates, context(), f=f).update, ref.bulyan(x, f))


@every_kind
@every_size
def test_geometric_median_and_rfa_equal_weiszfeld_in_float64(kind, n):
    updates, x = both(kind, n)
    wanted = ref.weiszfeld(x, np.ones(n), 3000, 1e-12)
    assert_close(menu.geometric_median(updates, context()).update, wanted)
    shares = np.array(ref.capped(updates.counts, 3.0))
    assert_close(menu.rfa(updates, context()).update, ref.weiszfeld(x, shares, 3, 1e-12))


@every_kind
@every_size
def test_centered_clipping_equals_its_reference_over_rounds(kind, n):
    for tau, iterations in (("median", 1), ("median", 4), (float(rows_of(kind, n)[0].norm()), 3)):
        rule, v = menu.CenteredClipping(tau=tau, iterations=iterations), np.zeros(D)
        for seed in range(3):
            rows = rows_of(kind, n, seed)
            v = ref.centered_clipping(rows.double().numpy(), v, tau, iterations)
            assert_close(rule(UpdateMatrix.of(rows), context()).update, v)


@every_kind
@every_size
def test_foolsgold_equals_its_reference_over_rounds(kind, n):
    rule, history = menu.FoolsGold(), np.zeros((n, D))
    for seed in range(3):
        rows = rows_of(kind, n, seed)
        rows[: n // 3] = rows[:1] * torch.linspace(1, 2, n // 3)[:, None] + 0.1 * rows[: n // 3]
        history += rows.double().numpy()
        weights = ref.foolsgold(history)
        decision = rule(UpdateMatrix.of(rows), context())
        np.testing.assert_allclose(decision.weights.numpy(), weights, rtol=1e-4, atol=1e-6)
        assert_close(decision.update, weights @ rows.double().numpy(), 1e-4)


@every_kind
@every_size
def test_the_stages_before_a_rule_equal_their_references(kind, n):
    updates, x = both(kind, n)
    lengths = np.linalg.norm(x, axis=1)
    radius = float(lengths.mean())
    mixed = {
        "norm_clipping": (partial(menu.norm_clipping, radius=radius), ref.norm_clipping(x, radius)),
        "median length": (menu.norm_clipping, ref.norm_clipping(x, float(np.median(lengths)))),
        "nnm": (partial(menu.nnm, f=n // 3), ref.nearest_neighbour_mixing(x, n // 3)),
        "arc": (partial(menu.arc, f=(n - 1) // 2), ref.adaptive_clipping(x, (n - 1) // 2)),
    }
    for stage, wanted in mixed.values():
        got = torch.cat([block for _, block in stage(updates, context()).blocks()], dim=1)
        assert_close(got, wanted)
    order = random_order(updates, context().rng)
    buckets = [x[order[i : i + 3]].mean(axis=0) for i in range(0, n, 3)]
    got = torch.cat([b for _, b in menu.bucketing(updates, context(), s=3).blocks()], dim=1)
    assert_close(got, np.array(buckets))


@pytest.mark.parametrize("kind", ["random", "heavy_tailed", "clusters", "a row is the answer"])
@pytest.mark.parametrize("n", [5, 8])
def test_geometric_median_reaches_the_objective_of_20000_plain_weiszfeld_steps(kind, n):
    rows = rows_of("heavy_tailed" if kind == "heavy_tailed" else "random", n)[:, :6]
    if kind == "clusters":
        rows[: n // 2 + 1] = rows[:1] + 1e-3 * rows[: n // 2 + 1]
    if kind == "a row is the answer":
        rows[0] = rows[1:].mean(0)
        rows[1:3] = rows[0] + torch.stack([rows[1], -rows[1]])
    x = rows.double().numpy()
    decision = menu.geometric_median(UpdateMatrix.of(rows), context())
    best = ref.objective(x, ref.weiszfeld(x, np.ones(n), 20_000, 1e-300))
    assert decision.notes["converged"] == 1.0
    assert ref.objective(x, decision.update.double().numpy()) <= best * (1 + 1e-7)
