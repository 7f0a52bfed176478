"""After the server's step: the new global vector to the one that is kept (`ctx.global_vector` is the old)."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.noise import each_value, noise_like, note_noise
from fedllm_sec.protocols import RoundContext


def step_length(vector: Tensor, ctx: RoundContext) -> float:
    """How far the server has moved the model."""
    return float(torch.linalg.vector_norm(vector - ctx.global_vector.to(vector), dtype=torch.float64))


def crfl_bound(
    round: int, d: int, *, rho: float, growth: float = 0.0, sigma: float | None = None, noise: float = 0.05
) -> tuple[float, float]:
    """(rho_t, sigma_t): the length to which crfl clips in a round, and the noise of each of d values."""
    limit = rho + growth * round
    return limit, each_value(noise, limit, d, False) if sigma is None else sigma


def crfl(
    vector: Tensor,
    ctx: RoundContext,
    *,
    rho: float,
    growth: float = 0.0,
    sigma: float | None = None,
    noise: float = 0.05,
    copies: int | None = None,
) -> Tensor:
    """Clip the global vector to rho_t, then add N(0, sigma^2) unless it is the last round (Xie et al. 2021).

    x <- x min(1, rho_t / ||x||) + N(0, sigma^2) with rho_t = rho + growth * t (algorithm 1; the paper's
    MNIST run has rho = 2, growth = 0.1, sigma = 0.01). Without `sigma` the noise has the expected length
    `noise` * rho_t, that is sigma = noise * rho_t / sqrt(d). The vector is all that is trained, so rho must
    leave room for where training starts (LoRA's A is not zero there): in round 1 a warning says if it does not. The
    noise is as long as the paper's beside the model, which may be much beside a step: the record has how much
    (note `crfl_noise_to_step`), and a warning in round 1 says if it is longer.
    The other half of the method is at test time: where classes are told apart, `copies` noisy models vote after the
    last round (unset: 50; 0: none), see `evaluation.certify`. If the run does not say how many rounds it has, every
    round adds noise.
    """
    limit, std = crfl_bound(ctx.round, len(vector), rho=rho, growth=growth, sigma=sigma, noise=noise)
    need(
        0 < limit < math.inf,
        "crfl",
        "rho + growth * round > 0",
        "Raise rho.",
        rho=rho,
        growth=growth,
        round=ctx.round,
    )
    need(sigma is None or sigma >= 0, "crfl", "sigma >= 0", "Set sigma to 0 or more.", sigma=sigma)
    need(noise >= 0, "crfl", "noise >= 0", "Set noise to 0 or more.", noise=noise)
    need(copies is None or copies >= 0, "crfl", "copies >= 0", "Set copies to 0 or more.", copies=copies)
    start = float(torch.linalg.vector_norm(ctx.global_vector, dtype=torch.float64))
    if ctx.round == 1 and start > limit:
        warnings.warn(
            f"crfl: rho={limit:g} is below the length {start:.4g} of the vector that training starts from: what the "
            "model begins with is scaled down before it has learnt anything. Raise rho.",
            stacklevel=2,
        )
    length = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    clipped = vector * min(1.0, limit / length) if length > 0 else vector.clone()
    if ctx.rounds is not None and ctx.round >= ctx.rounds:
        return clipped
    way_out = "Lower noise or sigma, rho with it, or train longer in a round."
    note_noise(ctx, "crfl", std * math.sqrt(len(vector)), step_length(vector, ctx), way_out)
    return clipped + noise_like(vector, std, ctx.rng)


def weak_dp(vector: Tensor, ctx: RoundContext, *, sigma: float = 0.01, absolute: bool = False) -> Tensor:
    """Add N(0, s^2) to the new global vector (Sun et al. 2019).

    With `absolute`, s = `sigma`, whose length grows with sqrt(d) (note `weak_dp_noise_to_step`: how it compares with
    the step). Otherwise the noise has the expected length `sigma` * ||step||, step being the change the server made
    this round. The name is honest: noise this small is no privacy guarantee by
    itself. Which (epsilon, delta) it gives, if any, is said by `Pipeline.privacy`.
    """
    good = sigma >= 0 and math.isfinite(sigma)
    need(good, "weak_dp", "sigma >= 0", "Set sigma to 0 or more.", sigma=sigma)
    step = step_length(vector, ctx)
    std = each_value(sigma, 1.0 if absolute else step, len(vector), absolute)
    note_noise(ctx, "weak_dp", std * math.sqrt(len(vector)), step, "Lower sigma, or leave `absolute` out.")
    return vector + noise_like(vector, std, ctx.rng)
