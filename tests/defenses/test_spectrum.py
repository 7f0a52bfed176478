"""Five statistics of an adapter's spectra, by hand, and the logistic model of them."""

import math

import numpy as np
import torch

from fedllm_sec.defenses.spectrum import spectral_features, spectral_scan, statistics
from fedllm_sec.models.products import singular_values, with_spectrum
from fedllm_sec.seeds import generator_for

A = torch.tensor([[3.0, 0, 0], [0, 4, 0]])
B = torch.tensor([[0.0, 1], [1, 0], [0, 0], [0, 0]])  # orthonormal columns: A's singular values 4 and 3 stay


def test_five_statistics_of_the_singular_values_eight_and_six_by_hand():
    values = singular_values(A, B, scale=2.0)
    torch.testing.assert_close(values, torch.tensor([8.0, 6.0], dtype=torch.float64))
    entropy = -(0.64 * math.log(0.64) + 0.36 * math.log(0.36))  # 0.653
    wanted = [8.0, 10.0, 0.64, entropy, 1.0]  # gaps of 1 to the mean of 7: m_4 / m_2^2 = 1
    np.testing.assert_allclose(spectral_features([(A, B)], [2.0]), wanted)
    four = statistics(torch.tensor([9.0, 1, 1, 1]))  # gaps 6, -2, -2, -2: m_2 = 12, m_4 = 336
    np.testing.assert_allclose(four[[0, 2, 4]], [9.0, 81 / 84, 336 / 144])
    assert statistics(torch.zeros(4)).tolist() == [0.0] * 5
    assert statistics(torch.full((4,), 5.0))[4] == 0.0


def test_a_gauge_changes_no_statistic_and_a_rank_that_is_not_there_counts_as_zeros():
    rng = generator_for(0, "factors")
    a, b, m = torch.randn(4, 30, generator=rng), torch.randn(20, 4, generator=rng), torch.randn(4, 4, generator=rng)
    a, b, m = a.double(), b.double(), m.double()
    plain = np.linalg.svd((b @ a).numpy(), compute_uv=False)[:4]
    np.testing.assert_allclose(singular_values(a, b), plain, rtol=1e-12)
    np.testing.assert_allclose(singular_values(m @ a, b @ torch.linalg.inv(m)), plain, rtol=1e-9)
    found = singular_values(torch.randn(4, 3, generator=rng), torch.randn(20, 4, generator=rng))
    assert found.shape == (4,)
    assert float(found[3]) == 0.0


def test_a_layer_of_200_000_by_200_000_is_judged_without_its_product():
    a = torch.zeros(2, 200_000)
    b = torch.zeros(200_000, 2)
    a[0, 7], a[1, 9], b[3, 0], b[5, 1] = 5.0, 1.0, 2.0, 1.0
    np.testing.assert_allclose(singular_values(a, b), [10.0, 1.0])  # its product would take 320 GB


def test_a_product_takes_the_singular_values_it_is_given_and_keeps_its_vectors():
    rng = generator_for(1, "factors")
    a, b = torch.randn(3, 10, generator=rng).double(), torch.randn(8, 3, generator=rng).double()
    made = with_spectrum(a, b, torch.tensor([5.0, 2.0, 1.0]), scale=2.0)
    np.testing.assert_allclose(singular_values(*made, scale=2.0), [5.0, 2.0, 1.0], rtol=1e-12)
    u, _, v = np.linalg.svd((b @ a).numpy(), full_matrices=False)
    np.testing.assert_allclose(2.0 * made[1] @ made[0], u[:, :3] * [5.0, 2.0, 1.0] @ v[:3], atol=1e-12)
    none = with_spectrum(torch.zeros(2, 4), B[:, :2], torch.tensor([5.0, 2.0]))
    assert not (none[1] @ none[0]).any()  # what has no direction gets none


def test_the_model_tells_longer_spectra_from_those_of_clean_adapters():
    drawn = np.random.default_rng(0)
    features = drawn.normal(size=(60, 5))
    features[:, 1] = 3.0  # the same in all: its std counts as 1
    backdoored = np.arange(60) >= 30
    features[backdoored, 0] += 6.0
    scanner = spectral_scan(features, backdoored)
    found = scanner.probability(features)
    assert found[~backdoored].max() < 0.5 < found[backdoored].min()
    assert scanner.std[1] == 1.0
    far = np.array([1e9, 3.0, 0, 0, 0])
    assert scanner.probability(far) == 1.0
    again = spectral_scan(features, backdoored)
    np.testing.assert_array_equal(again.weights, scanner.weights)
