"""In which space a defense compares rows of adapters: factors A and B as numbers, their products, or one gauge.

(A, B) and (M A, B M^-1) are one model for every invertible M (r, r): what a rule finds in the factors' numbers, an
attacker chooses. In product space no choice of M changes an inner product, so none changes a decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.factors import Products, aligned
from fedllm_sec.protocols import RoundContext


@dataclass
class Space:
    """`product`: rows are compared by B A and have no columns; `aligned`: they are brought to one gauge first.

    The update is still the weighted sum of the clients' factors, of the aligned ones where they are aligned.
    """

    kind: Literal["product", "aligned"]
    scales: Mapping[str, float] | None = None  # alpha / r by the name of A; None: 1 for all

    @property
    def unbacked(self) -> str | None:
        """Why no epsilon can hold in this space."""
        return (
            "rows are clipped by the length of their products, not of what is added" if self.kind == "product" else None
        )

    def __call__(self, updates: UpdateMatrix, ctx: RoundContext) -> UpdateMatrix:
        """The rows as the defense sees them. Note `not_aligned`: layers of rows that were left in their own gauge."""
        products = Products.of(updates.layout, ctx.global_vector.float(), self.scales)
        if self.kind == "product":
            return replace(updates, products=products)
        rows, left = aligned(updates.rows, products)
        ctx.notes["not_aligned"] = float(left)
        return replace(updates, rows=rows, file=None)
