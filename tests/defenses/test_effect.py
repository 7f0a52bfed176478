"""Sixteen clients look for the bottom of a bowl, three of them pull away: the mean fails, the defenses arrive."""

import pytest
import torch

from fedllm_sec.defenses import MENU
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import RoundContext
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.seeds import generator_for

D, CLIENTS, ATTACKERS, ROUNDS = 60, 16, 3, 40


def stage(name, **settings):
    return resolve(name, settings, MENU, "test")


def run(attack, before, rule, after=()):
    """Distance to the bottom after the last round, in units of the distance at the start."""
    goal = torch.randn(D, generator=generator_for(1, "goal"))
    own_goals = goal + 0.3 * torch.randn(CLIENTS, D, generator=generator_for(1, "own"))
    pipeline, vector = Pipeline(before, rule, after), torch.zeros(D)
    for r in range(1, ROUNDS + 1):
        noise = torch.randn(CLIENTS, D, generator=generator_for(1, r, "noise"))
        rows = 0.3 * (own_goals - vector + 0.3 * noise)
        rows[:ATTACKERS] = attack(rows[ATTACKERS:], r)
        ctx = RoundContext(r, vector, Layout.single(D), generator_for(1, r, "rule"), rounds=ROUNDS)
        decision = pipeline.decide(UpdateMatrix.of(rows), ctx)
        vector = pipeline.finish(vector + decision.update, ctx)
    return float((vector - goal).norm() / goal.norm())


def flip(honest, r):
    return (-10 * honest.mean(0)).expand(ATTACKERS, -1)


def shout(honest, r):
    return 1e6 * torch.randn(ATTACKERS, D, generator=generator_for(1, r, "attack"))


def sybils(honest, r):
    """One direction, again and again, no longer than an honest row."""
    push = torch.ones(D)
    return (push / push.norm() * honest.norm(dim=1).mean()).expand(ATTACKERS, -1)


@pytest.mark.parametrize("attack", [flip, shout])
def test_the_mean_is_led_astray(attack):
    assert run(attack, [], stage("mean")) > 1.0


@pytest.mark.parametrize("attack", [flip, shout])
@pytest.mark.parametrize(
    ("before", "rule", "settings"),
    [
        ([], "median", {}),
        ([], "trimmed_mean", {"f": 3}),
        ([], "slsgd", {"f": 3}),
        ([], "foundationfl", {"m": 2}),
        ([], "clair", {}),
        ([], "krum", {"f": 3}),
        ([], "multi_krum", {"f": 3}),
        ([], "bulyan", {"f": 3}),
        ([], "geometric_median", {}),
        ([], "centered_clipping", {"iterations": 3}),
        ([("norm_clipping", {})], "median", {}),
        ([("nnm", {"f": 3})], "trimmed_mean", {"f": 3}),
        ([("arc", {"f": 3})], "geometric_median", {}),
        ([("bucketing", {"s": 2})], "geometric_median", {}),
    ],
)
def test_a_defense_arrives_all_the_same(attack, before, rule, settings):
    stages = [stage(name, **given) for name, given in before]
    assert run(attack, stages, stage(rule, **settings)) < 0.35


def test_eight_copies_of_one_row_of_sixteen_are_too_many_for_foundationfl_under_a_flip():
    led = run(flip, [], stage("foundationfl"))
    assert led > 2 * run(flip, [], stage("foundationfl", m=2))
    assert run(flip, [], stage("foundationfl", f=3)) > 1.0  # an attacker's row is copied more often than 3 are trimmed


def test_clipping_bounds_what_a_shout_can_do_and_not_what_a_flip_can():
    assert run(shout, [stage("norm_clipping")], stage("mean")) < 0.5
    assert run(shout, [], stage("mean")) > 1e4


def test_rfa_with_three_steps_survives_a_flip():
    assert run(flip, [], stage("rfa")) < 0.5


def test_foolsgold_silences_sybils_that_norms_do_not_betray():
    assert run(sybils, [], stage("foolsgold")) < 0.8 * run(sybils, [], stage("mean"))


def test_noise_after_the_rule_does_not_undo_the_defense():
    after = [stage("crfl", rho=20.0, noise=0.01)]
    assert run(flip, [], stage("multi_krum", f=3), after) < 0.35
