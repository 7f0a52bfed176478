"""Rules that judge a client by what it, or everybody, sent before: three-sigma and the cross-round check."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.filters import by_id
from fedllm_sec.defenses.geometric import solved
from fedllm_sec.defenses.similarity import RowSums, cosines, foolsgold_weights
from fedllm_sec.defenses.trust import beside_vector
from fedllm_sec.errors import DefenseError
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.storage import remembered
from fedllm_sec.protocols import Decision, RoundContext

TINY = torch.finfo(torch.float64).tiny


class RowMemory:
    """One float32 row (d,) for each client id that was seen, in host memory, or on disk where the round's rows are."""

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.rows: dict[str, Tensor] = {}
        self.keeps = True  # False: the rule is made for one call, so that nothing is stored

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
        if not self.keeps:
            return
        picked = [i for i in range(updates.n) if bool(chosen[i])]
        for name in (updates.ids[i] for i in picked):
            if name not in self.rows:
                self.rows[name] = remembered(updates.d)  # later rounds write where the first one did
        if (fast := kernels.for_rules(updates)) is not None:
            fast.keep(updates, [self.rows[name] if chosen[i] else None for i, name in enumerate(updates.ids)])
            return
        for place, block in updates.blocks():
            for i in picked:
                self.rows[updates.ids[i]][place] = block[i].cpu()

    def load(self, rows: Mapping[str, Tensor]) -> None:
        """Take up the rows of a saved state, wherever it lies."""
        self.rows = {name: row.to("cpu", torch.float32, copy=True) for name, row in rows.items()}


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
    return beside_vector(updates, vector)[3]


