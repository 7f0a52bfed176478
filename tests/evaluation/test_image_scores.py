"""PSNR, SSIM and matching, on images a person can check."""

from __future__ import annotations

import pytest
import torch

from fedllm_sec.errors import DataError
from fedllm_sec.evaluation.images import best_median_worst, counts_accuracy, matched, psnr, ssim


def test_psnr_of_an_error_of_a_tenth_is_20_db_and_of_none_the_most():
    true = torch.full((2, 1, 4, 4), 0.5)
    made = torch.stack([true[0] + 0.1, true[1]])
    assert psnr(made, true).tolist() == pytest.approx([20.0, 120.0], abs=1e-4)


def test_ssim_is_that_of_its_formula_in_ten_plain_lines():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1, 1, 11, 11, generator=rng, dtype=torch.float64)
    place = torch.arange(11, dtype=torch.float64) - 5
    g = torch.exp(-(place**2) / 4.5)
    w = torch.outer(g, g) / g.sum() ** 2
    x, y = a[0, 0], b[0, 0]
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, c = (w * x * x).sum() - mx**2, (w * y * y).sum() - my**2, (w * x * y).sum() - mx * my
    wanted = (2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert float(ssim(a, b)) == pytest.approx(float(wanted), abs=1e-9)
    assert float(ssim(a, a)) == pytest.approx(1.0)
    assert ssim(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)).shape == (1,)


def test_a_batch_is_matched_whatever_its_order():
    true = torch.stack([torch.full((1, 8, 8), v) for v in (0.1, 0.5, 0.9)])
    pairs = matched(true[[2, 0, 1]] + 0.01, true)
    assert pairs.partner == [1, 2, 0]
    assert min(pairs.psnr) == pytest.approx(40.0, abs=0.01)
    with pytest.raises(DataError, match="as many images"):
        matched(true[:2], true)


def test_counts_are_right_as_far_as_they_overlap():
    assert counts_accuracy(torch.tensor([3, 1, 0]), torch.tensor([2, 1, 1])) == 0.75
    assert counts_accuracy(torch.tensor([2, 1, 1]), torch.tensor([1, 0, 0])) == 0.25


def test_best_median_and_worst_are_chosen_by_rank_alone():
    assert best_median_worst([20.0, 50.0, 30.0, 10.0]) == {"best": 1, "median": 0, "worst": 3}
