"""The factors of LoRA adapters in a flat vector: which two make one product, and rows that stand for products.

Letters: A (r, in), B (out, r), s = alpha / r or so. A row holds the deltas a and b of both against the global A_0 and
B_0, and stands for what it changes in the layer: D = s ((B_0 + b)(A_0 + a) - B_0 A_0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix.layout import Layout
from fedllm_sec.matrix.storage import new_rows

A_FACTOR = re.compile(r"(^|\.)lora_(embedding_)?A(\.|$)")
B_FACTOR = re.compile(r"(^|\.)lora_(embedding_)?B(\.|$)")
# peft adapts the fused experts of a mixture by one pair of stacked factors: one product for each expert
FUSED = re.compile(r"\.experts\.(base_layer\.)*lora_A")


class NoColumns(DefenseError):
    """Something asks for single numbers of rows that stand for products."""


def lora_pairs(layout: Layout) -> list[tuple[str, str]]:
    """The names of the factors (A, B) of one adapter."""
    names = set(layout.names)
    pairs = [(name, A_FACTOR.sub(r"\1lora_\2B\3", name)) for name in layout.names if A_FACTOR.search(name)]
    return [(a, b) for a, b in pairs if b in names]


def product_pairs(layout: Layout) -> list[tuple[str, str]]:
    """Those of them that form one product B A."""
    return [(a, b) for a, b in lora_pairs(layout) if not FUSED.search(a)]


@dataclass(frozen=True)
class Pair:
    """Where the two factors of one layer lie in a vector."""

    name: str  # of the A factor
    a: slice
    b: slice
    rank: int
    scale: float = 1.0  # s, by which the product counts in its layer

    def wide(self, vectors: Tensor) -> Tensor:
        """A of each vector (n, d), in float64: (n, r, in)."""
        return vectors[:, self.a].double().reshape(len(vectors), self.rank, -1)

    def tall(self, vectors: Tensor) -> Tensor:
        """B of each vector, in float64: (n, out, r)."""
        return vectors[:, self.b].reshape(len(vectors), -1, self.rank).mT.contiguous().double().mT


@dataclass(frozen=True)
class Products:
    """What rows of factors stand for, where they are compared by their products: see the head of this file."""

    start: Tensor  # (d,) the global vector: A_0 and B_0
    pairs: tuple[Pair, ...]
    plain: tuple[slice, ...]  # what stands beside the factors (lengths, whole modules) and counts as it is

    @classmethod
    def of(cls, layout: Layout, start: Tensor, scales: Mapping[str, float] | None = None) -> Products:
        """Those of a layout; `scales` has s by the name of A, 1 where it is not given."""
        places, shapes = layout.slices(), dict(zip(layout.names, layout.shapes, strict=True))
        named = product_pairs(layout)
        if not named:
            raise DefenseError(
                "space: products are those of an adapter's two factors, and no pair ...lora_A... / ...lora_B... is "
                f"trained among {len(layout.names)} parameters (first: {layout.names[0]!r}). Set defense.space: "
                "factors; with one factor frozen there is no gauge to guard against."
            )
        if fused := [a for a, _ in lora_pairs(layout) if FUSED.search(a)]:
            raise DefenseError(
                f"space: {fused[0]} holds the stacked factors of many experts, which are no one product. Set "
                "defense.space: factors, or adapt other layers."
            )
        pairs = tuple(Pair(a, places[a], places[b], shapes[a][0], (scales or {}).get(a, 1.0)) for a, b in named)
        for pair, (a, b) in zip(pairs, named, strict=True):
            if math.prod(shapes[b][1:]) != pair.rank:
                raise DefenseError(f"space: {a} {shapes[a]} and {b} {shapes[b]} make no product. Adapt other layers.")
        used = {name for pair in named for name in pair}
        return cls(start, pairs, tuple(place for name, place in places.items() if name not in used))


def aligned(rows: Tensor, products: Products) -> tuple[Tensor, int]:
    """The rows in one gauge, (n, d) float32, and how many layers of rows could not be brought there.

    (A, B) and (M A, B M^-1) are one layer. Of all these the one whose A is nearest to the global A_0 in least squares
    is taken, M = A_0 A^T (A A^T)^-1: whoever sends the same products sends the same rows. FedRot-LoRA (2602.23638)
    looks among rotations alone, which a scaling of the factors evades. Where A has no full rank, or the nearest A has
    none, the layer stays as it was sent.
    """
    made, left = new_rows(*rows.shape, device=rows.device), 0
    made.copy_(rows)
    for pair in products.pairs:
        a0, b0 = pair.wide(products.start[None].to(rows.device))[0], pair.tall(products.start[None].to(rows.device))[0]
        a, b = a0 + pair.wide(rows), b0 + pair.tall(rows)
        own, towards = a @ a.mT, a0 @ a.mT  # (n, r, r)
        good = _invertible(own)
        turn = towards @ torch.linalg.pinv(own, hermitian=True)
        good &= _invertible(turn)
        turn[~good] = torch.eye(pair.rank, dtype=turn.dtype, device=turn.device)
        near_a, near_b = turn @ a - a0, b @ torch.linalg.inv(turn) - b0
        made[good, pair.a] = near_a[good].flatten(1).float()
        made[good, pair.b] = near_b[good].flatten(1).float()
        left += int((~good).sum())
    return made, left


def _invertible(matrices: Tensor) -> Tensor:
    """Which of the matrices (n, r, r) have a condition below 1e10: (n,) bool."""
    sizes = torch.linalg.svdvals(matrices)
    good: Tensor = sizes[:, -1] > 1e-10 * sizes[:, 0]
    return good
