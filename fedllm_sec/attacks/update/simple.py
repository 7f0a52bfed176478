"""Byzantine rows that need no view of the cohort."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.attacks.update.sight import median_norm, noisy, random_directions, repeat
from fedllm_sec.attacks.update.weights import Weighing, row_weights, server_lr
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.updates import new_rows
from fedllm_sec.protocols import ThreatView


def need_positive(value: float, place: str) -> None:
    """A strength must be a positive, finite number."""
    if not (math.isfinite(value) and value > 0):
        raise AttackError(f"{place}: {value}: must be a positive number.")


def scaled(rows: Tensor, factor: float | Tensor) -> Tensor:
    """rows (m, d) times a number, or one for each row (m, 1), in new float32 memory."""
    number = torch.as_tensor(factor, dtype=torch.float32, device=rows.device)
    return torch.mul(rows.float(), number, out=new_rows(*rows.shape, device=rows.device))


def byzantine_zero(view: ThreatView) -> Tensor:
    """The zero update: the client adds nothing and drags the mean towards no progress. Not zero weights."""
    return repeat(torch.zeros(view.own.shape[1], device=view.own.device), len(view.own))


def byzantine_random(view: ThreatView, *, scale: float | None = None, absolute: bool = False) -> Tensor:
    """A random direction of length `scale` (default 10) times the median honest length, another for each attacker.

    Blanchard et al. 2017, sec. 5, draw N(0, 200^2), a number without meaning for other models; ours follows the data.
    Coordinates are uniform in [-1, 1] and scaled to that length; with `absolute` they are just times `scale` (default
    1). Lengths are those of the honest rows where knowledge grants them, else of the attackers' own.
    """
    factor = scale if scale is not None else (1.0 if absolute else 10.0)
    need_positive(factor, "byzantine_random.scale")
    m, d = view.own.shape
    if absolute:
        return random_directions(m, d, None, view.rng, view.own.device).mul_(factor)
    return random_directions(m, d, factor * median_norm(view), view.rng, view.own.device)


def byzantine_flip(view: ThreatView, *, scale: float = 1.0) -> Tensor:
    """The negated update, -scale * own: the weights 2 w_g - w_local of the literature when scale is 1."""
    need_positive(scale, "byzantine_flip.scale")
    return scaled(view.own, -scale)


def gaussian(view: ThreatView, *, scale: float = 10.0) -> Tensor:
    """The own update under normal noise whose expected length is `scale` times the median honest length.

    Per coordinate the noise has the standard deviation scale * median length / sqrt(d) (Xie et al. 2018,
    sec. 5, with an absolute one).
    """
    need_positive(scale, "gaussian.scale")
    m, d = view.own.shape
    return noisy(view.own, [scale * median_norm(view) / math.sqrt(d)] * m, view.rng)


def inf_nan(view: ThreatView, *, value: Literal["nan", "inf", "-inf", "mixed"] = "mixed", share: float = 1.0) -> Tensor:
    """Rows that are not numbers, in a random `share` of the coordinates: a test of the server's screening.

    `mixed` draws from all three values. Not finite on purpose.
    """
    if not 0 < share <= 1:
        raise AttackError(f"inf_nan.share: {share}: must be more than 0 and at most 1.")
    d = view.own.shape[1]
    values = [float("nan"), float("inf"), float("-inf")] if value == "mixed" else [float(value)]
    rows = view.own.float().clone()
    count = max(1, round(share * d))
    for row in rows:
        at = torch.randperm(d, generator=view.rng, device=view.rng.device)[:count].to(rows.device)
        which = torch.randint(len(values), (count,), generator=view.rng, device=view.rng.device).to(rows.device)
        row[at] = torch.tensor(values)[which.cpu()].to(rows.device)
    return rows


def model_replacement(
    view: ThreatView,
    *,
    gamma: float | None = None,
    max_norm: float | None = None,
    weights: Weighing = "counts",
) -> Tensor:
    """The own (backdoored) update scaled up so that it survives averaging (Bagdasaryan et al. 2020, sec. 4.2).

    Attacker i sends gamma_i * own_i. By default gamma_i = W / (m w_i eta), with w_i what the server's mean weighs its
    row by, W the sum of all rows' weights and eta the server's learning rate: the model then moves by the mean of the m
    backdoored updates plus what the honest rows add, so it is replaced. Equal weights and one attacker give the paper's
    gamma = n / eta. `weights` are those of the rule `mean`, which stands where there is no defense: `counts`, claims
    capped at 3 median claims (what is not granted of them is assumed, see docs/attacks.md), or `uniform`. A number for
    gamma is taken as it is. `max_norm` bounds the length to that many median honest lengths, the paper's
    train-and-scale with S = max_norm * median: gamma becomes S / ||own|| where that is smaller. Constrain-and-scale is
    this attack after the local rule `constrain_and_scale`. An own update that is benign makes this a boosted benign
    client: give the attackers poisoned data. FedNova's factors for clients of more or fewer steps are not undone.
    """
    own = view.own.float()
    if gamma is None:
        known = row_weights(view, weights, "model_replacement")
        total = float(known.own.sum()) + known.others
        factors = total / (len(own) * known.own * server_lr(view, "model_replacement"))  # (m,)
    else:
        need_positive(gamma, "model_replacement.gamma")
        factors = torch.full((len(own),), gamma, dtype=torch.float64)
    if max_norm is not None:
        need_positive(max_norm, "model_replacement.max_norm")
        lengths = kernels.row_norms(UpdateMatrix.of(own)).clamp_min(torch.finfo(torch.float64).tiny)
        factors = factors.minimum(max_norm * median_norm(view) / lengths)
    return scaled(own, factors[:, None])
