"""Rules that judge a client by what it, or everybody, sent before: three-sigma and the cross-round check."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.filters import by_id
from fedllm_sec.defenses.geometric import geometric_median
from fedllm_sec.defenses.similarity import RowSums, cosines, foolsgold_weights
from fedllm_sec.errors import DefenseError
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext

TINY = torch.finfo(torch.float64).tiny


class RowMemory:
    """One float32 row (d,) for each client id; a client that was never seen has none."""

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.rows: dict[str, Tensor] = {}

    def of(self, updates: UpdateMatrix) -> list[Tensor | None]:
        """The remembered rows of this round's clients, in order."""
        distinct = len(set(updates.ids)) == updates.n
        need(distinct, self.rule, "one row for each client", "Give distinct ids.", n=updates.n)
        found = [self.rows.get(name) for name in updates.ids]
        for name, row in zip(updates.ids, found, strict=True):
            if row is not None and len(row) != updates.d:
                raise DefenseError(
                    f'{self.rule}: the history of client "{name}" has {len(row)} values, its row '
                    f"{updates.d}. Start a new run where the trained parameters change."
                )
        return found

    def store(self, updates: UpdateMatrix, chosen: Tensor) -> None:
        """Keep this round's row of the chosen clients, (n,) bool, in place of what was known of them."""
        picked = [i for i in range(updates.n) if bool(chosen[i])]
        fresh = {updates.ids[i]: torch.empty(updates.d) for i in picked}
        for place, block in updates.blocks():
            for i in picked:
                fresh[updates.ids[i]][place] = block[i].cpu()
        self.rows.update(fresh)


def upper_bound(scores: Tensor, k: float, estimate: Literal["robust", "moments"]) -> float:
    """mu + k sigma of the scores: median and 1.4826 MAD, or mean and sample standard deviation."""
    if estimate == "moments":
        return float(scores.mean() + k * scores.std())
    centre = midpoint(scores)
    return centre + k * 1.4826 * midpoint((scores - centre).abs())


def need_reach(rule: str, n: int, k: float, estimate: Literal["robust", "moments"]) -> None:
    """Raise where no score among n can be above `upper_bound`, so that the rule could never act."""
    can_act = estimate == "robust" or (n - 1) / math.sqrt(n) > k
    way_out = "Lower k, raise clients.per_round, or set estimate to robust."
    need(can_act, rule, "(n - 1) / sqrt(n) > k with estimate: moments", way_out, n=n, k=k)


def within(scores: Tensor, bound: float) -> Tensor:
    """score <= bound, give or take rounding: (n,) bool."""
    return scores <= bound + 1e-6 * abs(bound)


def distances_to_vector(updates: UpdateMatrix, vector: Tensor) -> Tensor:
    """||x_i - v||: (n,) float64."""
    squares = kernels.sq_distances(updates, extra=vector)
    return squares[:-1, -1].sqrt()


def distances_to_median(updates: UpdateMatrix, ctx: RoundContext) -> Tensor:
    """||x_i - z|| for z the rows' geometric median: (n,) float64."""
    scores = geometric_median(updates, ctx).scores
    assert scores is not None
    return scores


