"""Geometric median, RFA and centered clipping."""

import math

import pytest
import torch

from fedllm_sec.defenses import CenteredClipping, geometric_median, rfa
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from tests.defenses.small import context, matrix


def test_on_a_line_the_geometric_median_is_the_middle_row():
    decision = geometric_median(matrix([[0.0], [1.0], [10.0]]), context(1))
    assert decision.update.tolist() == [1.0]
    assert decision.weights.tolist() == [0.0, 1.0, 0.0]
    assert decision.scores.tolist() == pytest.approx([1.0, 0.0, 9.0])


def test_in_an_equilateral_triangle_it_is_the_centre():
    decision = geometric_median(matrix([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]]), context(2))
    assert decision.update.tolist() == pytest.approx([0.5, math.sqrt(3) / 6], rel=1e-6)


def test_it_is_joint_over_coordinates_and_not_a_median_of_each():
    rows = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]  # the median of each coordinate is 0
    assert geometric_median(matrix(rows), context(3)).update.tolist() == pytest.approx([1 / 3] * 3, rel=1e-6)


def test_two_rows_meet_in_the_middle_unless_one_weighs_more():
    rows = [[0.0, 0.0], [2.0, 4.0]]
    assert geometric_median(matrix(rows), context(2)).update.tolist() == pytest.approx([1.0, 2.0])
    heavy = geometric_median(matrix(rows, counts=[1, 3]), context(2), weights="counts")
    assert heavy.update.tolist() == [2.0, 4.0]


def test_a_majority_at_one_place_is_the_answer():
    rows = [[1.0, 2.0]] * 3 + [[50.0, 0.0], [0.0, -70.0]]
    assert geometric_median(matrix(rows), context(2)).update.tolist() == pytest.approx([1.0, 2.0], rel=1e-6)


