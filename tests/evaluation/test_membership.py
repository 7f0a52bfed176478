"""Telling members from others: areas and shares that a person can count."""

from __future__ import annotations

import numpy as np
import pytest

from fedllm_sec.errors import FedError
from fedllm_sec.evaluation.membership import auc, roc, told_apart, tpr_at

MEMBERS, OTHERS = np.array([3.0, 2.0]), np.array([1.0, 2.0, 0.0])


def test_the_area_counts_pairs_and_ties_half():
    assert auc(MEMBERS, OTHERS) == 5.5 / 6  # 3 beats three, 2 beats two and ties with one
    assert auc(OTHERS, MEMBERS) == 0.5 / 6
    assert auc(MEMBERS, MEMBERS) == 0.5


def test_no_more_others_than_allowed_are_above_the_threshold():
    assert tpr_at(MEMBERS, OTHERS, 0.01) == 0.5  # none of three may be above: the threshold is 2, and 3 is above
    assert tpr_at(MEMBERS, OTHERS, 0.34) == 1.0  # one may be
    hundred = np.arange(100.0)
    assert tpr_at(np.array([98.5, 97.5]), hundred, 0.01) == 0.5
    assert tpr_at(np.array([5.0, 5.0]), np.array([5.0, 5.0])) == 0.0  # a tie at the threshold finds nobody


def test_the_curve_goes_through_every_threshold():
    assert roc(MEMBERS, OTHERS) == [(0, 0), (0, 0.5), (1 / 3, 1.0), (2 / 3, 1.0), (1.0, 1.0)]


def test_areas_agree_with_a_loop_over_pairs_and_with_the_area_under_the_curve():
    rng = np.random.default_rng(0)
    members, others = rng.integers(8, size=30) + 1.0, rng.integers(8, size=50) * 1.0
    slow = sum((m > o) + 0.5 * (m == o) for m in members for o in others) / (30 * 50)
    assert auc(members, others) == pytest.approx(slow, abs=1e-12)
    x, y = np.array(roc(members, others)).T
    assert float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum()) == pytest.approx(slow, abs=1e-12)


def test_intervals_hold_the_measure_and_are_the_same_every_time():
    rng = np.random.default_rng(1)
    members, others = rng.normal(1, 1, 60), rng.normal(0, 1, 200)
    one, again = told_apart(members, others), told_apart(members, others)
    low, high = np.quantile(one.aucs, [0.025, 0.975])
    assert low < one.auc < high
    assert 0.05 < high - low < 0.2
    assert (one.aucs == again.aucs).all()


@pytest.mark.parametrize(("members", "words"), [([], "no members"), ([np.nan], "not finite")])
def test_nothing_to_tell_apart_is_an_error(members: list[float], words: str):
    with pytest.raises(FedError, match=words):
        auc(np.array(members), OTHERS)