def distances_to_median(updates: UpdateMatrix) -> Tensor:
    """||x_i - z|| for z the rows' geometric median, which is not formed: (n,) float64."""
    even = torch.full((updates.n,), 1.0 / updates.n, dtype=torch.float64)
    return solved(updates, even, smoothing=1e-9, tolerance=1e-8, iterations=5000, exact=True)[1]


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

    def once(self) -> None:
        """There will be no other round: keep nothing of this one."""
        self.sums.keeps = False

    def _scores(self, updates: UpdateMatrix, ctx: RoundContext) -> Tensor:
        if self.score == "foolsgold":
            order = by_id(updates.ids)
            gram = self.sums.add(updates)
            scores = torch.empty(updates.n, dtype=torch.float64)
            scores[order] = foolsgold_weights(cosines(gram[order][:, order]), 1.0)[1]
            return scores
        if self.reference == "geometric_median" or self.mean is None:
            return distances_to_median(updates)
        fits = f"rows of {len(self.mean)} values, as its running mean"
        way_out = "Start a new run where the trained parameters change."
        need(len(self.mean) == updates.d, "three_sigma", fits, way_out, d=updates.d)
        return distances_to_vector(updates, self.mean)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"sums": self.sums.state_dict(), "rounds": self.rounds}
        return state if self.mean is None else state | {"mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums.load_state_dict(state.get("sums", {}))
        self.rounds, self.mean = int(state.get("rounds", 0)), state["mean"].cpu() if "mean" in state else None


def cosine_to(dots: Tensor, squares: Tensor, other_squares: Tensor) -> Tensor:
    """Cosines from inner products and squared norms; 0 where either vector is zero."""
    scale = squares.sqrt() * other_squares.sqrt()
    return torch.where(scale > 0, dots / scale.clamp_min(TINY), 0.0).clamp(-1.0, 1.0)


class CrossRound:
    """Three-sigma for those only who turned away from their own last update or the last global one, or send long rows.

    Han et al. 2023, sec. 4.1: a client is suspect if the cosine with what it sent last and was accepted, or with the
    last global one, is below `threshold` (0.5 in the paper). Suspects are dropped if their distance to the geometric
    median is above mu + k sigma; mu and sigma are taken from all clients, since among attackers alone none would stand
    out.

    The paper compares models, global vector + row, which are the same but for little between rounds: hardly anybody is
    ever suspect, unless a row is as long as the model. That is `compare: models`. By default updates are compared
    (the row, `ctx.last_update`), whose cosines are small in many runs: then most clients are looked at, and three-sigma
    decides. A cosine of updates does not see length, so a client is also suspect whose row is more than `longer` times
    as long as its own last accepted one, or as the median row of the round; `longer: null` leaves this out.

    Stated here: a client without a history is suspect, so all are in the first round; the cosine with a zero
    vector is 0; without a last global update only the own history counts; a dropped client's row does not
    replace its history. Scores are the distances. The history holds a float32 row for each client ever seen.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.5,
        compare: Literal["updates", "models"] = "updates",
        longer: float | None = 2.0,
        k: float = 3.0,
        estimate: Literal["robust", "moments"] = "robust",
    ) -> None:
        need(-1 <= threshold <= 1, "cross_round", "-1 <= threshold <= 1", "Change it.", threshold=threshold)
        need(longer is None or longer >= 1, "cross_round", "longer >= 1", "Raise it.", longer=longer)
        need(k > 0, "cross_round", "k > 0", "Raise it.", k=k)
        self.threshold, self.compare, self.longer, self.k, self.estimate = threshold, compare, longer, k, estimate
        self.last = RowMemory("cross_round")  # what is compared: rows, or models
        self.lengths: dict[str, float] = {}  # of the last accepted row of each client

    def __call__(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        need_reach("cross_round", updates.n, self.k, self.estimate)
        start = ctx.global_vector.detach().float().cpu() if self.compare == "models" else None
        turned, lengths = self._turned(updates, start, ctx.last_update)
        suspects = turned | self._longer(updates.ids, lengths)
        scores = distances_to_median(updates)
        kept = ~suspects | within(scores, upper_bound(scores, self.k, self.estimate))
        self.last.store(updates, kept)
        for i, name in enumerate(updates.ids):
            if bool(kept[i]):
                self.lengths[name] = float(lengths[i])
                if start is not None and self.last.keeps:
                    self.last.rows[name] += start
        weights = kept.double() / int(kept.sum())
        notes = {"suspects": float(suspects.sum())}
        return Decision.weighted(updates, weights, kept=kept, scores=scores, notes=notes)

    def once(self) -> None:
        """There will be no other round: keep nothing of this one."""
        self.last.keeps = False

    def _longer(self, ids: Sequence[str], lengths: Tensor) -> Tensor:
        """Whose row is much longer than before, or than the others': (n,) bool."""
        if self.longer is None:
            return torch.zeros(len(ids), dtype=torch.bool)
        own = torch.tensor([self.lengths.get(name, math.inf) for name in ids], dtype=torch.float64)
        return lengths > self.longer * own.clamp_max(midpoint(lengths))

    def _turned(self, updates: UpdateMatrix, start: Tensor | None, last_update: Tensor | None) -> tuple[Tensor, Tensor]:
        """Who points elsewhere than before, (n,) bool, and the rows' lengths, (n,), in one read.

        `start` (d,) is added where models are compared; the lengths are of the rows alone.
        """
        own = self.last.of(updates)
        whole = last_update if start is None else start
        known = torch.tensor([row is not None for row in own])
        fast = kernels.for_rules(updates) if start is None else None
        whole_square = torch.zeros((), dtype=torch.float64)
        if fast is not None:
            common = None if whole is None else whole.detach().to("cpu", torch.float32).contiguous()
            squares, own_dots, own_squares, _, dots = fast.beside(updates, own, common).unbind(1)
            lengths = squares.sqrt()
            if common is not None:
                whole_square = fast.inner_products([common], [common])[0, 0]
        else:
            lengths = kernels.row_norms(updates)
            squares, own_dots, own_squares, dots = self._beside(updates, own, start, whole)
            if whole is not None:
                whole_square = whole.double().square().sum().cpu()
        suspects = ~known | (cosine_to(own_dots, squares, own_squares) < self.threshold)
        if whole is not None:
            suspects |= cosine_to(dots, squares, whole_square.expand(updates.n)) < self.threshold
        return suspects, lengths

    @staticmethod
    def _beside(
        updates: UpdateMatrix, own: Sequence[Tensor | None], start: Tensor | None, whole: Tensor | None
    ) -> tuple[Tensor, ...]:
        """<x, x>, <x, y>, <y, y> and <x, whole> of each row x, to which `start` is added, and its own y: (n,) each."""
        squares, own_dots, own_squares, dots = (torch.zeros(updates.n, dtype=torch.float64) for _ in range(4))
        for place, block in updates.blocks():
            wide = block.cpu().double()
            if start is not None:
                wide = wide + start[place].double()
            squares += wide.square().sum(1)
            for i, row in enumerate(own):
                if row is not None:
                    part = row[place].double()
                    own_dots[i] += wide[i] @ part
                    own_squares[i] += part @ part
            if whole is not None:
                dots += wide @ whole[place].cpu().double()
        return squares, own_dots, own_squares, dots

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self.last.rows), "lengths": dict(self.lengths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last.load(state.get("last", {}))
        self.lengths = dict(state.get("lengths", {}))
