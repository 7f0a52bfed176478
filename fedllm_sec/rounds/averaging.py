"""`algorithms.adapters` in a round: what becomes of adapters once the defense has weighed the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from fedllm_sec.protocols import Client, Decision, LocalRule

OWN_B = "own_b"  # in a client's memory: the B factors that never leave it, one after another


@dataclass(frozen=True)
class Averaging:
    """How the adapters of one federation are averaged, where that is not factor by factor."""

    mode: Mode | Literal["alternate", "core", "share_a"]
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

    @property
    def personal(self) -> bool:
        """Whether each client keeps its own B, and A alone is averaged (FedSA-LoRA, Guo et al. 2025)."""
        return self.mode == "share_a"

    def start_of(self, client: Client, vector: Tensor) -> Tensor:
        """What a client begins with: the global vector (d,), with its own B or cut to the rank that it can train."""
        if OWN_B in client.memory:
            return self._with_b(vector, client.memory[OWN_B])
        return cut(self.pairs, vector, self.ranks[client.id]) if client.id in self.ranks else vector

    def keep(self, trained: Iterable[tuple[Client, Tensor]], start: Tensor) -> None:
        """Each client keeps the B that its own training gave, if it is finite, and it leaves its row (d,), in place."""
        for client, row in trained if self.personal else ():
            own = torch.cat([(start[pair.b].to(row) + row[pair.b]).float() for pair in self.pairs]).cpu()
            if bool(own.isfinite().all()):
                client.memory[OWN_B] = own
            for pair in self.pairs:
                row[pair.b] = 0

    def shown(self, clients: Sequence[Client], vector: Tensor) -> Tensor:
        """The model that is measured and saved: the global vector, with the mean of all B that clients keep."""
        kept = [client.memory[OWN_B].cpu() for client in clients if OWN_B in client.memory]
        return self._with_b(vector, torch.stack(kept).double().mean(0)) if kept else vector

    def _with_b(self, vector: Tensor, own: Tensor) -> Tensor:
        made, at = vector.clone(), 0
        for pair in self.pairs:
            width = pair.b.stop - pair.b.start
            made[pair.b] = own[at : at + width].to(made)
            at += width
        return made

    def frozen(self, round: int) -> list[slice]:
        """What the server does not take of any row in this round."""
        if self.personal:
            return [pair.b for pair in self.pairs]
        return Alternate(self.pairs).frozen(round) if self.mode == "alternate" else []

    def take(
        self, vector: Tensor, rows: UpdateMatrix, decision: Decision, start: Tensor, server_lr: float
    ) -> Averaged | None:
        """What the rows' weights make of factors and base; None where factors are averaged as they are.

        `vector` (d,) is what the server has stepped to, `start` where it came from.
        """
        if self.mode in ("alternate", "share_a"):
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
