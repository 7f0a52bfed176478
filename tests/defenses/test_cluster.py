"""FLAME, FreqFed and SignGuard against plain clustering loops."""

import math

import numpy as np
import pytest
import torch

from fedllm_sec.defenses.cluster import (
    LowFrequencies,
    cosine_distances,
    flame,
    freqfed,
    hdbscan_labels,
    majority_core,
    sign_majority,
    signguard,
    similarity_feature,
    twiddles,
)
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from tests.defenses.defense_rows import KINDS, assert_close, assert_repaired, attacked, both, context, matrix, rows_of

SIZES = [1, 2, 3, 4, 7, 16, 33, 64]


def cosine_reference(x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return 1 - unit @ unit.T


def core_reference(distances):
    """Cut single links from the longest down, as long as one part still holds more than half of all."""
    n, members = len(distances), list(range(len(distances)))
    for cut in sorted({distances[i, j] for i in range(n) for j in range(i)}, reverse=True):
        parts, left = [], set(members)
        while left:
            part, stack = set(), [left.pop()]
            while stack:
                i = stack.pop()
                part.add(i)
                near = {j for j in left if distances[i, j] < cut}
                left -= near
                stack += near
            parts.append(sorted(part))
        largest = max(parts, key=len)
        if len(largest) < n // 2 + 1:
            break
        members = largest
    return members


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 13, 20])
def test_the_majority_core_is_what_cutting_single_links_leaves(n):
    for seed in range(5):
        distances = cosine_reference(rows_of("heavy_tailed", n, seed=seed).double().numpy())
        core = majority_core(torch.from_numpy(distances.clip(0)).fill_diagonal_(0.0))
        assert core.nonzero().flatten().tolist() == core_reference(distances)


def flame_reference(x):
    core = core_reference(cosine_reference(x)) if len(x) > 1 else [0]
    norms = [math.sqrt(sum(v * v for v in row)) for row in x]
    radius = np.median(norms)
    return sum(x[i] * min(1, radius / norms[i]) for i in core) / len(core), radius


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_flame_equals_its_reference(kind, n):
    updates, x = both(kind, n)
    decision = flame(updates, context(), noise=0.0)
    wanted, radius = flame_reference(x)
    assert_close(decision.update, wanted)
    assert decision.notes["median_norm"] == pytest.approx(radius)


def test_flame_by_hand():
    # 0, 0.1 and 0.2 rad from the first axis agree, the fourth row points back; the median norm is 2
    rows = [[1.0, 0.0], [3 * math.cos(0.1), 3 * math.sin(0.1)], [2 * math.cos(0.2), 2 * math.sin(0.2)],
            [-2.0, 0.0]]  # fmt: skip
    decision = flame(matrix(rows), context(2), noise=0.0)
    assert decision.kept.tolist() == [True, True, True, False]
    assert decision.weights.tolist() == pytest.approx([1 / 3, 2 / 9, 1 / 3, 0.0])


def test_flame_noise_is_a_share_of_the_median_length_or_has_the_standard_deviation_of_the_paper():
    updates = UpdateMatrix.of(rows_of("random", 6, 20_000))
    clean = flame(updates, context(20_000), noise=0.0)
    added = flame(updates, context(20_000), noise=0.01, absolute=True).update - clean.update
    assert float(added.std()) == pytest.approx(0.01 * clean.notes["median_norm"], rel=0.03)
    assert abs(float(added.mean())) < 0.05 * float(added.std())
    short = flame(updates, context(20_000), noise=0.01).update - clean.update
    assert float(short.norm()) == pytest.approx(0.01 * clean.notes["median_norm"], rel=0.03)


def test_cosine_distances_of_zero_rows_are_defined():
    rows = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    assert cosine_distances(rows @ rows.T).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [1, 1, 0, 2],
        [1, 1, 2, 0],
    ]


def test_fewer_rows_than_a_cluster_needs_are_one_cluster():
    assert hdbscan_labels(torch.zeros(2, 2).double(), 3, 3).tolist() == [0, 0]


