"""Attacks hurt the plain mean; rules repair it, and some attacks beat the rules they were made for."""

import warnings

import pytest
import torch

import fedllm_sec
from fedllm_sec import kernels
from fedllm_sec.attacks.conformance import train_with
from fedllm_sec.attacks.local.stealth import PGD
from fedllm_sec.defenses import MENU as DEFENSES
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.seeds import generator_for

D = 400


def honest_rows(h, *, common=1.0, seed=0):
    """Rows around a common direction, at the scale of LoRA deltas."""
    shared = common * torch.randn(D, generator=generator_for(seed, "shared"))
    return (shared + torch.randn(h, D, generator=generator_for(seed, "rows"))) * 1e-3


def error(rows, honest, rule, **settings):
    """||aggregate - honest mean|| over the honest mean's length."""
    if rule not in DEFENSES:
        pytest.skip(f"the defense menu has no {rule} yet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # screening says which rows it set aside
        update = fedllm_sec.aggregate(rows, rule, **settings).update
    return float((update - honest.mean(0)).norm() / honest.mean(0).norm())


@pytest.mark.parametrize(
    ("attack", "settings", "rule", "rule_settings"),
    [
        ("byzantine_random", {}, "median", {}),
        ("byzantine_random", {"scale": 30.0}, "geometric_median", {}),
        ("byzantine_flip", {"scale": 10.0}, "multi_krum", {"f": 3}),
        ("gaussian", {}, "trimmed_mean", {"f": 3}),
        ("ipm", {}, "multi_krum", {"f": 3}),
        ("ipm", {}, "median", {}),
        ("model_replacement", {"own": "backdoor"}, "multi_krum", {"f": 3}),
        ("model_replacement", {"own": "backdoor"}, "geometric_median", {}),
        ("alie", {"z": 20.0}, "median", {}),
        ("tailored", {"defense": "mean"}, "multi_krum", {"f": 3}),
    ],
)
def test_the_mean_is_hurt_and_the_rule_repairs_it(attack, settings, rule, rule_settings):
    honest, settings = honest_rows(9), dict(settings)
    if "own" in settings:
        settings["own"] = 1e-3 * torch.randn(D, generator=generator_for(0, "backdoor")).expand(3, D)
    if "defense" in settings:
        settings["defense"] = lambda updates: fedllm_sec.aggregate(updates.rows, "mean")
    rows = torch.cat([honest, fedllm_sec.forge(honest, attack, m=3, **settings)])
    hurt, repaired = error(rows, honest, "mean"), error(rows, honest, rule, **rule_settings)
    assert hurt > 0.8
    assert repaired < 0.6 * hurt


def test_rows_that_are_not_numbers_are_set_aside():
    honest = honest_rows(9)
    rows = torch.cat([honest, fedllm_sec.forge(honest, "inf_nan", m=3)])
    assert not torch.isfinite(rows.mean(0)).any()
    assert error(rows, honest, "mean") < 1e-5


def test_zero_rows_slow_the_mean_by_their_share():
    honest = honest_rows(9)
    rows = torch.cat([honest, fedllm_sec.forge(honest, "byzantine_zero", m=3)])
    assert error(rows, honest, "mean") == pytest.approx(0.25, abs=1e-5)


def test_alie_beats_trimmed_mean_and_krum():
    honest = honest_rows(14)  # n = 25, m = 11: z = 1.07
    rows = torch.cat([honest, fedllm_sec.forge(honest, "alie", m=11)])
    assert error(rows, honest, "trimmed_mean", f=11) > 1.5 * error(rows, honest, "mean")
    assert error(rows, honest, "trimmed_mean", f=11) > 2 * error(honest, honest, "trimmed_mean", f=6)
    chosen = int(fedllm_sec.aggregate(rows, "krum", f=11).kept.nonzero())
    assert chosen >= 14


def test_min_max_beats_multi_krum():
    honest = honest_rows(16)
    rows = torch.cat([honest, fedllm_sec.forge(honest, "min_max", m=4)])
    decision = fedllm_sec.aggregate(rows, "multi_krum", f=4)
    assert decision.kept[16:].all()
    assert error(rows, honest, "multi_krum", f=4) > 1.5 * error(honest, honest, "multi_krum", f=4)
    loud = torch.cat([honest, fedllm_sec.forge(honest, "byzantine_random", m=4)])
    assert not fedllm_sec.aggregate(loud, "multi_krum", f=4).kept[16:].any()


def test_fang_beats_krum():
    honest = honest_rows(16)
    rows = torch.cat([honest, fedllm_sec.forge(honest, "fang", m=6)])
    update = fedllm_sec.aggregate(rows, "krum", f=6).update
    assert float(update @ honest.mean(0)) < 0
    assert float(fedllm_sec.aggregate(honest, "krum", f=4).update @ honest.mean(0)) > 0


def test_a_searched_strength_hurts_a_known_rule_more_than_the_papers():
    honest = honest_rows(16)

    def rule(updates):
        return fedllm_sec.aggregate(updates.rows, "trimmed_mean", f=4)

    for attack, usual in (("alie", {}), ("ipm", {"epsilon": 0.5})):
        setting = {"alie": "z", "ipm": "epsilon"}[attack]
        searched = fedllm_sec.forge(honest, attack, m=4, defense=rule, **{setting: "optimise"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = fedllm_sec.forge(honest, attack, m=4, **usual)
        errors = [error(torch.cat([honest, rows]), honest, "trimmed_mean", f=4) for rows in (searched, plain)]
        assert errors[0] >= errors[1]


def test_a_projected_backdoor_passes_norm_clipping_untouched():
    delta, ctx = train_with(PGD(relative=1.0), steps=30, lr=0.9)
    free, _ = train_with(PGD(radius=1e9), steps=30, lr=0.9)
    radius = float(ctx.last_update.norm())
    assert float(free.norm()) > radius  # clipping would shorten it
    assert float(delta.norm()) <= radius * 1.0001  # clipping leaves it as it is


def test_the_gauge_hides_a_long_model_update_behind_short_factors():
    from fedllm_sec.attacks.conformance import example_view
    from fedllm_sec.attacks.update.gauge import lora_gauge

    view = example_view(m=1)
    loud, quiet = lora_gauge(view, factor=20.0), view.own
    norms = [float(kernels.row_norms(UpdateMatrix.of(rows))[0]) for rows in (loud, quiet)]
    assert norms[0] > 5 * norms[1]


def test_mimicked_clients_weigh_more_than_their_share():
    honest = honest_rows(10)
    honest[3] += 4e-3 * torch.randn(D, generator=generator_for(0, "odd"))
    rows = torch.cat([honest, fedllm_sec.forge(honest, "mimic", m=5)])
    assert torch.equal(rows[10], honest[3])
    pulled = fedllm_sec.aggregate(rows, "mean").update
    assert float((pulled - honest[3]).norm()) < 0.75 * float((honest.mean(0) - honest[3]).norm())
