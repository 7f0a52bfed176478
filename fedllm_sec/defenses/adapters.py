"""Rules made for LoRA adapters: Horus judges by the A factors alone, CLAIR by what lies outside the shared subspace."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.deepsight import layer_deltas
from fedllm_sec.defenses.history import upper_bound, within
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


LONGEST = 100.0  # times the median length: as what a longer row counts, so that the others do not vanish beside it
STEPS, CONVERGED = 500, 1e-7  # of the decomposition, and the relative change at which it stops


def low_rank_and_rows(x: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The L and S of least ||L||_* + weight sum_i ||S_i|| with L + S = X: (n, k) float64 each, S_i the rows of S.

    Outlier pursuit (Xu et al. 2010) by augmented Lagrangians: singular values of one, lengths of rows of the other are
    shrunk in turn.
    """
    low, rows, dual = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    size = float(x.norm())
    if size == 0:
        return low, rows
    step = size / (2 * math.sqrt(len(x)))  # of the Lagrangian, in units of x
    for _ in range(STEPS):
        u, s, v = torch.linalg.svd(x - rows + dual, full_matrices=False)
        low = (u * (s - step).clamp_min(0.0)) @ v
        left = x - low + dual
        lengths = left.norm(dim=1, keepdim=True)
        last, rows = rows, left * (1 - weight * step / lengths.clamp_min(1e-300)).clamp_min(0.0)
        gap = x - low - rows
        dual = dual + gap
        if max(float(gap.norm()), float((rows - last).norm())) <= CONVERGED * size:
            break
    return low, rows


def clair(updates: UpdateMatrix, ctx: RoundContext, *, share: float = 0.1, k: float = 3.0) -> Decision:
    """The mean of the clients of whom little lies outside the low-rank part that all share.

    He et al. 2026 (CLAIR, 2605.21217): the clients' rows are split into a low-rank and a block-sparse part, X = L + S,
    a block being a client, by the least ||L||_* + lambda sum_i ||S_i||; a client whose S_i stands out is contaminated.
    Here X is the (n, d) matrix of whole rows, lambda = 3 / (7 sqrt(`share` n)) with `share` the part of the clients
    that may be contaminated (Xu et al. 2010, outlier pursuit; from 9/49 on even n equal rows go to S), and a client is
    kept whose ||S_i|| is at most the median plus `k` times 1.4826 MAD. Both parts are combinations of the rows, so that
    all follows from the (n, n) Gram matrix: two reads, and n x n singular values at most 500 times. In `space: product`
    the rows are products.

    Stated here: the abstract and a line on the method could be looked up; the paper stacks each layer's matrices, and
    refines each client's own model inside the subspace, where this rule has one mean for all. lambda and the bound are
    those of outlier pursuit and of three_sigma. A row longer than 100 median lengths counts as one of that length.
    A row inside the shared subspace passes whatever its sign and length: put norm_clipping before it, and do not use it
    against negated rows (docs/defenses_more.md). Scores are ||S_i||.
    """
    need(0 < share < 9 / 49, "clair", "0 < share < 9/49", "Choose it in that range: from there on what all rows share "
         "counts as contaminated.", share=share)  # fmt: skip
    need(k > 0, "clair", "k > 0", "Raise it.", k=k)
    gram = kernels.gram(updates)
    norms = gram.diagonal().clamp_min(0.0).sqrt()
    middle = midpoint(norms)
    unit = middle if middle > 0 else max(float(norms.max()), torch.finfo(torch.float64).tiny)
    cut = (LONGEST * unit / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    values, vectors = torch.linalg.eigh(cut[:, None] / unit * gram * (cut / unit))
    x = vectors * values.clamp_min(0.0).sqrt()  # (n, n), whose rows have the clients' inner products
    outside = low_rank_and_rows(x, 3 / (7 * math.sqrt(share * updates.n)))[1].norm(dim=1) / cut
    kept = within(outside, upper_bound(outside, k, "robust") + 1e-6)
    return Decision.keep(updates, kept, scores=outside * unit)
