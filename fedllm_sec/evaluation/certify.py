"""CRFL's second half: inference smoothed over the parameters, and the certified radius (Xie et al. 2021).

The smoothed classifier answers with the class that most noisy copies of the model, x + N(0, sigma^2), vote
for. If the vote is clear enough, the answer provably stays the same under any backdoor whose size is below
the radius, given how the attackers train and how the server clipped and perturbed since.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm_sec.errors import FedError


def smoothed_votes(
    predict: Callable[[Tensor], Tensor],
    vector: Tensor,
    *,
    sigma: float,
    copies: int,
    classes: int,
    rng: torch.Generator,
) -> Tensor:
    """How many of `copies` noisy models answer each class: (inputs, classes) int64.

    `predict` maps a global vector (d,) to one class per input, (inputs,) int64. `sigma` is the noise of the
    last round.
    """
    if copies < 1 or sigma < 0:
        raise FedError(f"certify: needs copies >= 1 and sigma >= 0, got copies={copies}, sigma={sigma}. Change them.")
    votes: Tensor | None = None
    for _ in range(copies):
        noise = torch.randn(vector.shape, generator=rng, device=rng.device).to(vector)
        answers = predict(vector + sigma * noise).to(torch.int64).cpu()
        if votes is None:
            votes = torch.zeros(len(answers), classes, dtype=torch.int64)
        votes[torch.arange(len(answers)), answers] += 1
    assert votes is not None
    return votes


def vote_bounds(votes: Tensor, *, alpha: float = 0.001) -> tuple[Tensor, Tensor, Tensor]:
    """The winning class, a lower bound of its probability, an upper bound of the next one's: three (inputs,).

    Hoeffding's bound, each side at level alpha (as in the paper's experiments). Where the lower is not above the upper
    one there is nothing to certify.
    """
    copies = votes.sum(dim=1).to(torch.float64)
    order = votes.topk(min(2, votes.shape[1]), dim=1)
    slack = torch.sqrt(math.log(1 / alpha) / (2 * copies))
    first = order.values[:, 0].to(torch.float64) / copies
    second = order.values[:, 1].to(torch.float64) / copies if votes.shape[1] > 1 else torch.zeros_like(first)
    return order.indices[:, 0], (first - slack).clamp_min(0.0), (second + slack).clamp_max(1.0)


@dataclass(frozen=True)
class Attacker:
    """How strongly one attacker's poisoned examples reach the global vector."""

    weight: float  # p_i, its weight in the mean
    scale: float  # gamma_i, by how much it scales its update
    steps: int  # tau_i, local steps
    lr: float  # eta_i
    poisoned_share: float  # q_i / n_i, poisoned examples in a batch


def logistic_lipschitz(rho: float, length: float = 1.0, stretch: float = 1.0) -> float:
    """L_Z of multi-class logistic regression: how fast its loss gradient (p - y) z changes with an example (x, y).

    For inputs z of at most `length` and parameters of at most `rho`; a change of x changes z by at most `stretch` times
    its size. sqrt(stretch^2 a^2 + length^2) with a = 1 + rho length, which is the paper's sqrt(2 + 2 rho + rho^2) for
    lengths of 1; a is sqrt(2) + rho length / 2 where that is more (|p - y| <= sqrt(2), and softmax has a Jacobian of
    norm <= 1/2).
    """
    a = max(1 + rho * length, math.sqrt(2) + rho * length / 2)
    return math.hypot(stretch * a, length)


def certified_radius(
    lower: float,
    upper: float,
    *,
    attackers: Sequence[Attacker],
    lipschitz: float,
    sigma: float,
    later: Sequence[tuple[float, float]],
) -> float:
    """The largest size ||delta|| of a backdoor that cannot change the smoothed answer; 0 where there is none.

    sqrt(-ln(1 - (sqrt(p_A) - sqrt(p_B))^2) sigma^2
         / (2 R L^2 sum_i (p_i gamma_i tau_i eta_i q_i / n_i)^2 prod_t (2 Phi(rho_t / sigma_t) - 1)))
    (Xie et al. 2021), for R attackers who act in one round with noise `sigma`; `later` lists
    (rho_t, sigma_t) of every round after it, the last with the noise of the smoothed inference. `lipschitz`
    bounds how fast the gradient of the loss changes with the example. It is known for logistic regression,
    not for a transformer: for a language model only the vote itself means something.
    """
    if not 0 <= upper <= 1 or not 0 <= lower <= 1:
        raise FedError(f"certify: needs probabilities in [0, 1], got lower={lower}, upper={upper}. Use vote_bounds.")
    if not attackers or lipschitz <= 0 or sigma <= 0 or any(rho <= 0 or s <= 0 for rho, s in later):
        raise FedError(
            "certify: needs at least one attacker and positive lipschitz, sigma, rho_t and sigma_t, "
            f"got {len(attackers)} attackers, lipschitz={lipschitz}, sigma={sigma}, later={list(later)[:3]}."
        )
    if lower <= upper:
        return 0.0
    gap = (math.sqrt(lower) - math.sqrt(upper)) ** 2
    reach = sum((a.weight * a.scale * a.steps * a.lr * a.poisoned_share) ** 2 for a in attackers)
    contraction = math.prod(math.erf(rho / (s * math.sqrt(2))) for rho, s in later)  # 2 Phi(x) - 1
    spread = 2 * len(attackers) * lipschitz**2 * reach * contraction
    if gap >= 1 or spread == 0:
        return math.inf
    return math.sqrt(-math.log1p(-gap) * sigma**2 / spread)
