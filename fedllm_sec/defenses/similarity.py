"""FoolsGold: clients that always push the same way are taken for copies of one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import need
from fedllm_sec.errors import DefenseError
from fedllm_sec.kernels.products import ProductSums
from fedllm_sec.kernels.sums import joined, new_sums
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext


def cosines(gram: Tensor) -> Tensor:
    """Cosine of each pair of rows from their inner products: (n, n); 0 where a row is zero."""
    norms = gram.diagonal().clamp_min(0.0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    return (gram * scale[:, None] * scale[None]).clamp(-1.0, 1.0)


def foolsgold_weights(cosine: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """Learning rates in [0, 1] and the similarity each client is judged by, both (n,), from (n, n) cosines.

    With v_i = max_j cos_ij over the others (at least 0), cos_ij is scaled by v_i / v_j where v_j > v_i
    (pardoning); alpha_i = 1 - max_j cos_ij, divided by the largest alpha; then kappa (ln(alpha / (1 -
    alpha)) + 0.5), cut to [0, 1].
    """
    others = cosine.clone().fill_diagonal_(0.0)
    top = others.max(dim=1).values
    pardon = torch.where(top[None] > top[:, None], top[:, None] / top[None].clamp_min(1e-300), 1.0)
    similarity = (others * pardon).max(dim=1).values.clamp(0.0, 1.0)
    alpha = 1.0 - similarity
    largest = float(alpha.max())
    if largest <= 1e-12:  # rounding: all clients are copies of others
        return torch.zeros_like(alpha), similarity
    alpha = (alpha / largest).clamp(0.0, 0.99)  # 0.99 instead of 1, as published, keeps the logit finite
    logit = kappa * (torch.log(alpha / (1 - alpha)) + 0.5)
    return logit.clamp(0.0, 1.0), similarity


class RowSums:
    """What each client sent, added up over the rounds by id: one float32 row (d,) for each client ever seen.

    In product space, what each client changed: see `kernels.products.ProductSums`.
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.keeps = True  # False: the rule is made for one call, so that nothing is stored
        self.place: dict[str, int] = {}  # client id -> its number in `sums`
        self.sums: Tensor | None = None  # of the clients seen; `add` has them where blocks are computed
        self.d = 0  # values for each client
        self.products = ProductSums()

    def add(self, updates: UpdateMatrix) -> Tensor:
        """Add this round's rows; inner products of the sums of this round's clients, (n, n) float64, in their order."""
        distinct = len(set(updates.ids)) == updates.n
        need(distinct, self.rule, "one row for each client", "Give distinct ids.", n=updates.n)
        if updates.products is not None:
            return self.products.add(updates)
        if not self.keeps and self.sums is None:
            return kernels.gram(updates)  # of the first round: the sums are its rows
        if self.sums is not None and self.d != updates.d:
            raise DefenseError(
                f"{self.rule}: the history has {self.d} values for each client, the rows have {updates.d}. "
                "Start a new run where the trained parameters change."
            )
        new = [name for name in updates.ids if name not in self.place]
        if new:
            fresh = new_sums(len(new), updates.d, updates.compute_device)
            self.sums = fresh if self.sums is None else joined(self.sums, fresh)
            self.place |= {name: len(self.place) + i for i, name in enumerate(new)}
            self.d = updates.d
        assert self.sums is not None
        self.sums = self.sums.to(updates.compute_device)
        return kernels.accumulate(self.sums, [self.place[name] for name in updates.ids], updates)

    def state_dict(self) -> dict[str, Any]:
        state = {"products": self.products.state_dict()} if self.products.sums else {}
        return state if self.sums is None else {**state, "place": dict(self.place), "sums": self.sums, "d": self.d}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.place = {name: int(row) for name, row in state.get("place", {}).items()}
        self.sums = state["sums"].clone().contiguous() if "sums" in state else None
        self.d = int(state.get("d", 0))
        self.products.load_state_dict(state.get("products", {}))


class FoolsGold:
    """Row weights from the cosine similarity of the clients' updates, accumulated over the rounds by id.

    Fung et al. 2020, algorithm 1, on all coordinates (the paper can weigh them by importance). The learning
    rates are normalised to sum 1: the paper adds up updates. When every client is a copy of another there
    is nobody to prefer and the weights are equal (note `all_alike` = 1). The history holds one float32 row
    of d values for each client ever seen; `history=False` looks at the present round only and keeps
    nothing. Scores are the similarities.
    """

    def __init__(self, *, kappa: float = 1.0, history: bool = True) -> None:
        need(kappa > 0, "foolsgold", "kappa > 0", "Raise kappa.", kappa=kappa)
        self.kappa = kappa
        self.history = RowSums("foolsgold") if history else None

    def __call__(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        gram = kernels.gram(updates) if self.history is None else self.history.add(updates)
        rates, similarity = foolsgold_weights(cosines(gram), self.kappa)
        alike = float(rates.sum()) == 0.0
        weights = torch.full_like(rates, 1.0 / updates.n) if alike else rates / rates.sum()
        return Decision.weighted(updates, weights, scores=similarity, notes={"all_alike": float(alike)})

    def once(self) -> None:
        """There will be no other round: keep nothing of this one."""
        if self.history is not None:
            self.history.keeps = False

    def state_dict(self) -> dict[str, Any]:
        return {} if self.history is None else self.history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.history is not None:
            self.history.load_state_dict(state)
