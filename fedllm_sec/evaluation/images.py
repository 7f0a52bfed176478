"""How near reconstructed images are to the true ones: PSNR and SSIM after the best matching of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm_sec.errors import DataError

SIGMA, WIDTH = 1.5, 11  # of SSIM's Gaussian window
K1, K2 = 0.01, 0.03
MOST_DB = 120.0  # a mean squared error of 1e-12, that of float32 on [0, 1]: an exact image has a finite PSNR


def psnr(made: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (n, ...) in [0, 1], each with its partner: (n,), at most 120.

    -10 log10 of the mean squared error. Grey against an image gives about 10 dB, and from 20 dB on a person recognises
    what is shown.
    """
    error = (made.double() - true.double()).square().flatten(1).mean(1)
    return -10 * error.clamp_min(10 ** (-MOST_DB / 10)).log10()


def ssim(made: Tensor, true: Tensor) -> Tensor:
    """Structural similarity of images (n, channels, height, width) in [0, 1], each with its partner: (n,), at most 1.

    Wang et al. 2004: local means, variances and covariance under a Gaussian window of deviation 1.5 and width 11 (less
    where the image is smaller), K1 = 0.01, K2 = 0.03, population moments; the mean over the places where the window
    lies inside the image, and over channels. Written out here, so that scores do not
    hang on another package's defaults.
    """
    if made.ndim != 4 or made.shape != true.shape:
        raise DataError(f"ssim: needs two sets of images (n, channels, height, width), got {tuple(made.shape)}.")
    width = min(WIDTH, *(side - 1 + side % 2 for side in made.shape[-2:]))
    place = torch.arange(width, dtype=torch.float64, device=made.device) - width // 2
    window = torch.exp(-place.square() / (2 * SIGMA**2))
    window = window / window.sum()

    def smooth(images: Tensor) -> Tensor:
        flat = images.double().flatten(0, 1)[:, None]
        return torch.nn.functional.conv2d(
            torch.nn.functional.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1)
        )

    a, b = made.double(), true.double()
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    both = smooth(a * b) - mean_a * mean_b
    like = (2 * mean_a * mean_b + K1**2) * (2 * both + K2**2)
    like = like / ((mean_a**2 + mean_b**2 + K1**2) * (var_a + var_b + K2**2))
    return like.flatten(1).mean(1).view(made.shape[:2]).mean(1)


@dataclass(frozen=True)
class Matched:
    """Each true image with the reconstruction that is its partner: lists in the order of the true images."""

    partner: list[int]
    psnr: list[float]
    ssim: list[float] | None  # None: the inputs are no images of height and width


def matched(made: Tensor, true: Tensor) -> Matched:
    """The one-to-one matching of a batch (n, ...) with the largest sum of PSNR, and each pair's scores.

    The order of a batch leaves no trace in its mean gradient, so that a reconstruction has none. One that found fewer
    or more images than there are is an error.
    """
    if made.shape != true.shape or len(true) == 0:
        raise DataError(f"matched: {tuple(made.shape)} against {tuple(true.shape)}. Give as many images as there are.")
    made, true = made.nan_to_num(0.0).clamp(0, 1), true.clamp(0, 1)
    table = torch.stack([psnr(made, one.expand_as(made)) for one in true])  # (true, made)
    from scipy.optimize import linear_sum_assignment  # a second to import, and no training needs it

    _, columns = linear_sum_assignment(-table.cpu().numpy())
    partner = [int(c) for c in columns]
    own = made[torch.tensor(partner, device=made.device)]
    like = ssim(own, true).tolist() if true.ndim == 4 else None
    return Matched(partner, psnr(own, true).tolist(), like)


def counts_accuracy(found: Tensor, true: Tensor) -> float:
    """The share of a batch's labels that the counts (classes,) name rightly: sum_c min(found_c, true_c) / n.

    n is the larger of both sums: who names four labels of a batch that had one (sizes are drawn under dp_sgd) has not
    named all of them rightly.
    """
    if float(true.sum()) <= 0:
        raise DataError("counts_accuracy: there are no true labels. Give the counts of a batch.")
    return float(torch.minimum(found.to(true), true).sum()) / max(float(true.sum()), float(found.sum()))


def best_median_worst(scores: list[float]) -> dict[str, int]:
    """Places of the best, the (lower) median and the worst score; the first of equals. No other choice is made."""
    if not scores or any(math.isnan(score) for score in scores):
        raise DataError("best_median_worst: needs at least one score, and none that is NaN.")
    order = np.argsort(-np.asarray(scores), kind="stable").tolist()
    return {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
