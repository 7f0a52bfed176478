"""Rules made for LoRA adapters: Horus, which judges a client by its A factors alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.deepsight import layer_deltas
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.factors import A_FACTOR
from fedllm_sec.protocols import Decision, RoundContext

LEADING = 5  # singular values of A whose share of its energy is looked at, or half of them where there are fewer


def a_features(a: Tensor, start: Tensor) -> Tensor:
    """Of each client's A (n, r, in): length, share of the leading singular values, cosine with the global A: (n, 3)."""
    squares = torch.linalg.eigvalsh(a @ a.mT).clamp_min(0.0)  # (n, r), the largest last
    leading = squares[:, -min(LEADING, max(1, a.shape[1] // 2)) :].sum(1)
    length, own = squares.sum(1).sqrt(), start.norm()
    tiny = torch.finfo(torch.float64).tiny
    along = (a * start).sum((1, 2)) / (length * own).clamp_min(tiny)
    return torch.stack([length, leading / squares.sum(1).clamp_min(tiny), along], 1)


def deviations(values: Tensor) -> Tensor:
    """|v - median| / (1.4826 MAD) down the columns of (n, k), 0 where half and more of the values are alike: (n, k)."""
    gaps = (values - torch.tensor([midpoint(column) for column in values.T], dtype=torch.float64)).abs()
    spread = 1.4826 * torch.tensor([midpoint(column) for column in gaps.T], dtype=torch.float64)
    return torch.where(spread > 1e-9 * values.abs().amax(0), gaps / spread, 0.0)


def horus(updates: UpdateMatrix, ctx: RoundContext, *, bound: float = 3.0) -> Decision:
    """Drop clients whose A factors stand out, and weigh the others by how far they go the global way.

    Zhang et al. 2025 (Horus, 2508.03579): a poisoning score from the features of LoRA's A alone, since A moves less
    than B under heterogeneity and poisoning alike, then weights by consistency with the global direction. The score
    here is the mean, over layers and three features of A (its length, the share of its leading singular values, its
    cosine with the global A), of |v - median| / (1.4826 MAD); above `bound` a client is dropped. A kept one weighs
    max(0, cos(x_i, g)), with g the server's last step, or the mean of the kept rows where there is none; the
    weights have the sum 1. Where no cosine is positive all kept rows weigh the same (note `fallback`).

    Only the abstract and the caption of the paper's figure on leading singular values could be looked up: which
    features the authors use, their threshold and their weights may be others. Whoever chooses the gauge beats a rule
    that looks at A: of (M A, B M^-1), the same model for every M, he sends the one whose A looks like the others'
    (docs/lora.md). At B = 0, the usual start, A does not move in the first step. Needs A factors, and reads their
    numbers: no `space: product`.
    """
    need(bound > 0, "horus", "bound > 0", "Raise it.", bound=bound)
    updates.need_columns()
    shapes = dict(zip(updates.layout.names, updates.layout.shapes, strict=True))
    factors = {name: place for name, place in updates.layout.slices().items() if A_FACTOR.search(name)}
    need(bool(factors), "horus", "adapters, whose parameters are named ...lora_A...", "Set model.lora, with A trained, "
         "or choose another rule.", first=updates.layout.names[0])  # fmt: skip
    found = []
    for name, place in factors.items():
        start = ctx.global_vector[place].double().cpu().reshape(shapes[name][0], -1)
        a = start + layer_deltas(updates, place).reshape(updates.n, *start.shape)
        found.append(deviations(a_features(a, start)))
    scores = torch.cat(found, 1).mean(1)
    kept = scores <= bound
    share = kept.double() / max(1, int(kept.sum()))
    gram = kernels.gram(updates, extra=ctx.last_update)
    along = gram[:-1, -1] if ctx.last_update is not None else gram @ share
    norms = gram.diagonal()[: updates.n].clamp_min(0.0).sqrt()
    consistent = torch.where(kept & (norms > 0), along / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    weights = consistent.clamp_min(0.0)
    total = float(weights.sum())
    weights = weights / total if total > 0 else share
    return Decision.weighted(updates, weights, kept=kept, scores=scores, notes={"fallback": float(total <= 0)})
