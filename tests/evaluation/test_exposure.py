"""Exposure of a secret among four and among tied guesses, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedllm_sec.errors import FedError
from fedllm_sec.evaluation.exposure import exposure, rank

LOSSES = np.array([3.0, 1.0, 2.0, 4.0])


def test_the_likeliest_of_four_is_two_bits_exposed_and_the_unlikeliest_none():
    assert [exposure(LOSSES, i) for i in (1, 2, 3)] == [2.0, 1.0, 0.0]
    assert exposure(LOSSES, 0) == pytest.approx(2 - np.log2(3))


def test_guesses_of_the_same_loss_share_their_places():
    assert rank(np.array([1.0, 1.0, 1.0, 5.0]), 2) == 2.0
    assert rank(np.zeros(1000), 0) == 500.5


def test_a_secret_that_was_never_seen_is_exposed_by_log2_e_on_average():
    losses = np.arange(1000.0)
    assert np.mean([exposure(losses, i) for i in range(1000)]) == pytest.approx(np.log2(np.e), abs=0.02)


def test_losses_that_are_no_numbers_are_an_error():
    with pytest.raises(FedError, match="not finite"):
        rank(np.array([1.0, np.inf]), 0)
