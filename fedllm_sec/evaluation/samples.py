"""How far generated images are from real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.evaluation.repeatable import Repeatable

COMPONENTS = 32


@dataclass(frozen=True)
class Features:
    """The principal components of real images: coordinates in which differences are measured."""

    mean: Tensor  # (pixels,)
    axes: Tensor  # (pixels, k)

    @classmethod
    def of(cls, images: Tensor, components: int = COMPONENTS) -> Features:
        """The first components of images (n, ...), by eigenvectors of their covariance."""
        flat = images.flatten(1).double()
        mean = flat.mean(0)
        _, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean))
        return cls(mean, vectors[:, -min(components, flat.shape[1]) :])

    def __call__(self, images: Tensor) -> Tensor:
        """Coordinates of images: (n, k) float64 on the CPU."""
        return (images.flatten(1).double().cpu() - self.mean) @ self.axes


def frechet(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of points (n, k), as if both were Gaussian.

    Dowson and Landau 1982; Heusel et al. 2017 use it on the features of a network (FID).
    """
    root = _root(torch.cov(a.T))
    middle = _root(root @ torch.cov(b.T) @ root)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return float(gap + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * middle.trace())


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric matrix without negative eigenvalues (rounding aside)."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


@dataclass
class SampleEvaluation:
    """Fixed noise, and the held-out images that samples are compared with.

    The loss is the Frechet distance over the total variance of the real images, in their first 32 principal
    components: 0 for the same distribution, 1 for a generator that always gives the mean image, nan where an image is
    not finite.
    """

    features: Features
    real: Tensor  # (n, k) coordinates of held-out images
    noise: Tensor  # (samples, noise)
    batch_size: int

    def quality(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any]:
        batches = torch.split(torch.arange(len(self.noise)), self.batch_size)
        drawn = Repeatable(
            lambda at: self.features(task.samples(self.noise[at])), ("samples", self.noise, self.features)
        )
        made = spread(batches, self.real.shape[1], drawn)
        finite = bool(made.isfinite().all())
        distance = frechet(made, self.real) / float(torch.cov(self.real.T).trace()) if finite else float("nan")
        nothing = dict.fromkeys(("perplexity", "accuracy", "per_class", "exact_match", "token_overlap"))
        return {"loss": distance, **nothing}

    def attack(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any] | None:
        """A generator is harmed, not steered: what an attack does to it stands in `quality`."""
        return None
