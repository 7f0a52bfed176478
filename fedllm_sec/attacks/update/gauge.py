"""A LoRA adapter that is the same model in other numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.attacks.update.hiding import hidden
from fedllm_sec.attacks.update.search import received
from fedllm_sec.attacks.update.simple import need_positive
from fedllm_sec.errors import AttackError, DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.factors import Products, lora_pairs
from fedllm_sec.matrix.updates import new_rows
from fedllm_sec.protocols import ThreatView


def lora_gauge(
    view: ThreatView,
    *,
    factor: float = 10.0,
    kind: Literal["scale", "rotate", "shear", "hide"] = "scale",
    condition: float = 100.0,
) -> Tensor:
    """The own update with every A turned into M A and every B into B M^-1: B A, the model, does not change.

    Rows are deltas, so A's part becomes M (A_g + dA) - A_g and B's (B_g + dB) M^-1 - B_g. Rules that compare raw
    factors see other lengths and distances, and averaging A and B apart from each other is no longer averaging B A.
    What stands beside the factors (DoRA's lengths, modules that are trained whole) stays as it is: the model is the
    same with them too. Not from a paper: it is LoRA's own gauge freedom (Hu et al. 2022, sec. 4.1). M is by `kind`

    - scale: `factor` times the identity;
    - rotate: a random rotation, which leaves the length of every factor as it was (one of rank 1 changes its sign);
    - shear: 1 on the diagonal, random numbers of length `factor` above it; needs rank 2;
    - hide: the M that brings the row as near as it can to the row the others send, of a condition of at most
      `condition`. Own rows alone (knowledge: own) are hidden near the global model; with the cohort's near its mean;
      who knows the defense too tries conditions up to `condition` and takes the one that gets most weight.
    """
    need_positive(factor, "lora_gauge.factor")
    if kind == "scale":
        return _scaled(view, factor)
    if not condition > 1:
        raise AttackError(f"lora_gauge.condition: {condition}: must be above 1, which allows no other gauge.")
    try:
        products = Products.of(view.layout, view.global_vector.float())
    except DefenseError as error:
        raise AttackError(f"lora_gauge: {error}") from error
    if kind == "hide":
        return _hidden(view, products, condition)
    if kind == "shear" and all(pair.rank == 1 for pair in products.pairs):
        raise AttackError("lora_gauge.kind: shear: adapters of rank 1 have nothing to shear. Use scale or hide.")
    start, rows = view.global_vector.float()[None], view.own.float().clone()
    for pair in products.pairs:
        m = torch.stack([_drawn(kind, pair.rank, factor, view.rng) for _ in rows]).to(rows.device)
        a0, b0 = pair.wide(start), pair.tall(start)
        rows[:, pair.a] = (m @ (a0 + pair.wide(rows)) - a0).flatten(1).float()
        rows[:, pair.b] = ((b0 + pair.tall(rows)) @ torch.linalg.inv(m) - b0).flatten(1).float()
    return _finite(rows, f"lora_gauge.factor: {factor}")


def _scaled(view: ThreatView, factor: float) -> Tensor:
    if factor == 1.0:
        raise AttackError("lora_gauge.factor: 1 changes nothing. Choose another factor.")
    pairs = lora_pairs(view.layout)
    if not pairs:
        raise AttackError(
            f"lora_gauge: found no pair ...lora_A...weight / ...lora_B...weight among {len(view.layout.names)} "
            f"parameters (first: {view.layout.names[0]!r}). Train both factors of an adapter."
        )
    places = view.layout.slices()
    own, start = view.own.float(), view.global_vector.float()
    scale = torch.ones_like(start)
    for a, b in pairs:
        scale[places[a]], scale[places[b]] = factor, 1 / factor
    rows = torch.addcmul(start * (scale - 1), own, scale, out=new_rows(*own.shape, device=own.device))
    return _finite(rows, f"lora_gauge.factor: {factor}")


def _finite(rows: Tensor, place: str) -> Tensor:
    if not bool(kernels.row_norms(UpdateMatrix.of(rows)).isfinite().all()):
        raise AttackError(f"{place}: the changed factors are no longer finite. Lower it.")
    return rows


def _drawn(kind: str, rank: int, factor: float, rng: torch.Generator) -> Tensor:
    """A random M (r, r), in float64."""
    noise = torch.randn(rank, rank, generator=rng, device=rng.device, dtype=torch.float64).cpu()
    if kind == "shear":
        above = noise.triu(1)
        noise = torch.eye(rank, dtype=torch.float64) + factor * above / above.norm().clamp_min(1e-300)
    if kind == "rotate":
        turned, upper = torch.linalg.qr(noise)
        noise = turned * upper.diagonal().sign() if rank > 1 else -torch.ones(1, 1, dtype=torch.float64)
    return noise


def _hidden(view: ThreatView, products: Products, condition: float) -> Tensor:
    """Rows near the others' mean, or near 0 where that is not known."""
    others = view.others if view.others is not None and len(view.others) else None
    target = torch.zeros_like(view.global_vector.float()) if others is None else others.float().mean(0)
    if view.defense is None or others is None:
        return hidden(view.own.float(), target, products, condition)
    return max(_tries(view, target, products, condition), key=lambda found: found[0])[1]


def _tries(view: ThreatView, target: Tensor, products: Products, condition: float) -> Iterator[tuple[float, Tensor]]:
    """The share of the weight, or of those who are kept, that rows in other gauges get; and the rows."""
    assert view.defense is not None
    mine = set(view.own_ids)
    for bound in (1.0, *(condition**share for share in (0.25, 0.5, 1.0))):
        rows = view.own.float() if bound == 1.0 else hidden(view.own.float(), target, products, bound)
        cohort = received(view, rows)
        own = torch.tensor([id in mine for id in cohort.ids])
        try:
            decision = view.defense(cohort)
        except DefenseError:
            continue
        told = decision.weights if decision.weights is not None else decision.kept
        if told is None:  # then the nearest row is the best guess
            yield -float((rows - target).norm()), rows
            continue
        share = told.double().abs()
        yield float(share[own].sum() / share.sum().clamp_min(1e-300)), rows
