"""AlignIns: clients whose direction, or whose largest values' signs, agree too much or too little with the others'."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.before import clip_factors
from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.filters import SLACK, magnitude_thresholds, mz_scores
from fedllm_sec.defenses.similarity import cosines
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext


def principal_signs(updates: UpdateMatrix, keep: int) -> Tensor:
    """Of each row's `keep` largest magnitudes, the share whose sign is that of most rows: (n,) float64.

    Values tied with the smallest of them count too, zeros never; a row of zeros has 0.
    """
    _, thresholds = magnitude_thresholds(updates, keep)
    most = kernels.sign_sums(updates).sign()
    agreeing, counted = (torch.zeros(updates.n, dtype=torch.float64) for _ in range(2))
    for place, block in updates.blocks():
        top = (block.abs() >= thresholds[:, None].to(block.device)) & (block != 0)
        counted += top.sum(1).cpu()
        agreeing += (top & (block.sign() == most[place])).sum(1).cpu()
    return agreeing / counted.clamp_min(1.0)


def alignins(
    updates: UpdateMatrix, ctx: RoundContext, *, share: float = 0.3, lambda_c: float = 1.0, lambda_s: float = 1.0
) -> Decision:
    """The clipped mean of the clients that are ordinary in two alignments: with the global vector, and in their signs.

    Xu et al. 2025 (AlignIns, CVPR), algorithm 1. c_i is the cosine of row i with the global vector, s_i the share of
    its floor(share d) largest magnitudes whose sign is the principal one, sign(sum_j sign x_j). A client is kept if its
    MZ-scores |v - median| / std are within `lambda_c` and `lambda_s`; kept rows are clipped to their median norm; the
    mean of these. Nobody kept is the zero update.

    Stated here: the std is that of n, not n - 1, values, as in the authors' code, and 0 gives a score of 0; a score
    equal to its bound passes, so that two clients are never both dropped; of tied magnitudes all count and zeros never
    do. A global vector of zero has a cosine of 0 with everybody. With adapters c_i is about the factors' numbers, which
    another gauge changes (docs/lora.md). Scores are the larger of the two scores, each divided by its bound.
    """
    need(0 < share <= 1, "alignins", "0 < share <= 1", "Choose it in that range.", share=share)
    bounds_hold = lambda_c > 0 and lambda_s > 0
    need(bounds_hold, "alignins", "lambdas > 0", "Raise them.", lambda_c=lambda_c, lambda_s=lambda_s)
    updates.need_columns()
    gram = kernels.gram(updates, extra=ctx.global_vector)
    signs = principal_signs(updates, max(1, int(share * updates.d)))
    scores = mz_scores(torch.stack([cosines(gram)[:-1, -1], signs], 1))
    scores /= torch.tensor([lambda_c, lambda_s], dtype=torch.float64)
    kept = (scores <= SLACK).all(1)
    weights = torch.zeros(updates.n, dtype=torch.float64)
    if bool(kept.any()):
        norms = gram.diagonal()[:-1].clamp_min(0.0).sqrt()[kept]
        weights[kept] = clip_factors(norms, midpoint(norms)) / int(kept.sum())
    return Decision.weighted(updates, weights, kept=kept, scores=scores.amax(1))
