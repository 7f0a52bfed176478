"""How exposed a secret is among all that it could have been."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedllm_sec.errors import FedError


def rank(losses: NDArray[np.float64], secret: int) -> float:
    """The place of a secret among all guesses by their loss, from 1; guesses of the same loss share their places."""
    if not np.isfinite(losses).all():
        raise FedError("exposure: the losses of some guesses are not finite. Observe another client.")
    own = losses[secret]
    return 1 + float((losses < own).sum()) + (float((losses == own).sum()) - 1) / 2


def exposure(losses: NDArray[np.float64], secret: int) -> float:
    """log2 of the number of guesses, less log2 of the secret's rank: from 0 to log2(guesses) bits.

    A model that never saw it gives 1.44 = log2 e bits on average (Carlini et al. 2019, def. 4).
    """
    return math.log2(len(losses)) - math.log2(rank(losses, secret))
