"""Rules that trust one vector: the server's own update on a small clean set, or one client's row."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import lowest, need, need_f
from fedllm_sec.defenses.filters import mask_of
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext

NO_ROOT = "the server's own update on clean data (root_update), and there is none this round"


def root_of(updates: UpdateMatrix, ctx: RoundContext, rule: str, way_out: str) -> Tensor:
    """The server's own update (d,), or the reason why the rule cannot act."""
    root = ctx.root_update
    if root is None:
        raise DefenseError(f"{rule}: needs {NO_ROOT}. {way_out}")
    need(root.shape == (updates.d,), rule, f"a root_update of d={updates.d} values", "", got=tuple(root.shape))
    need(bool(root.isfinite().all()), rule, "a finite root_update", "Check the clean data.", finite=False)
    return root


def trust_weights(dots: Tensor, norms: Tensor, root_norm: float) -> tuple[Tensor, Tensor]:
    """Row weights and trust scores relu(cos(x_i, g0)), both (n,); all weights are 0 if nobody is trusted."""
    tiny = torch.finfo(torch.float64).tiny
    cosine = torch.where(norms > 0, dots / norms.clamp_min(tiny) / max(root_norm, tiny), 0.0)
    trust = cosine.clamp(0.0, 1.0)
    total = float(trust.sum())
    if total == 0.0:
        return torch.zeros_like(trust), trust
    return torch.where(trust > 0, trust / total * root_norm / norms.clamp_min(tiny), 0.0), trust


def beside_vector(updates: UpdateMatrix, vector: Tensor) -> tuple[Tensor, Tensor, float, Tensor]:
    """<x_i, v>, |x_i|, |v| and |x_i - v| for one vector (d,), (n,) float64, in one read of rows that have columns."""
    fast = None if updates.products is not None else kernels.for_rules(updates)
    if fast is not None:
        flat = vector.detach().to("cpu", torch.float32).contiguous()
        own, dots, other, apart, _ = fast.beside(updates, [flat] * updates.n).unbind(1)
        return dots, own.sqrt(), float(other[0].sqrt()), apart.sqrt()
    found = kernels.geometry(updates, extra=vector)
    return found.gram[:-1, -1], found.norms[:-1], float(found.norms[-1]), found.sq_distances[:-1, -1].sqrt()


def fltrust(updates: UpdateMatrix, ctx: RoundContext) -> Decision:
    """sum_i TS_i (|g0| / |x_i|) x_i / sum_i TS_i with TS_i = relu(cos(x_i, g0)), g0 the server's own update.

    Cao et al. 2021, algorithm 2. g0 is `ctx.root_update`, trained by the server on its small clean set. Where
    no row has a positive cosine with g0 (all zero rows among them) the paper's quotient is 0 / 0; the update
    is then g0 itself (note `root_only` = 1). A g0 of zero gives the zero update. Scores are 1 - TS_i.
    """
    way_out = "Set defense.root_rows, the clean rows the server holds (root_update in a call), or choose another rule."
    root = root_of(updates, ctx, "fltrust", way_out)
    dots, norms, root_norm = beside_vector(updates, root)[:3]
    weights, trust = trust_weights(dots, norms, root_norm)
    if float(trust.sum()) == 0.0:
        return Decision(root.float().clone(), weights, trust > 0, 1 - trust, {"root_only": 1.0})
    return Decision.weighted(updates, weights, kept=trust > 0, scores=1 - trust, notes={"root_only": 0.0})


def monna(updates: UpdateMatrix, ctx: RoundContext, *, f: int, trusted: str | None = None) -> Decision:
    """The mean of the n - f rows nearest to a trusted one, itself included (Farhadkhani et al. 2023, MoNNA).

    In the paper each worker trusts its own vector. Here the trusted row is that of the client `trusted`; if
    no client is named it is the server's own update, which then counts as one row more: the mean is over it
    and the n - f client rows nearest to it. Scores are distances to the trusted vector, weights
    those of the clients' rows.
    """
    n = updates.n
    need_f("monna", n, f, n >= 2 * f + 1, "n >= 2f + 1 clients")
    way_out = (
        "Set trusted to a client id, or defense.root_rows, the clean rows the server holds (root_update in a call)."
    )
    if trusted is None:
        root = root_of(updates, ctx, "monna", way_out)
        distances = beside_vector(updates, root)[3]
        kept = mask_of(lowest(distances, n - f, updates.ids), n)
        weights = torch.cat([kept.double(), torch.ones(1, dtype=torch.float64)]) / (n - f + 1)
        return Decision(kernels.combine(updates, weights, extra=root), weights[:-1], kept, distances)
    if trusted not in updates.ids:
        raise DefenseError(
            f'monna: the trusted client "{trusted}" sent no usable row this round. Name one that takes part '
            "in every round, or leave trusted out and set defense.root_rows."
        )
    centre = updates.ids.index(trusted)
    distances = kernels.sq_distances(updates)[centre].sqrt()
    ranked = distances.clone()
    ranked[centre] = -1.0  # duplicates of the trusted row must not push it out
    kept = mask_of(lowest(ranked, n - f, updates.ids), n)
    return Decision.keep(updates, kept, scores=distances)
