"""Spectral scan of adapters: five statistics of each product's singular values, and a logistic model of them.

The statistics of (A, B) are those of s B A, whatever its gauge. The model judges adapters of one base, rank and choice
of layers, by clean and backdoored ones that somebody has trained for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm_sec.models.products import singular_values

STATISTICS = ("leading", "frobenius", "concentration", "entropy", "kurtosis")


def statistics(values: Tensor) -> Tensor:
    """`STATISTICS` of singular values (..., r): (..., 5), zeros where all of them are zero.

    The largest s_1, the length sqrt(sum s_i^2), the share s_1^2 / sum s_i^2, the entropy -sum p_i log p_i of the shares
    p_i = s_i^2 / sum s_j^2 in nats, and the kurtosis m_4 / m_2^2 of the r values (0 where they are all the same).
    """
    tiny = torch.finfo(torch.float64).tiny
    squares = values.double().square()
    total = squares.sum(-1, keepdim=True)
    shares = squares / total.clamp_min(tiny)
    gaps = values.double() - values.double().mean(-1, keepdim=True)
    spread = gaps.square().mean(-1)
    alike = spread <= 1e-24 * squares.amax(-1)
    kurtosis = torch.where(alike, 0.0, gaps.pow(4).mean(-1) / spread.square().clamp_min(tiny))
    leading = values.double().amax(-1)
    entropy = torch.special.entr(shares).sum(-1)
    return torch.stack([leading, total[..., 0].sqrt(), shares.amax(-1), entropy, kurtosis], -1)


def spectral_features(pairs: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float]) -> np.ndarray:
    """The statistics of each pair (A, B) of an adapter with its alpha / r, one after another: (5 k,) float64."""
    found = [statistics(singular_values(a, b, scale)) for (a, b), scale in zip(pairs, scales, strict=True)]
    return torch.cat(found).numpy()


@dataclass(frozen=True)
class Scanner:
    """A fitted logistic model: sigmoid(weights . (features - mean) / std + intercept)."""

    mean: np.ndarray  # (k,) of the clean adapters' features
    std: np.ndarray  # (k,) of them, 1 where they are all the same
    weights: np.ndarray  # (k,)
    intercept: float

    def deviations(self, features: np.ndarray) -> np.ndarray:
        """How many standard deviations of the clean each feature lies from their mean: (..., k)."""
        return (features - self.mean) / self.std

    def probability(self, features: np.ndarray) -> np.ndarray:
        """That an adapter with these features (..., k) is backdoored: (...,)."""
        at = self.deviations(features) @ self.weights + self.intercept
        return 0.5 * (1 + np.tanh(0.5 * at))  # the sigmoid, which does not overflow


def spectral_scan(features: np.ndarray, backdoored: np.ndarray, *, strength: float = 1.0) -> Scanner:
    """A logistic model of features (n, k) of adapters of one base, of which it is known which are backdoored (n,).

    Puertolas Merenciano et al. 2026 (2602.15195): five statistics of the singular values of each adapted matrix's
    update (leading singular value, Frobenius norm, energy concentration, spectral entropy, kurtosis), z-scores against
    clean adapters of the same base, a logistic regression. It reads weights alone: no rows, no trigger, no model run.
    `strength` is scikit-learn's C, the inverse of the L2 penalty; the fit is deterministic.

    Stated here: pages that tell of the paper were read, its formulas could not be looked up. The entropy's and the
    concentration's shares are of squares, the kurtosis is that of the singular values, m_4 / m_2^2. The paper scans the
    four attention projections, 20 numbers; here every adapted matrix counts for itself. The statistics see singular
    values and no singular vectors: whoever gives a backdoored adapter the singular values of a clean one is
    indistinguishable from it (docs/lora.md).
    """
    from sklearn.linear_model import LogisticRegression

    clean = features[~backdoored]
    mean, std = clean.mean(0), clean.std(0)
    std = np.where(std > 1e-12 * np.abs(mean).clip(1e-300), std, 1.0)
    fitted = LogisticRegression(C=strength, max_iter=10_000).fit((features - mean) / std, backdoored)
    return Scanner(mean, std, fitted.coef_[0], float(fitted.intercept_[0]))
