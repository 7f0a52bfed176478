"""`algorithms.adapters` in a round: what becomes of adapters once the defense has weighed the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fedllm_sec.algorithms.adapters import Alternate, Averaged, Factors, Mode, average, cut
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.factors import Pair, Products
from fedllm_sec.matrix.storage import taken
from fedllm_sec.models.shifted import Shifted
from fedllm_sec.protocols import Decision, LocalRule


@dataclass(frozen=True)
class Averaging:
    """How the adapters of one federation are averaged, where that is not factor by factor."""

    mode: Mode | Literal["alternate", "core"]
    pairs: tuple[Pair, ...]
    sizes: tuple[tuple[int, int], ...]  # (out, in) of each
    plain: tuple[slice, ...]
    fresh: Tensor  # (d,) the adapter as it started
    shifted: Shifted | None = None  # where base weights gain
    ranks: Mapping[str, int] = field(default_factory=dict)  # of clients with less than the whole rank, by id

    @property
    def local(self) -> tuple[LocalRule, ...]:
        """What every client does in its training."""
        return (Alternate(self.pairs),) if self.mode == "alternate" else ()

    def start_of(self, client: str, vector: Tensor) -> Tensor:
        """What a client begins with: the global vector (d,), cut to the rank that it can train."""
        return cut(self.pairs, vector, self.ranks[client]) if client in self.ranks else vector

    def frozen(self, round: int) -> list[slice]:
        """What the server does not take of any row in this round."""
        return Alternate(self.pairs).frozen(round) if self.mode == "alternate" else []

    def take(
        self, vector: Tensor, rows: UpdateMatrix, decision: Decision, start: Tensor, server_lr: float
    ) -> Averaged | None:
        """What the rows' weights make of factors and base; None where factors are averaged as they are.

        `vector` (d,) is what the server has stepped to, `start` where it came from.
        """
        if self.mode == "alternate":
            return None
        if self.mode == "core":  # a mean of cores between fixed factors is the mean of their products
            return Averaged(vector, None, 0.0)
        if decision.weights is None:
            raise DefenseError(needs_weights(self.mode))
        w = decision.weights if rows.mixing is None else decision.weights @ rows.mixing
        products = Products(start, self.pairs, self.plain)
        return average(self.mode, vector, rows.rows, server_lr * w, products, self.fresh)

    def packed(self, gains: Sequence[Factors], n: int) -> Tensor:
        """What base weights gain as one float32 vector, of the same size on every rank of a round of n clients."""
        flat = torch.zeros(self.width(n))
        at = 0
        for pair, (out, wide), (tall, right) in zip(self.pairs, self.sizes, gains, strict=True):
            k = tall.shape[1]
            room = (n + 2) * pair.rank
            flat[at : at + out * k] = tall.flatten().float().cpu()
            flat[at + out * room : at + out * room + k * wide] = right.flatten().float().cpu()
            # (out, k) and (k, in) are laid with their own k: zeros behind say where they end
            at += (out + wide) * room + 1
            flat[at - 1] = k
        return flat

    def width(self, n: int) -> int:
        """How long that vector is."""
        return sum(
            (out + wide) * (n + 2) * pair.rank + 1 for pair, (out, wide) in zip(self.pairs, self.sizes, strict=True)
        )

    def gain(self, flat: Tensor, n: int) -> None:
        """Add it to the base weights of this process's model."""
        assert self.shifted is not None
        at = 0
        for pair, (out, wide) in zip(self.pairs, self.sizes, strict=True):
            room = (n + 2) * pair.rank
            k = int(flat[at + (out + wide) * room])
            right = flat[at + out * room : at + out * room + k * wide].view(k, wide)
            self.shifted.add(pair.name, flat[at : at + out * k].view(out, k), right)
            at += (out + wide) * room + 1


def needs_weights(mode: str) -> str:
    """Why a rule that gives no row weights does not go with this way of averaging."""
    return (
        f"model.lora.average: {mode} makes the mean of the products B A, which needs one weight for each row, and this "
        "rule gives none: it works on single coordinates, or adds noise to the update. Choose a rule of whole rows "
        "(multi_krum, geometric_median, flame with noise: 0, ...), or average: factors."
    )


def without(updates: UpdateMatrix, places: Sequence[slice]) -> UpdateMatrix:
    """The rows with zeros in some places, copied where there is something else."""
    if not any(bool(updates.rows[:, place].any()) for place in places):
        return updates
    rows = taken(updates.rows, list(range(updates.n)))
    for place in places:
        rows[:, place] = 0
    return replace(updates, rows=rows, file=None)