class ThreeSigma:
    """The mean of the rows whose score is at most mu + k sigma of all scores (Han et al. 2023, sec. 4.2).

    `score: distance` is the distance to a reference: the round's geometric median, or, with `reference:
    running_mean`, the mean of the updates this rule has given so far (in the first round the geometric
    median). `score: foolsgold` is the pardoned cosine similarity to the most similar other client over the
    history of updates by client id (Fung et al. 2020): it finds copies, not outliers. These are the variants
    of the reference benchmark; Krum's score is left out.

    mu and sigma are the median and 1.4826 times the median absolute deviation. `estimate: moments` takes the
    paper's mean and sample standard deviation; among n scores none can exceed the mean by more than
    (n - 1) / sqrt(n) of these (2.85 for n = 10), so with few clients k = 3 could never act and is an error.
    The lowest scores always pass, so somebody is always kept. `foolsgold` holds a row for each client.
    """

    def __init__(
        self,
        *,
        k: float = 3.0,
        score: Literal["distance", "foolsgold"] = "distance",
        reference: Literal["geometric_median", "running_mean"] = "geometric_median",
        estimate: Literal["robust", "moments"] = "robust",
    ) -> None:
        need(k > 0, "three_sigma", "k > 0", "Raise it.", k=k)
        self.k, self.score, self.reference, self.estimate = k, score, reference, estimate
        self.sums = RowSums("three_sigma")
        self.mean: Tensor | None = None  # (d,) of the updates given so far
        self.rounds = 0

    def __call__(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        need_reach("three_sigma", updates.n, self.k, self.estimate)
        scores = self._scores(updates, ctx)
        kept = within(scores, upper_bound(scores, self.k, self.estimate))
        decision = Decision.keep(updates, kept, scores=scores)
        if self.reference == "running_mean":
            update = decision.update.detach().cpu()
            old = torch.zeros_like(update) if self.mean is None else self.mean
            self.rounds += 1
            self.mean = old + (update - old) / self.rounds
        return decision

    def _scores(self, updates: UpdateMatrix, ctx: RoundContext) -> Tensor:
        if self.score == "foolsgold":
            order = by_id(updates.ids)
            gram = self.sums.add(updates)
            scores = torch.empty(updates.n, dtype=torch.float64)
            scores[order] = foolsgold_weights(cosines(gram[order][:, order]), 1.0)[1]
            return scores
        if self.reference == "geometric_median" or self.mean is None:
            return distances_to_median(updates, ctx)
        fits = f"rows of {len(self.mean)} values, as its running mean"
        way_out = "Start a new run where the trained parameters change."
        need(len(self.mean) == updates.d, "three_sigma", fits, way_out, d=updates.d)
        return distances_to_vector(updates, self.mean)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"sums": self.sums.state_dict(), "rounds": self.rounds}
        return state if self.mean is None else state | {"mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums.load_state_dict(state.get("sums", {}))
        self.rounds, self.mean = int(state.get("rounds", 0)), state.get("mean")


def cosine_to(dots: Tensor, squares: Tensor, other_squares: Tensor) -> Tensor:
    """Cosines from inner products and squared norms; 0 where either vector is zero."""
    scale = squares.sqrt() * other_squares.sqrt()
    return torch.where(scale > 0, dots / scale.clamp_min(TINY), 0.0).clamp(-1.0, 1.0)


class CrossRound:
    """Three-sigma for those only who turned away from their own last update or from the last global one.

    Han et al. 2023, sec. 4.1: a client is suspect if the cosine of its row with its own last accepted row, or
    with the last global update (`ctx.last_update`), is below `threshold`; 0.5 as in the paper, which compares
    models, where cosines are larger: on updates more clients are looked at, and three-sigma decides. Suspects
    are dropped if their distance to the geometric median is above mu + k sigma; mu and sigma are taken from
    all clients, since among attackers alone none would stand out.

    Stated here: a client without a history is suspect, so all are in the first round; the cosine with a zero
    vector is 0; without a last global update only the own history counts; a dropped client's row does not
    replace its history. Scores are the distances. The history holds a float32 row for each client ever seen.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.5,
        k: float = 3.0,
        estimate: Literal["robust", "moments"] = "robust",
    ) -> None:
        need(-1 <= threshold <= 1, "cross_round", "-1 <= threshold <= 1", "Change it.", threshold=threshold)
        need(k > 0, "cross_round", "k > 0", "Raise it.", k=k)
        self.threshold, self.k, self.estimate = threshold, k, estimate
        self.last = RowMemory("cross_round")

    def __call__(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        need_reach("cross_round", updates.n, self.k, self.estimate)
        suspects = self._suspects(updates, ctx)
        scores = distances_to_median(updates, ctx)
        kept = ~suspects | within(scores, upper_bound(scores, self.k, self.estimate))
        self.last.store(updates, kept)
        weights = kept.double() / int(kept.sum())
        notes = {"suspects": float(suspects.sum())}
        return Decision.weighted(updates, weights, kept=kept, scores=scores, notes=notes)

    def _suspects(self, updates: UpdateMatrix, ctx: RoundContext) -> Tensor:
        """Who differs from before: (n,) bool, in one read."""
        own = self.last.of(updates)
        whole = ctx.last_update
        known = torch.tensor([row is not None for row in own])
        squares, own_dots, own_squares, dots = (torch.zeros(updates.n, dtype=torch.float64) for _ in range(4))
        for place, block in updates.blocks():
            wide = block.cpu().double()
            squares += wide.square().sum(1)
            for i, row in enumerate(own):
                if row is not None:
                    part = row[place].double()
                    own_dots[i] += wide[i] @ part
                    own_squares[i] += part @ part
            if whole is not None:
                dots += wide @ whole[place].cpu().double()
        suspects = ~known | (cosine_to(own_dots, squares, own_squares) < self.threshold)
        if whole is not None:
            whole_square = whole.double().square().sum().cpu().expand(updates.n)
            suspects |= cosine_to(dots, squares, whole_square) < self.threshold
        return suspects

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self.last.rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last.rows = dict(state.get("last", {}))
