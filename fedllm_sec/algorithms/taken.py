"""How far a round moves what clients and server remember, so that the two stay one mean (scaffold, feddyn)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Taken:
    """What the server took of the n rows that the defense decided on."""

    parts: Tensor  # (n,) float64 in [0, 1]: how much of its row each client remembers
    share: float  # what the round's update weighs in the server's c or h: |S| / N in the papers
    weight: float  # what the row weights add up to: 1 for a mean


def taken(weights: Tensor | None, shares: Tensor) -> Taken:
    """Parts m_i = s w_i / p_i for row weights w (n,) and the clients' shares p (n,) of all clients' mean.

    SCAFFOLD's c is the mean of all clients' c_i, and FedDyn's h that of their g_i: nothing pulls them together again,
    and where they part, the run stands still at a point that is no optimum. The server moves c by s sum_i w_i d_i and
    a client moves its c_i by m_i d_i, so c = sum_i p_i c_i stays true exactly where p_i m_i = s w_i. s is as large as
    it can be with no part above 1. So
    - a uniform mean of |S| of N clients has s = |S| / N and m_i = 1, as in the papers;
    - a mean by counts has s = n_S / n, the cohort's share of all examples, and m_i = 1; where a cap cuts other counts
      in the cohort than it does among all clients, the parts make up for it;
    - a client whose row was rejected remembers nothing, one whose row was clipped to a half remembers a half;
    - where no row weighs anything s and all m_i are 0.
    A rule that gives no weights (median, trimmed mean), or negative ones, counts as the uniform mean: c is then near
    the mean of the c_i, not equal to it.
    """
    if weights is None or not bool((weights >= 0).all()):
        return Taken(torch.ones_like(shares), float(shares.sum()), 1.0)
    ratio = weights.to(shares) / shares
    most = float(ratio.max())
    if most == 0:
        return Taken(torch.zeros_like(shares), 0.0, 0.0)
    return Taken(ratio / most, 1 / most, float(weights.sum()))
