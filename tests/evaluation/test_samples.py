"""The distance of generated to real images, worked by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedllm_sec.evaluation.samples import Features, SampleEvaluation, frechet

POINTS = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_frechet_of_gaussians_on_the_axes_is_known():
    """Variances a and b, means m apart: m^2 + sum (sqrt a - sqrt b)^2."""
    white = (POINTS - POINTS.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(POINTS.T))).T
    moved = white * torch.tensor([3.0, 1.0]) + torch.tensor([0.0, 2.0])
    assert frechet(white, white) == pytest.approx(0, abs=1e-9)
    assert frechet(white, moved) == pytest.approx(2.0**2 + (3.0 - 1.0) ** 2)
    assert frechet(moved, white) == pytest.approx(8.0)


def test_features_keep_what_varies_most():
    images = torch.zeros(200, 1, 2, 2)
    images[:, 0, 0, 0] = torch.linspace(-1, 1, 200)
    features = Features.of(images, components=1)
    assert features(images).square().sum().item() == pytest.approx(images.square().sum().item(), rel=1e-6)


def test_the_loss_is_0_for_the_real_images_and_1_for_their_mean():
    images = torch.rand(60, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    features = Features.of(images)
    evaluation = SampleEvaluation(features, features(images), torch.arange(60)[:, None].float(), batch_size=25)

    def here(batches, width, score):
        return torch.cat([score(b) for b in batches])

    real = SimpleNamespace(samples=lambda noise: images[noise[:, 0].long()])
    mean = SimpleNamespace(samples=lambda noise: images.mean(0).expand(len(noise), -1, -1, -1))
    assert evaluation.quality(real, here)["loss"] == pytest.approx(0, abs=1e-6)
    assert evaluation.quality(mean, here)["loss"] == pytest.approx(1, rel=1e-4)
    assert evaluation.attack(real, here) is None
    broken = SimpleNamespace(samples=lambda noise: torch.full((len(noise), 1, 3, 3), float("nan")))
    assert evaluation.quality(broken, here)["loss"] != evaluation.quality(broken, here)["loss"]  # nan
