"""Inverting gradients, and deltas of several steps: cosine distance and total variation, by signed Adam."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedllm_sec.attacks.privacy.gradients import (
    cosine_distance,
    made_from,
    need_unrollable,
    rows_to_find,
    total_variation,
)
from fedllm_sec.attacks.privacy.reveal import reveal
from fedllm_sec.attacks.privacy.seen import Observation, Reconstruction, as_gradient, need_finite
from fedllm_sec.errors import AttackError
from fedllm_sec.seeds import generator_for


def invert_gradient(
    seen: Observation, labels: Tensor | None = None, *, iterations: int = 500, lr: float = 0.1,
    smoothness: float = 1e-3, restarts: int = 1, seed: int = 0,
) -> Reconstruction:  # fmt: skip
    """Images in [0, 1] whose gradient, or unrolled delta, points the way of the one sent.

    Geiping et al. 2020: minimise 1 - cos(made, sent) + `smoothness` TV(x) over x in [0, 1] by Adam on the sign of the
    slope, `lr` falling to a thousandth. The cosine does not see the length, so clipping to a norm does not hinder it.
    `labels` (n,), if not known, are first revealed (`reveal_labels`); their order among the rows is free. A delta of
    several SGD steps is unrolled (sec. 6.1): batch t holds the rows t b to t b + b - 1 of the result. Deviations: the
    learning rate falls along a cosine, not in three steps; the start is grey, 0.5 + N(0, 0.1^2); the best iterate is
    kept. `loss` is the objective. Pooling and ReLU lose information: an image of `lenet` comes back blurred.
    """
    need_finite(seen)
    if seen.what == "delta" and seen.steps == 1 and seen.plain_sgd:
        seen = as_gradient(seen)[0]
    if seen.what == "delta":
        need_unrollable(seen)
    n = rows_to_find(seen)
    if labels is None:
        counts = reveal(seen, n)
        labels = torch.arange(len(counts)).repeat_interleave(counts)
    if len(labels) != n:
        raise AttackError(f"invert_gradient: {len(labels)} labels for {n} rows. Give one for each row.")
    network, target = seen.network(), list(seen.parts().values())
    best: tuple[float, Tensor, float] | None = None
    for start in range(restarts):
        rng = generator_for(seed, "invert_gradient", start)
        x = (0.5 + 0.1 * torch.randn(n, *seen.shape, generator=rng)).clamp(0, 1).to(seen.sent.device).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=lr)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=lr * 1e-3)
        for _ in range(iterations):
            distance = cosine_distance(made_from(seen, network, x, labels), target)
            value = distance + smoothness * total_variation(x)
            now = float(value.detach())
            if not math.isfinite(now):
                break
            if best is None or now < best[0]:
                best = now, x.detach().clone(), float(distance.detach())
            x.grad = torch.autograd.grad(value, x)[0].sign()
            optimizer.step()
            falling.step()
            with torch.no_grad():
                x.clamp_(0, 1)
    if best is None:
        raise AttackError("invert_gradient: the objective was never finite. The model or what was sent is too large.")
    return Reconstruction(best[1], labels.clone(), best[0], {"cosine_distance": best[2]})