def test_a_large_common_part_only_moves_it():
    torch.manual_seed(0)
    common = 1e4 * torch.randn(3000)
    rows = (torch.randn(10, 3000) + common) - common
    alone = geometric_median(matrix(rows.tolist()), context(3000))
    together = geometric_median(matrix((rows + common).tolist()), context(3000))
    torch.testing.assert_close(together.weights, alone.weights, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("size", [1e6, 1e12, 1e18, 1e30])
def test_rows_of_any_size_pull_with_one_vote_each(size):
    torch.manual_seed(0)
    honest = torch.randn(9, 300)
    direction = torch.randn(2, 300)
    far = direction / direction.norm(dim=1, keepdim=True)

    def answer(scale):
        return geometric_median(matrix(torch.cat([honest, scale * far]).tolist()), context(300)).update

    torch.testing.assert_close(answer(size), answer(1e5), rtol=0, atol=1e-3)  # the pull is a direction


def weiszfeld_by_direction(x, far, steps):
    """Weiszfeld's iteration from the mean in float64; the rows in `far`, whose mean is 0, pull with their direction."""
    z, near = x[~far].sum(0) / len(x), x[~far]
    lengths = x[far].norm(dim=1, keepdim=True)
    for _ in range(steps):
        pull = 1 / (near - z).norm(dim=1)
        z = (pull @ near + (x[far] / lengths).sum(0)) / (pull.sum() + (1 / lengths).sum())
    return z


@pytest.mark.parametrize("size", [1e3, 1e7, 1e9, 1e16, 1e18, 1e24, 1e30])
def test_two_rows_that_cancel_change_nothing_however_long_they_are(size):
    torch.manual_seed(0)
    near = 0.02 / 300**0.5 * torch.randn(10, 300) + 0.01 / 300**0.5  # ten rows of length 0.02 or so
    push = torch.nn.functional.normalize(torch.randn(1, 300))
    rows = torch.cat([near, size * push, -size * push])
    far = torch.tensor([False] * 10 + [True] * 2)
    for rule, steps, within in ((geometric_median, 500, 1e-5), (rfa, 3, 2e-3)):
        decision = rule(UpdateMatrix.of(rows), context(300))
        z = weiszfeld_by_direction(rows.double(), far, steps)
        assert float((decision.update.double() - z).norm() / z.norm()) <= within
        assert decision.scores[10:].tolist() == pytest.approx([size] * 2, rel=1e-3)
        assert float(decision.weights.sum()) == pytest.approx(1.0)


def test_no_step_of_rfa_goes_farther_than_a_million_median_distances():
    near = torch.eye(8)
    for size in (1e8, 1e20, 1e30):
        rows = torch.cat([near, torch.full((2, 8), size)])
        assert float(rfa(UpdateMatrix.of(rows), context(8)).update.norm()) < 1e6


def test_buckets_average_groups_first():
    updates = matrix([[float(i), 0.0] for i in range(6)])
    one = geometric_median(updates, context(2), buckets=1)
    assert one.update.tolist() == pytest.approx([2.5, 0.0])
    assert one.weights.tolist() == pytest.approx([1 / 6] * 6)
    three = geometric_median(updates, context(2), buckets=3)
    assert three.scores is None  # of three groups, not of six clients
    assert float(three.weights.sum()) == pytest.approx(1.0)
    with pytest.raises(DefenseError, match="1 <= buckets <= n"):
        geometric_median(updates, context(2), buckets=7)


def test_one_rfa_step_is_one_weiszfeld_step_from_the_weighted_mean():
    updates = matrix([[0.0], [1.0], [5.0]])  # mean 2, distances 2 1 3
    wanted = (0 / 2 + 1 / 1 + 5 / 3) / (1 / 2 + 1 / 1 + 1 / 3)
    decision = rfa(updates, context(1), steps=1)
    assert decision.update.tolist() == pytest.approx([wanted])
    assert decision.weights.tolist() == pytest.approx([3 / 11, 6 / 11, 2 / 11])


def test_rfa_weighs_with_capped_claims():
    updates = matrix([[0.0], [1.0], [5.0]], counts=[1, 1, 1e9])
    honest = rfa(matrix([[0.0], [1.0], [5.0]], counts=[1, 1, 3]), context(1))
    assert torch.equal(rfa(updates, context(1)).update, honest.update)


def test_centered_clipping_from_zero_clips_each_row_to_tau():
    decision = CenteredClipping(tau=1.0)(matrix([[3.0, 4.0], [0.0, 0.5]]), context(2))
    assert decision.update.tolist() == pytest.approx([0.3, 0.65])
    assert decision.weights.tolist() == pytest.approx([0.1, 0.5])


def test_centered_clipping_starts_at_the_last_answer():
    rule = CenteredClipping(tau=1.0)
    assert rule(matrix([[2.0], [2.0]]), context(1)).update.tolist() == [1.0]
    assert rule(matrix([[2.0], [5.0]]), context(1)).update.tolist() == [2.0]
    fresh = CenteredClipping(tau=1.0)
    fresh.load_state_dict(rule.state_dict())
    assert fresh(matrix([[2.0], [2.0]]), context(1)).update.tolist() == [2.0]


def test_centered_clipping_by_default_clips_to_the_median_distance():
    decision = CenteredClipping()(matrix([[1.0], [2.0], [1e30]]), context(1))
    assert decision.notes["tau"] == pytest.approx(2.0)
    assert decision.update.tolist() == pytest.approx([5 / 3])


def test_more_iterations_come_closer_to_where_most_rows_are():
    updates = matrix([[10.0], [10.0], [10.0], [-1e6]])
    gaps = [abs(10 - float(CenteredClipping(tau=5.0, iterations=k)(updates, context(1)).update)) for k in (1, 2, 5, 40)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 2.0


def test_centered_clipping_with_buckets_reports_weights_of_clients():
    updates = matrix([[1.0], [2.0], [3.0], [4.0]])
    decision = CenteredClipping(tau=100.0, bucket_size=2)(updates, context(1))
    assert decision.update.tolist() == pytest.approx([2.5])
    assert decision.weights.tolist() == pytest.approx([0.25] * 4)
    assert decision.scores is None  # of two groups, not of four clients


def test_centered_clipping_refuses_a_memory_of_another_size():
    rule = CenteredClipping()
    rule(matrix([[1.0, 2.0]]), context(2))
    with pytest.raises(DefenseError, match="v of the last round has 2 values, the rows have 1"):
        rule(matrix([[1.0]]), context(1))


@pytest.mark.parametrize("size", [1e3, 1e18])
def test_far_rows_beside_a_large_common_part_do_not_disturb_the_near_ones(size):
    torch.manual_seed(0)
    common = 1e4 * torch.randn(2000)
    near = (torch.randn(8, 2000) + common) - common
    far = size * torch.randn(1, 2000)
    rows = torch.cat([near + common, far])

    x = rows.double()
    z = x[:8].mean(0)
    for _ in range(200):
        pull = 1 / (x - z).norm(dim=1)
        z = pull @ x / pull.sum()
    gap = float((geometric_median(matrix(rows.tolist()), context(2000)).update.double() - z).norm())
    assert gap <= 1e-6 * float(z.norm())
    # and beside the spread of the near rows, not only beside the common part: float32 can hold this much of it
    assert gap <= 5e-3 * float((x[0] - z).norm())


def test_centered_clipping_around_a_large_v_sees_the_small_steps():
    torch.manual_seed(0)
    v = 1e4 * torch.randn(2000)
    steps = torch.randn(9, 2000)
    rows = v + steps
    rule = CenteredClipping()
    rule.load_state_dict({"v": v})
    decision = rule(matrix(rows.tolist()), context(2000))
    lengths = (rows.double() - v.double()).norm(dim=1)
    assert decision.notes["tau"] == pytest.approx(float(lengths.median()), rel=1e-5)
    wanted = (torch.clamp(lengths.median() / lengths, max=1.0) / 9).tolist()
    assert decision.weights.tolist() == pytest.approx(wanted, rel=1e-5)