@pytest.mark.parametrize("rule", [lambda u, c: flame(u, c, noise=0.0), freqfed, signguard])
@pytest.mark.parametrize("size", [10.0, 1e18])
def test_three_rows_pushing_back_are_left_out(rule, size):
    updates, honest = attacked(size)
    decision = rule(updates, context())
    assert not decision.kept[-3:].any()
    assert_repaired(decision.update, honest)


@pytest.mark.parametrize("rule", [lambda u, c: flame(u, c, noise=0.0), freqfed, signguard])
def test_rows_that_are_all_equal_are_all_kept(rule):
    updates = matrix([[1.0, -2.0, 3.0]] * 6)
    decision = rule(updates, context(3))
    assert decision.kept.tolist() == [True] * 6
    assert decision.update.tolist() == pytest.approx([1.0, -2.0, 3.0])


# ---------------------------------------------------------------- FreqFed


def dct_reference(row, count):
    d = len(row)
    angles = np.pi * (2 * np.arange(d) + 1) / (2 * d)
    scale = [math.sqrt(1 / d)] + [math.sqrt(2 / d)] * (d - 1)
    return np.array([scale[k] * (row * np.cos(k * angles)).sum() for k in range(count)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_freqfed_equals_its_reference(kind, n):
    updates, x = both(kind, n)
    low = np.array([dct_reference(row, 21) for row in x])
    core = core_reference(cosine_reference(low)) if n > 1 else [0]
    assert_close(freqfed(updates, context()).update, x[core].mean(axis=0))


def low_frequencies(row, count):
    low = torch.empty(1, count)
    LowFrequencies(1, len(row), twiddles(len(row), torch.float64)).put([row], low)
    return low[0]


def test_low_frequencies_by_hand():
    # constant 2 over four values, scaled to 1: first coefficient 4 / sqrt(4), the others 0
    assert low_frequencies(torch.full((4,), 2.0), 2).tolist() == pytest.approx([2.0, 0.0])


def test_low_frequencies_of_an_infinite_row_are_those_of_its_infinite_values_alone():
    row = torch.tensor([5.0, math.inf, 0.0, -math.inf])
    alone = torch.tensor([0.0, 1.0, 0.0, -1.0])
    assert low_frequencies(row, 4).tolist() == low_frequencies(alone, 4).tolist()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e30, math.inf])
def test_freqfed_leaves_out_a_row_with_one_huge_or_infinite_value(size):
    rows = torch.ones(7, 32)
    rows[3, 5] = size
    decision = freqfed(UpdateMatrix.of(rows), context(32))
    assert decision.kept.tolist() == [True, True, True, False, True, True, True]
    assert decision.update.tolist() == pytest.approx([1.0] * 32)
    assert bool(decision.scores.isfinite().all())


def test_freqfed_does_not_look_at_high_frequencies():
    # the last basis function of the DCT tells the last two rows apart, but not in the lowest quarter
    high = torch.cos(torch.pi / 32 * 15 * (2 * torch.arange(16) + 1))
    rows = torch.ones(6, 16) + 0.01 * rows_of("random", 6, 16)
    rows[4:] += 3 * high
    decision = freqfed(UpdateMatrix.of(rows), context(16), fraction=0.25)
    full = freqfed(UpdateMatrix.of(rows), context(16), fraction=1.0)
    assert not full.kept[4:].any()
    assert float(decision.scores.max()) < 0.05 < float(full.scores.max())


# ---------------------------------------------------------------- SignGuard


