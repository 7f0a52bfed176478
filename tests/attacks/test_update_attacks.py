"""Forged rows against literals and plain float64 references."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fedllm_sec
from fedllm_sec.attacks.conformance import example_view
from fedllm_sec.attacks.update.columns import beyond, columns, scatter
from fedllm_sec.attacks.update.fang import fang, krum_would_take
from fedllm_sec.attacks.update.gauge import lora_gauge
from fedllm_sec.attacks.update.riders import Lazy, Mimic, projections
from fedllm_sec.attacks.update.search import strongest
from fedllm_sec.attacks.update.simple import model_replacement
from fedllm_sec.attacks.update.spread import alie_z, largest, tailored
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import Layout
from fedllm_sec.matrix.factors import lora_pairs
from fedllm_sec.protocols import Decision
from fedllm_sec.seeds import generator_for

LINE = torch.tensor([[0.0], [0.0], [3.0]])  # mean 1, population deviation sqrt 2


def draw(h, d, *, seed=0, common=0.0):
    rows = torch.randn(h, d, generator=generator_for(seed, "rows"))
    return rows + common * torch.randn(d, generator=generator_for(seed, "common"))


# ---------------------------------------------------------------- one read of the rows


@pytest.mark.parametrize("backend", ["", "torch"])
@pytest.mark.parametrize("common", [0.0, 1e4])
@pytest.mark.parametrize("kind", ["unit", "sign", "std"])
def test_scatter_equals_float64_also_beside_a_large_common_part(kind, common, backend, monkeypatch):
    monkeypatch.setenv("FEDLLM_SEC_KERNELS", backend)
    rows = draw(7, 700, common=common)
    x = rows.double()
    mean = x.mean(0)
    p = {"unit": -mean, "sign": -mean.sign(), "std": -(x - mean).square().mean(0).sqrt()}[kind]
    wide = torch.cat([x - mean, p[None], mean[None]])
    seen = scatter(rows, kind, with_mean=True)
    sizes = wide.norm(dim=1)
    error = (seen.gram - wide @ wide.T).abs() / (sizes[:, None] * sizes[None])
    assert float(error.max()) < 1e-5
    torch.testing.assert_close(seen.mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen.direction.double(), p, rtol=1e-3 if common else 1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_column_statistics_equal_torch_in_every_dtype(dtype, backend, monkeypatch):
    monkeypatch.setenv("FEDLLM_SEC_KERNELS", backend)
    rows = draw(5, 613).to(dtype)
    seen, x = columns(rows, deviation=True), rows.double()
    torch.testing.assert_close(seen.mean.double(), x.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen.deviation.double(), x.std(0, correction=0), rtol=1e-5, atol=1e-6)
    edge, halfway = beyond(rows, 3.0, torch.zeros(613), 2).double()
    assert torch.equal(edge, torch.where(x.mean(0) > 0, x.amin(0), x.amax(0)))
    outward = (edge < 0) == (x.mean(0) > 0)
    torch.testing.assert_close(halfway, torch.where(outward, 2 * edge, edge * (2 / 3)), rtol=1e-6, atol=0)


def test_tiny_and_huge_rows_are_not_lost_to_float32():
    for scale in (1e-18, 1e17):
        rows = draw(4, 50) * scale
        centred = rows.double() - rows.double().mean(0)
        torch.testing.assert_close(scatter(rows, "std").gram[:4, :4], centred @ centred.T, rtol=1e-4, atol=0)


# ---------------------------------------------------------------- rows without a view


def test_zero_flip_and_random_rows():
    honest = np.array([[3.0, 4.0], [0.0, 5.0]], np.float32)
    assert fedllm_sec.forge(honest, "byzantine_zero", m=2).tolist() == [[0, 0], [0, 0]]
    assert fedllm_sec.forge(honest, "byzantine_flip", m=1).tolist() == [[-1.5, -4.5]]
    wild = fedllm_sec.forge(honest, "byzantine_random", m=3, scale=4.0)
    np.testing.assert_allclose(np.linalg.norm(wild, axis=1), 20.0, rtol=1e-5)
    box = fedllm_sec.forge(np.ones((3, 1000), np.float32), "byzantine_random", m=1, absolute=True, scale=2.0)
    assert 1.9 < abs(box).max() <= 2.0


def test_gaussian_noise_has_the_length_it_says():
    honest = torch.ones(6, 10_000) * 0.001
    rows = fedllm_sec.forge(honest, "gaussian", m=2, scale=3.0)
    noise = (rows - honest.mean(0)).norm(dim=1)
    torch.testing.assert_close(noise, torch.full((2,), 0.3), rtol=0.05, atol=0)
    assert not torch.equal(rows[0], rows[1])


def test_inf_nan_spoils_the_share_it_says():
    rows = fedllm_sec.forge(torch.ones(3, 100), "inf_nan", m=2, share=0.25)
    assert (~rows.isfinite()).sum(1).tolist() == [25, 25]
    assert fedllm_sec.forge(torch.ones(3, 4), "inf_nan", m=1, value="-inf").tolist() == [[-math.inf] * 4]


def test_replacement_puts_the_mean_onto_the_backdoored_model():
    honest, bad = torch.zeros(8, 3), torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    rows = fedllm_sec.forge(honest, "model_replacement", m=2, own=bad)
    assert torch.cat([honest, rows]).mean(0).tolist() == [2.0, 2.0, 2.0]
    alone = fedllm_sec.forge(honest, "model_replacement", m=1, own=bad[:1])
    assert torch.cat([honest, alone]).mean(0).tolist() == [1.0, 2.0, 3.0]


def test_train_and_scale_keeps_to_the_norm_and_never_scales_beyond_gamma():
    view = example_view(m=2)
    norms = view.others.norm(dim=1).median()
    bounded = model_replacement(view, max_norm=2.0).norm(dim=1)
    torch.testing.assert_close(bounded, torch.full((2,), float(2 * norms)), rtol=0.2, atol=0)
    torch.testing.assert_close(model_replacement(view, gamma=1.5, max_norm=100.0), 1.5 * view.own)


# ---------------------------------------------------------------- ALIE, IPM, Min-Max, Min-Sum


@pytest.mark.parametrize(("n", "m", "z"), [(10, 2, 0.0), (50, 24, 1.4261), (50, 12, 0.3360), (11, 5, 0.9674)])
def test_the_z_of_alie_is_the_papers_quantile(n, m, z):
    assert alie_z(n, m) == pytest.approx(z, abs=1e-4)


def test_alie_moves_by_z_population_deviations():
    rows = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    assert fedllm_sec.forge(rows, "alie", m=2, z=1.5).tolist() == [[-0.5, 0.0]] * 2
    assert fedllm_sec.forge(rows, "alie", m=1, z=1.5, direction="plus").tolist() == [[2.5, 6.0]]


def test_alie_warns_where_it_is_a_no_op_and_refuses_a_majority():
    with pytest.warns(UserWarning, match="no-op"):
        rows = fedllm_sec.forge(torch.tensor([[1.0], [3.0]] * 4), "alie", m=2)
    assert rows.tolist() == [[2.0], [2.0]]
    with pytest.warns(UserWarning, match="all alike"):
        fedllm_sec.forge(torch.ones(1, 3), "alie", m=2, z=1.0)
    with pytest.raises(AttackError, match="majority"):
        fedllm_sec.forge(draw(2, 3), "alie", m=6)


def test_alie_with_partial_knowledge_reads_only_its_own_rows():
    view = replace(example_view(m=3), others=None)
    from fedllm_sec.attacks import alie

    rows = alie(view, z=1.0, partial=True)
    torch.testing.assert_close(rows[0], view.own.mean(0) - view.own.std(0, correction=0))
    with pytest.raises(AttackError, match="2 attackers"):
        alie(replace(example_view(m=1), others=None), z=1.0, partial=True)


def test_ipm_turns_the_inner_product_of_the_mean_just_negative():
    honest = draw(8, 40, common=3.0)
    rows = fedllm_sec.forge(honest, "ipm", m=2)
    torch.testing.assert_close(rows[0], -4.4 * honest.mean(0))
    mean = torch.cat([honest, rows]).mean(0)
    assert float(mean @ honest.mean(0)) < 0
    assert float(torch.cat([honest, rows / 1.2]).mean(0) @ honest.mean(0)) > 0


def test_min_max_and_min_sum_on_three_points_of_a_line():
    # max: |1 - g - 3| <= 3 gives g = 1; sum: 6 + 3 g^2 <= 18 gives g = 2
    for perturbation in ("std", "sign", "unit"):
        rows = fedllm_sec.forge(LINE, "min_max", m=2, perturbation=perturbation)
        np.testing.assert_allclose(rows.numpy(), [[0.0], [0.0]], atol=1e-6)
        rows = fedllm_sec.forge(LINE, "min_sum", m=1, perturbation=perturbation)
        np.testing.assert_allclose(rows.numpy(), [[-1.0]], rtol=1e-6)


@pytest.mark.parametrize("perturbation", ["std", "sign", "unit"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_min_max_and_min_sum_reach_their_bound_and_do_not_pass_it(perturbation, scale):
    honest = draw(9, 300, common=2.0) * scale
    x = honest.double()
    between = torch.cdist(x, x)
    for name, bound, reach in (
        ("min_max", between.max(), lambda row: (x - row).norm(dim=1).max()),
        ("min_sum", between.square().sum(1).max().sqrt(), lambda row: (x - row).square().sum().sqrt()),
    ):
        row = fedllm_sec.forge(honest, name, m=1, perturbation=perturbation)[0].double()
        assert float(reach(row) / bound) == pytest.approx(1.0, abs=1e-5)


def test_identical_honest_rows_leave_no_room_and_it_is_said():
    for name in ("min_max", "min_sum"):
        with pytest.warns(UserWarning, match="no room"):
            rows = fedllm_sec.forge(torch.ones(4, 3), name, m=2)
        assert rows.tolist() == [[1.0] * 3] * 2


def test_bisection_returns_the_last_success():
    tried = []

    def holds(gamma):
        tried.append((gamma, gamma <= 0.7))
        return gamma <= 0.7

    best = largest(holds, 1.0)
    assert best == pytest.approx(0.7, rel=1e-12)
    assert (best, True) in tried


# ---------------------------------------------------------------- searches against a known rule


def test_a_search_finds_where_the_rule_gives_way_in_twenty_evaluations():
    calls = []
    honest = draw(8, 30, common=5.0)

    def rule(updates):
        """The mean of rows whose length is at most 1.5 times the median."""
        calls.append(updates.n)
        rows = updates.rows
        norms = rows.norm(dim=1)
        return Decision(rows[norms <= 1.5 * norms.median()].mean(0))

    rows = fedllm_sec.forge(honest, "ipm", m=2, epsilon="optimise", defense=rule)
    assert len(calls) <= 20
    assert calls[0] == 10
    best = float(rows[0].norm() / honest.mean(0).norm())
    allowed = 1.5 * float(honest.norm(dim=1).median() / honest.mean(0).norm())
    assert 0.85 * allowed < best <= 1.05 * allowed


def test_searches_never_write_into_the_honest_rows_and_count_refusals_as_harmless():
    from fedllm_sec.errors import DefenseError

    def refuses(updates):
        if float(updates.rows.norm()) > 200:
            raise DefenseError("too long")
        return Decision(updates.rows.mean(0))

    view = replace(example_view(), defense=refuses)
    before = view.others.clone()
    strength = strongest(view, "x", lambda s: view.others.mean(0) * -s, view.others.mean(0), first=0.125)
    assert 0 < strength < 100
    assert torch.equal(view.others, before)
    assert torch.isfinite(tailored(view)).all()


# ---------------------------------------------------------------- Fang, copies, gauge


def test_krum_takes_the_row_whose_neighbours_are_nearest():
    between = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 4.0], [9.0, 4.0, 0.0]], dtype=torch.float64)
    far, near = torch.tensor([16.0, 9.0, 1.0]).double(), torch.tensor([0.25, 0.25, 4.0]).double()
    assert not krum_would_take(between, far, copies=1, neighbours=2)
    assert krum_would_take(between, near, copies=1, neighbours=2)
    assert krum_would_take(between, far, copies=3, neighbours=2)  # two copies at distance 0


def test_fang_gets_chosen_by_krum_and_points_against_the_honest_mean():
    honest = draw(12, 60, common=1.0)
    rows = fedllm_sec.forge(honest, "fang", m=4)
    decision = fedllm_sec.aggregate(torch.cat([honest, rows]), "krum", f=4)
    assert int(decision.kept.nonzero()) >= 12
    assert torch.equal(rows[0].sign(), -honest.mean(0).sign())


def test_fang_beyond_the_honest_ends_by_up_to_their_b_fold():
    honest = torch.tensor([[1.0, -4.0, -1.0, -6.0], [2.0, -2.0, 2.0, 1.0], [4.0, -1.0, 5.0, 2.0]])
    for seed in range(5):
        rows = fedllm_sec.forge(honest, "fang", m=3, against="trimmed_mean", seed=seed)
        low, high = torch.tensor([0.5, -1.0, -2.0, 2.0]), torch.tensor([1.0, -0.5, -1.0, 4.0])
        assert bool(((rows >= low) & (rows <= high)).all())
        assert len({float(v) for v in rows[:, 0]}) == 3


def test_fang_with_partial_knowledge_goes_three_to_four_deviations_beyond_its_own_mean():
    view = replace(example_view(m=4), others=None)
    rows = fang(view, against="trimmed_mean", partial=True)
    mean, deviation = view.own.mean(0), view.own.std(0, correction=0)
    steps = (rows - mean) / deviation * -mean.sign()
    assert 2.99 < float(steps.min()) < float(steps.max()) < 4.01
    assert torch.isfinite(fang(view, partial=True)).all()


def test_mimic_copies_the_client_farthest_along_the_top_direction():
    honest = torch.zeros(6, 20)
    honest[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 6.0, 0.0])
    honest[:, 1] = torch.tensor([0.1, 0.2, 0.3, -0.3, 0.0, 3.0])
    rows = fedllm_sec.forge(honest + 7.0, "mimic", m=2)
    assert torch.equal(rows, (honest + 7.0)[4].expand(2, -1))
    assert int(projections(honest + 7.0).argmax()) == 4
    assert projections(torch.ones(3, 4)).tolist() == [0.0, 0.0, 0.0]


def test_after_its_warm_up_mimic_stays_with_one_client_wherever_it_stands():
    base = example_view(h=4, m=1)
    rows = torch.eye(4, base.own.shape[1])
    rows[2] *= 5
    attack = Mimic(warmup=1)
    view = replace(base, others=rows, other_ids=("a", "b", "c", "d"))
    assert torch.equal(attack(view)[0], rows[2])
    moved = replace(
        base, others=rows.flip(0) * torch.tensor([[9.0], [1.0], [1.0], [1.0]]), other_ids=("d", "c", "b", "a")
    )
    resumed = Mimic(warmup=1)
    resumed.load_state_dict(attack.state_dict())
    assert torch.equal(resumed(moved)[0], moved.others[1])


def test_a_free_rider_resends_the_last_global_step_or_its_first_update():
    view = example_view(m=2)
    assert torch.equal(Lazy()(view), view.last_update.expand(2, -1))
    assert torch.equal(Lazy()(replace(view, last_update=None)), view.own)
    stale = Lazy(variant="own_stale")
    assert torch.equal(stale(view), view.own)
    later = replace(view, own=view.own.flip(0) + 1, own_ids=view.own_ids[::-1])
    resumed = Lazy(variant="own_stale")
    resumed.load_state_dict(stale.state_dict())
    assert torch.equal(resumed(later), view.own.flip(0))


def test_the_mask_of_a_free_rider_is_relative_to_its_row():
    view = example_view(m=2)
    rows = Lazy(noise=0.5)(view)
    gap = (rows - view.last_update).norm(dim=1) / view.last_update.norm()
    assert 0.4 < float(gap.min()) < float(gap.max()) < 0.6
    assert not torch.equal(rows[0], rows[1])


def test_the_gauge_changes_the_factors_and_not_the_model():
    view = example_view(m=2)
    rows = lora_gauge(view, factor=8.0)
    for before, after in zip(view.own, rows, strict=True):
        old = view.layout.split(view.global_vector + before)
        new = view.layout.split(view.global_vector + after)
        (a, b) = lora_pairs(view.layout)[0]
        torch.testing.assert_close(new[b] @ new[a], old[b] @ old[a], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(new[a], 8 * old[a])
    assert float(rows.norm()) > 4 * float(view.own.norm())


def test_the_gauge_needs_both_factors_of_a_pair():
    view = example_view(m=1)
    d = view.own.shape[1]
    with pytest.raises(AttackError, match="no pair"):
        lora_gauge(replace(view, layout=Layout.single(d)))
    plain = Layout(("lora_A.weight", "lora_B.weight"), ((2, 3), (4, 2)))
    assert lora_pairs(plain) == [("lora_A.weight", "lora_B.weight")]
    with pytest.raises(AttackError, match="changes nothing"):
        lora_gauge(view, factor=1.0)


# ---------------------------------------------------------------- forge


def test_forge_gives_back_the_kind_it_was_given_and_the_same_rows_for_the_same_seed():
    honest = np.random.default_rng(0).normal(size=(5, 20))
    one, two = (fedllm_sec.forge(honest, "gaussian", m=3, seed=4) for _ in range(2))
    assert isinstance(one, np.ndarray)
    assert one.dtype == np.float64
    assert np.array_equal(one, two)
    assert not np.array_equal(one, fedllm_sec.forge(honest, "gaussian", m=3, seed=5))
    half = fedllm_sec.forge(torch.ones(4, 6, dtype=torch.bfloat16), "byzantine_flip", m=2)
    assert half.dtype == torch.bfloat16
    fedllm_sec.forge(honest, "byzantine_zero", m=2)[0] += 1  # rows are the caller's own


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fedllm_sec.forge(torch.ones(3, 2), "alie", m=0), "m=0"),
        (lambda: fedllm_sec.forge(torch.ones(3, 2), "aliee", m=1), 'Did you mean "alie"'),
        (lambda: fedllm_sec.forge(torch.ones(3, 2), "text_trigger", m=1), "only update attacks"),
        (lambda: fedllm_sec.forge(torch.ones(3, 2), "ipm", m=1, epsilom=2), 'Did you mean "epsilon"'),
        (lambda: fedllm_sec.forge(torch.ones(3), "ipm", m=1), "shape"),
        (lambda: fedllm_sec.forge(torch.ones(3, 2, dtype=torch.long), "ipm", m=1), "dtype"),
        (lambda: fedllm_sec.forge(torch.ones(3, 2), "ipm", m=2, own=torch.ones(1, 2)), "own"),
        (lambda: fedllm_sec.forge(torch.ones(3, 2), "lora_gauge", m=1), "lora_A"),
        (lambda: fedllm_sec.forge(torch.ones(3, 2), "tailored", m=1), "defense"),
        (lambda: fedllm_sec.forge(torch.ones(3, 2), "byzantine_flip", m=1, scale=-1.0), "positive"),
    ],
)
def test_mistakes_say_what_is_wrong(call, says):
    with pytest.raises(AttackError, match=says):
        call()


@pytest.mark.parametrize("name", ["byzantine_random", "gaussian"])
def test_noise_of_long_rows_is_shared_but_shifted(name):
    d = 2**20 + 5
    honest = torch.randn(4, d, generator=torch.Generator().manual_seed(0))
    rows = fedllm_sec.forge(honest, name, m=3, scale=100.0)
    lengths = rows.double().norm(dim=1)
    assert torch.allclose(lengths, 100 * honest.double().norm(dim=1).median().expand(3), rtol=0.01)
    unit = rows.double() / lengths[:, None]
    assert (unit @ unit.T - torch.eye(3, dtype=torch.float64)).abs().max() < 0.01
