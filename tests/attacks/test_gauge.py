"""Gauges of lora_gauge: the products stay, the factors do what the kind says."""

from dataclasses import replace

import pytest
import torch

from fedllm_sec import kernels
from fedllm_sec.attacks.update.gauge import lora_gauge
from fedllm_sec.attacks.update.hiding import nearest
from fedllm_sec.defenses.krum import multi_krum
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.defenses.space import Space
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.factors import Products
from fedllm_sec.protocols import RoundContext, ThreatView
from fedllm_sec.seeds import generator_for

LAYOUT = Layout(("q.lora_A.w", "q.lora_B.w", "head"), ((3, 12), (10, 3), (4,)))
A, B, HEAD = LAYOUT.slices().values()


def sent(h=8, knowledge="own"):
    """Honest rows around a common step, and two attackers who push B the other way, three times as far."""
    rng = generator_for(0, "gauge")
    start, step = torch.randn(LAYOUT.size, generator=rng), 0.1 * torch.randn(LAYOUT.size, generator=rng)
    honest = step + 0.05 * torch.randn(h, LAYOUT.size, generator=rng)
    own = honest[:2].clone()
    own[:, B] -= 4 * step[B]
    ctx = RoundContext(1, start, LAYOUT, generator_for(1))

    def defense(rows):
        return Pipeline((), lambda u, c: multi_krum(u, c, f=2)).decide(rows, ctx)

    return ThreatView(
        own=own, others=honest if knowledge != "own" else None, global_vector=start, last_update=None,
        defense=defense if knowledge == "cohort+defense" else None, layout=LAYOUT, own_counts=(1.0, 1.0),
        cohort_size=h + 2, round=1, rng=generator_for(2), own_ids=("x", "y"),
        other_ids=tuple(map(str, range(h))) if knowledge != "own" else (),
    )  # fmt: skip


def factors(view, row):
    parts = LAYOUT.split((view.global_vector + row).double())
    return parts["q.lora_A.w"], parts["q.lora_B.w"]


@pytest.mark.parametrize("kind", ["scale", "rotate", "shear", "hide"])
def test_every_kind_leaves_the_product_and_what_stands_beside_it(kind):
    view = sent()
    for own, row in zip(view.own, lora_gauge(view, kind=kind, factor=5.0), strict=True):
        (a0, b0), (a1, b1) = factors(view, own), factors(view, row)
        torch.testing.assert_close(b1 @ a1, b0 @ a0, rtol=1e-4, atol=1e-4)
        assert torch.equal(row[HEAD], own[HEAD])
        assert not torch.allclose(a1, a0, atol=1e-3)
        if kind == "rotate":
            torch.testing.assert_close(a1.norm(), a0.norm(), rtol=1e-5, atol=0)
            torch.testing.assert_close(b1.norm(), b0.norm(), rtol=1e-5, atol=0)


def test_two_attackers_draw_two_rotations_and_a_rotation_of_rank_1_is_a_sign():
    view = sent()
    rows = lora_gauge(replace(view, own=view.own[:1].repeat(2, 1)), kind="rotate")
    assert not torch.allclose(rows[0], rows[1])
    flat = Layout(("q.lora_A.w", "q.lora_B.w"), ((1, 3), (2, 1)))
    small = replace(view, layout=flat, own=torch.ones(1, 5), global_vector=torch.zeros(5))
    assert lora_gauge(small, kind="rotate").tolist() == [[-1, -1, -1, -1, -1]]
    with pytest.raises(AttackError, match="nothing to shear"):
        lora_gauge(small, kind="shear")


def test_hide_comes_nearer_to_the_honest_mean_and_no_random_gauge_near_it_is_nearer():
    view = sent(knowledge="cohort")
    mean = view.others.mean(0)
    rows = lora_gauge(view, kind="hide")
    before, after = (view.own - mean).norm(dim=1), (rows - mean).norm(dim=1)
    assert bool((after < 0.97 * before).all())
    pair = Products.of(LAYOUT, view.global_vector).pairs[0]
    for seed in range(20):
        m = torch.eye(3).double() + 0.05 * torch.randn(3, 3, generator=generator_for(seed)).double()
        a, b = (view.global_vector + rows[0])[None].double()[:, pair.a].view(3, 12), None
        b = (view.global_vector + rows[0])[None].double()[:, pair.b].view(10, 3)
        other = rows[0].double().clone()
        other[pair.a] = (m @ a).flatten() - view.global_vector[pair.a]
        other[pair.b] = (b @ torch.linalg.inv(m)).flatten() - view.global_vector[pair.b]
        assert (other - mean).norm() > after[0] - 1e-4
    # the better of what is found is not farther than the truth: a turned copy of the goal is turned back
    goal_a, goal_b = torch.randn(1, 3, 12).double(), torch.randn(1, 10, 3).double()
    m = torch.tensor([[2.0, 0.3, 0.0], [0.0, 1.0, -0.4], [0.2, 0.0, 0.6]]).double()
    a, b = nearest(m @ goal_a, goal_b @ torch.linalg.inv(m), goal_a, goal_b, 100.0)
    torch.testing.assert_close(a, goal_a)
    torch.testing.assert_close(b, goal_b)
    held, _ = nearest(m @ goal_a, goal_b @ torch.linalg.inv(m), goal_a, goal_b, 1.0001)
    assert (held - m @ goal_a).norm() < 1  # hardly any gauge but a scaling is allowed


def test_who_knows_the_rule_hides_so_that_it_takes_the_rows_and_product_space_does_not():
    view = sent(knowledge="cohort+defense")
    ctx = RoundContext(1, view.global_vector, LAYOUT, generator_for(1))
    ids = [*view.other_ids, *view.own_ids]

    def weight(rows, enter=None):
        matrix = UpdateMatrix.of(torch.cat([view.others, rows]), ids=ids, layout=LAYOUT)
        pipeline = Pipeline((), lambda u, c: multi_krum(u, c, f=2), (), enter)
        return float(pipeline.decide(matrix, ctx).weights[-2:].sum())

    rows = lora_gauge(view, kind="hide")
    assert weight(rows) >= weight(view.own)
    assert weight(rows, Space("product")) == weight(view.own, Space("product"))
    assert bool(kernels.row_norms(UpdateMatrix.of(rows)).isfinite().all())


def test_a_condition_of_1_allows_no_other_gauge():
    with pytest.raises(AttackError, match="must be above 1"):
        lora_gauge(sent(), kind="hide", condition=1.0)