def mean_shift_reference(features):
    """Flat-kernel mean shift from every row; most populated centre first; rows within its bandwidth."""
    n = len(features)
    gaps = np.sqrt(((features[:, None] - features[None]) ** 2).sum(-1))
    width = max(np.sort(gaps, axis=1)[:, n // 2 - 1].mean(), 1e-9)
    centres = []
    for z in features:
        for _ in range(300):
            near = features[np.sqrt(((features - z) ** 2).sum(1)) <= width]
            old, z = z, near.mean(axis=0)
            if np.linalg.norm(z - old) <= 1e-3 * width:
                break
        centres.append((len(near), tuple(z)))
    kept = []
    for _, z in sorted(set(centres), reverse=True):
        if all(np.linalg.norm(np.subtract(z, k)) > width for k in kept):
            kept.append(z)
    to_centres = np.array([[np.linalg.norm(row - k) for k in kept] for row in features])
    labels = np.where(to_centres.min(1) <= width, to_centres.argmin(1), -1)
    return labels == np.bincount(labels[labels >= 0]).argmax()


def signguard_reference(x):
    features = np.array([[(r > 0).mean(), (r == 0).mean(), (r < 0).mean()] for r in x])
    norms = np.linalg.norm(x, axis=1)
    radius = np.median(norms)
    kept = (norms >= 0.1 * radius) & (norms <= 3 * radius)
    if len(x) >= 4 and (kept & mean_shift_reference(features)).any():
        kept &= mean_shift_reference(features)
    return (x * np.minimum(1, radius / norms)[:, None])[kept].mean(axis=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_signguard_equals_its_reference(kind, n):
    updates, x = both(kind, n)
    assert_close(signguard(updates, context()).update, signguard_reference(x))


def test_signguard_by_hand():
    # norms 5, 5, 5, 5, 50, 5: the fifth fails the norm test; the last has turned signs
    rows = [[3.0, 4.0], [4.0, 3.0], [3.0, 4.0], [4.0, 3.0], [30.0, 40.0], [-3.0, -4.0]]
    decision = signguard(matrix(rows), context(2))
    assert decision.kept.tolist() == [True, True, True, True, False, False]
    assert decision.update.tolist() == [3.5, 3.5]
    assert decision.notes == {"failed_norm": 1.0, "failed_signs": 1.0, "fallback": 0.0}


def test_signguard_takes_the_rows_of_ordinary_norm_when_no_row_passes_both_tests():
    # four rows agree in sign, two of them huge and two tiny; the other three have ordinary norms
    rows = [[100.0, 100.0], [90.0, 90.0], [0.01, 0.01], [0.02, 0.02], [-3.0, 4.0], [4.0, -3.0], [-4.0, 3.0]]
    decision = signguard(matrix(rows), context(2))
    assert decision.notes["fallback"] == 1.0
    assert decision.kept.tolist() == [False] * 4 + [True] * 3


def test_signguard_compares_norms_as_sent_and_clips_afterwards():
    rows = [[2.0], [1.0], [1.0], [1.0], [0.5]]
    assert float(signguard(matrix(rows), context(1)).update) == pytest.approx((1 + 1 + 1 + 1 + 0.5) / 5)


def test_signguard_sim_by_hand():
    # median cosines to the others 1, 1, 1, -1; the median of these is 1
    rows = torch.tensor([[2.0, -2.0], [1.0, -1.0], [3.0, -3.0], [-1.0, 1.0]], dtype=torch.float64)
    assert similarity_feature(rows @ rows.T).flatten().tolist() == pytest.approx([0.2, 0.2, 0.2, 0.0])


def test_signguard_sim_sees_turned_rows_whose_signs_balance():
    step = torch.tensor([1.0, -1.0]).repeat(500)
    rows = step + 0.3 * rows_of("random", 10, 1000)
    rows[7:] *= -1
    assert signguard(UpdateMatrix.of(rows), context(1000)).kept[7:].any()
    decision = signguard(UpdateMatrix.of(rows), context(1000), similarity="cosine")
    assert not decision.kept[7:].any()
    assert int(decision.kept.sum()) >= 4


def test_signguard_samples_large_rows():
    updates = UpdateMatrix.of(rows_of("random", 8, 20_000))
    assert torch.isfinite(signguard(updates, context(20_000), sample=0.2).update).all()


def test_equal_sign_shares_are_one_cluster():
    assert sign_majority(torch.full((6, 3), 1 / 3, dtype=torch.float64)).all()


@pytest.mark.parametrize(
    ("rule", "settings"),
    [(flame, {"noise": -1.0}), (freqfed, {"fraction": 0.0}), (signguard, {"lower": 2.0})],
)
def test_senseless_settings_are_refused(rule, settings):
    with pytest.raises(DefenseError, match="needs"):
        rule(matrix([[1.0]]), context(1), **settings)
