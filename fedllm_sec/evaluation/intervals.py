"""How sure a counted rate is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from fedllm_sec.errors import FedError


def wilson(successes: int, n: int, confidence: float = 0.95) -> dict[str, float] | None:
    """The rate successes / n with its Wilson score interval: {value, low, high, n}, or None for n = 0.

    With p = successes / n and z the normal quantile of (1 + confidence) / 2, the limits are
    (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2/n).

    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= successes <= n:
        raise FedError(f"wilson: successes must lie between 0 and n, got successes={successes}, n={n}.")
    if not 0.0 < confidence < 1.0:
        raise FedError(f"wilson: confidence must lie between 0 and 1, got {confidence}. Use 0.95 for 95 %.")
    if n == 0:
        return None
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    p = successes / n
    shrink = 1.0 + z * z / n
    middle = (p + z * z / (2.0 * n)) / shrink
    half = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)) ** 0.5 / shrink
    # At p = 0 and p = 1 one limit equals p exactly; rounding must not put it past the rate it is about.
    return {
        "value": p,
        "low": max(0.0, min(middle - half, p)),
        "high": min(1.0, max(middle + half, p)),
        "n": n,
    }


def bootstrap(values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of independent values, such as one for each seed.

    The quantiles (1 -+ confidence) / 2 of the means of `resamples` draws with replacement, from a fixed seed.
    Two values give nothing but their range; few values give an interval that is too short. A value that is not finite
    makes the limits NaN.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", ch. 13.
    """
    if len(values) == 0:
        raise FedError("bootstrap: needs at least one value, got none.")
    if not 0.0 < confidence < 1.0:
        raise FedError(f"bootstrap: confidence must lie between 0 and 1, got {confidence}. Use 0.95 for 95 %.")
    given = np.asarray(values, dtype=np.float64)
    if not np.isfinite(given).all():
        return float("nan"), float("nan")
    means = given[np.random.default_rng(0).integers(len(given), size=(resamples, len(given)))].mean(axis=1)
    low, high = np.quantile(means, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return float(low), float(high)
