"""RFLBAT's steps against NumPy, and the whole by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from fedllm_sec import kernels
from fedllm_sec.defenses.rflbat import clusters, far_sums, k_means, least_alike, near, plane, rflbat
from fedllm_sec.errors import DefenseError
from fedllm_sec.seeds import generator_for
from tests.defenses.defense_rows import context, matrix


def reference_plane(x):
    centred = x - x.mean(0)
    _, _, v = np.linalg.svd(centred, full_matrices=False)
    return centred @ v[:2].T


def reference_alike(x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return float(np.median((unit @ unit.T).mean(1)))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_plane_is_that_of_the_first_two_principal_components(scale):
    rows = scale * torch.randn(11, 40, generator=generator_for(1, "rows"))
    wanted = reference_plane(rows.double().numpy())
    points = plane(kernels.sq_distances(matrix(rows.tolist()))).numpy()
    for column in range(2):
        same = min(np.abs(points[:, column] - sign * wanted[:, column]).max() for sign in (1, -1))
        assert same <= 1e-5 * np.abs(wanted).max()
    sums = [sum(math.dist(a, b) for b in wanted) for a in wanted]
    np.testing.assert_allclose(far_sums(torch.from_numpy(points)).numpy(), sums, rtol=1e-5)


def test_k_means_finds_the_best_of_all_ways_to_cut_eight_points_in_two():
    points = torch.rand(8, 2, generator=generator_for(2, "points"), dtype=torch.float64)

    def spread(labels):
        parts = (points[labels == c] for c in (0, 1))
        return sum(float((part - part.mean(0)).square().sum()) for part in parts if len(part))

    labels, found = k_means(points[None], 2, generator_for(3, "means"))
    best = min(spread(torch.tensor(cut)) for cut in itertools.product((0, 1), repeat=8))
    assert float(found) == pytest.approx(best, rel=1e-9)
    assert spread(labels[0]) == pytest.approx(best, rel=1e-9)


def test_the_gap_statistic_finds_one_cloud_and_three():
    cloud = torch.randn(24, 2, generator=generator_for(4, "cloud"), dtype=torch.float64)
    assert set(clusters(cloud, generator_for(1, "gap")).tolist()) == {0}
    centres = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]], dtype=torch.float64).repeat(8, 1)
    labels = clusters(cloud + centres, generator_for(1, "gap"))
    assert [len(set(labels[i::3].tolist())) for i in range(3)] == [1, 1, 1]
    assert len(set(labels.tolist())) == 3
    assert clusters(torch.ones(5, 2, dtype=torch.float64), generator_for(1, "gap")).tolist() == [0] * 5


def test_far_points_and_the_least_alike_cluster_by_hand():
    # sums of distances on a line: 0, 1, 2, 3, 100 -> 106, 103, 102, 103, 394
    points = torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0], [100, 0]], dtype=torch.float64)
    assert near(points, 3.0).tolist() == [True] * 4 + [False]
    assert near(points, 4.0).all()
    rows = np.array([[1.0, 0], [0, 1], [1, 1], [5, 5], [6, 6], [-3, 0]])
    assert reference_alike(rows[:3]) == pytest.approx((1 + 0 + math.sqrt(0.5)) / 3)
    gram = torch.from_numpy(rows @ rows.T)
    # mean cosines: (1.71, 1.71, 2.41) / 3, median 0.57; copies 1; one alone 1
    assert least_alike(torch.tensor([2, 2, 2, 0, 0, 1]), gram).tolist() == [True, True, True, False, False, False]
    assert least_alike(torch.tensor([1, 0, 0, 0, 0, 0]), gram).tolist() == [False] + [True] * 5


def test_copies_are_left_out():
    honest = torch.randn(12, 60, generator=generator_for(5, "honest"))
    push = 4 * torch.randn(60, generator=generator_for(5, "push"))
    rows = torch.cat([honest, push + 0.01 * honest[:4]])
    decision = rflbat(matrix(rows.tolist()), context(60))
    assert not decision.kept[12:].any()
    assert decision.notes["near"] == 16.0
    assert 2 <= int(decision.kept.sum()) <= decision.notes["in_cluster"] <= 12
    torch.testing.assert_close(decision.update, honest[decision.kept[:12]].mean(0), atol=1e-4, rtol=1e-4)


def test_a_bound_that_no_middle_row_could_keep_is_refused():
    with pytest.raises(DefenseError, match="rflbat: needs far >= 1"):
        rflbat(matrix([[1.0], [2.0]]), context(1), far=0.5)
