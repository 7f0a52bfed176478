"""Stages before the rule."""

import pytest
import torch

from fedllm_sec.defenses import arc, bucketing, nnm, norm_clipping, weak_dp_client
from fedllm_sec.errors import DefenseError
from tests.defenses.small import context, formed, matrix


def test_rows_longer_than_the_radius_are_cut_to_it():
    rows = formed(norm_clipping(matrix([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), context(2), radius=1.0))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_the_default_radius_is_the_median_length():
    rows = formed(norm_clipping(matrix([[1.0], [-2.0], [1e30]]), context(1)))
    assert rows.flatten().tolist() == pytest.approx([1.0, -2.0, 2.0])


def test_a_radius_must_be_positive():
    with pytest.raises(DefenseError, match="norm_clipping: needs radius > 0, got radius=0"):
        norm_clipping(matrix([[1.0]]), context(1), radius=0.0)


def test_nnm_averages_each_row_with_its_nearest_ones():
    rows = formed(nnm(matrix([[0.0], [1.0], [3.0], [100.0]]), context(1), f=1))
    assert rows.flatten().tolist() == pytest.approx([4 / 3, 4 / 3, 4 / 3, 104 / 3])


def test_nnm_counts_a_row_as_its_own_nearest_even_among_copies():
    rows = formed(nnm(matrix([[1.0], [1.0], [1.0], [5.0]]), context(1), f=3))
    assert rows.flatten().tolist() == [1.0, 1.0, 1.0, 5.0]


def test_bucketing_keeps_a_short_last_bucket_and_loses_no_row():
    updates = matrix([[1.0], [2.0], [4.0], [8.0], [16.0]])
    mixed = bucketing(updates, context(1), s=2)
    rows = formed(mixed).flatten()
    assert mixed.ids == ("bucket0", "bucket1", "bucket2")
    assert float(2 * rows[0] + 2 * rows[1] + rows[2]) == pytest.approx(31.0)


def test_buckets_are_drawn_over_clients_and_not_over_positions():
    rows, ids = [[1.0], [2.0], [4.0], [8.0]], ["a", "b", "c", "d"]
    one = formed(bucketing(matrix(rows, ids=ids), context(1)))
    two = formed(bucketing(matrix(rows[::-1], ids=ids[::-1]), context(1)))
    torch.testing.assert_close(one, two)
    others = {tuple(formed(bucketing(matrix(rows, ids=ids), context(1, seed=s))).flatten().tolist()) for s in range(9)}
    assert len(others) > 1


def test_arc_cuts_the_longest_rows_to_the_next_length():
    rows = formed(arc(matrix([[1.0], [2.0], [-3.0], [100.0]]), context(1), f=1))  # k = floor(2 * 1/4 * 3) = 1
    assert rows.flatten().tolist() == pytest.approx([1.0, 2.0, -3.0, 3.0])


def test_arc_without_attackers_changes_nothing():
    rows = formed(arc(matrix([[1.0], [2.0], [100.0]]), context(1), f=0))
    assert rows.flatten().tolist() == [1.0, 2.0, 100.0]


def test_client_noise_has_the_stated_size_and_its_own_draw_for_each_client():
    updates = matrix(torch.zeros(2, 20_000).tolist())
    rows = formed(weak_dp_client(updates, context(20_000), radius=2.0, sigma=0.5, absolute=True))
    assert rows.std(dim=1).tolist() == pytest.approx([1.0, 1.0], rel=0.03)
    assert abs(float((rows[0] * rows[1]).mean())) < 0.03
    short = formed(weak_dp_client(updates, context(20_000), radius=2.0, sigma=0.5))
    assert short.norm(dim=1).tolist() == pytest.approx([1.0, 1.0], rel=0.03)
