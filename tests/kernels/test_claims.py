"""Medians are midpoints wherever the text says median, and claims are cut to a multiple of theirs."""

import numpy as np
import pytest
import torch

import fedllm_sec
from fedllm_sec.algorithms.fitting import step_factors
from fedllm_sec.defenses.geometric import typical_distance
from fedllm_sec.kernels.claims import capped, midpoint
from fedllm_sec.protocols import LocalTraining


def test_the_median_of_an_even_number_is_halfway_between_the_middle_two():
    assert midpoint(torch.tensor([9.0, 1.0, 9.0, 1.0])) == 5.0
    assert midpoint(torch.tensor([9.0, 1.0, 2.0])) == 2.0


def test_a_claim_counts_for_three_median_claims_at_most_and_claims_of_nothing_are_no_part_of_the_median():
    assert capped([100.0, 100.0, 20.0, 1e9]).tolist() == [100.0, 100.0, 20.0, 300.0]
    assert capped([0.0, 0.0, 0.0, 2.0, 4.0, 50.0], cap=2.0).tolist() == [0.0, 0.0, 0.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize("attack", ["byzantine_random", "gaussian"])
def test_the_median_honest_length_of_attacks(attack):
    honest = np.diag([1.0, 1.0, 9.0, 9.0])
    honest = np.hstack([honest, np.zeros((4, 9996))])
    rows = fedllm_sec.forge(honest, attack, m=1, own=np.zeros((1, 10_000)))
    assert np.linalg.norm(rows) == pytest.approx(50.0, rel=1e-5 if attack == "byzantine_random" else 0.03)


def test_the_median_distance_of_four_rows():
    at = torch.tensor([[0.0], [1.0], [3.0], [7.0]]).double()  # distances 1 2 3 4 6 7
    assert typical_distance((at - at.T).square()) == pytest.approx(3.5)


def test_the_common_number_of_steps_of_fednova():
    sgd = LocalTraining(batch_size=1, steps=1, optimizer="sgd")
    assert step_factors(torch.tensor([1.0, 2.0, 4.0, 8.0]).double(), sgd, cap=10.0).tolist() == [3.0, 1.5, 0.75, 0.375]
