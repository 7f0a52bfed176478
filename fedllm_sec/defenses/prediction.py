"""FLDetector: forecast each client's update from its last one, drop those that keep missing the forecast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.checks import need
from fedllm_sec.defenses.filters import by_id
from fedllm_sec.defenses.history import RowMemory
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext

REFERENCES = 20  # uniform samples for the gap statistic
COLUMNS = 2**15  # of the remembered vectors at a time
FEWEST = 4  # scores among which a second group can be told


def hessian_times(steps: Sequence[Tensor] | Tensor, changes: Sequence[Tensor] | Tensor, vector: Tensor) -> Tensor:
    """L-BFGS approximation of H v from k pairs (step, change of the update) of (d,), oldest first: (d,) float64.

    The result is a combination of the vectors (`hessian_weights`), so they are read twice, a few columns at a time: for
    their inner products and for the sum.
    """
    k, d = len(steps), len(vector)
    places = [slice(start, min(start + COLUMNS, d)) for start in range(0, d, COLUMNS)]

    def wide(place: slice) -> Tensor:
        return torch.stack([one[place] for one in (*steps, *changes, vector)]).double()

    products = torch.zeros(k, 2 * k, dtype=torch.float64)  # S [S; Y]^T
    inner = torch.zeros(2 * k, dtype=torch.float64)  # [S; Y] v
    for place in places:
        block = wide(place)
        products += block[:k] @ block[: 2 * k].T
        inner += block[: 2 * k] @ block[2 * k]
    weights = hessian_weights(products, inner)
    product = torch.empty(d, dtype=torch.float64)
    for place in places:
        product[place] = weights @ wide(place)
    return product


def hessian_weights(products: Tensor, inner: Tensor) -> Tensor:
    """H v as a combination of k steps S, k changes Y and v, (2k + 1,), from S [S; Y]^T (k, 2k) and [S; Y] v (2k,).

    Compact form (Byrd, Nocedal and Schnabel 1994, theorem 2.3): with sigma = s y / s s of the newest pair and
    L, D the strictly lower and the diagonal part of S Y^T, H = sigma I - [sigma S; Y]^T M^-1 [sigma S; Y],
    M = [[sigma S S^T, L], [L^T, -D]]. A singular M is taken by its pseudo-inverse; no step at all gives 0.
    """
    k = len(products)
    length = float(products[k - 1, k - 1])
    if length == 0.0:
        return torch.zeros(2 * k + 1, dtype=torch.float64)
    sigma = float(products[k - 1, 2 * k - 1]) / length
    lower = products[:, k:].tril(-1)
    upper_half = torch.cat([sigma * products[:, :k], lower], dim=1)
    lower_half = torch.cat([lower.T, -torch.diag(products[:, k:].diagonal())], dim=1)
    scaled = torch.cat([sigma * inner[:k], inner[k:]])
    size = scaled.abs().max()
    solved = torch.zeros_like(scaled)
    if float(size) > 0.0:
        solved = torch.linalg.pinv(torch.cat([upper_half, lower_half]), rtol=1e-10) @ (scaled / size) * size
    return torch.cat([-sigma * solved[:k], -solved[k:], torch.tensor([sigma], dtype=torch.float64)])


def split_in_two(ordered: Tensor) -> tuple[float, int]:
    """Best 2-means of sorted numbers, exact: (sum of squares within, size of the lower part)."""
    best, cut = float("inf"), 1
    for i in range(1, len(ordered)):
        within = float((ordered[:i] - ordered[:i].mean()).square().sum())
        within += float((ordered[i:] - ordered[i:].mean()).square().sum())
        if within < best:
            best, cut = within, i
    return best, cut


def two_groups(scores: Tensor, rng: torch.Generator) -> Tensor:
    """Members of the higher group if the gap statistic finds more than one: (n,) bool.

    Tibshirani et al. 2001: with W_k the sum of squares within k clusters and W*_k that of uniform samples,
    gap_k = mean log W*_k - log W_k; there is one cluster if gap_1 >= gap_2 - s_2. Fewer than four scores, or
    equal ones, are one cluster. Clusters of numbers on a line are found exactly.
    """
    n = len(scores)
    none = torch.zeros(n, dtype=torch.bool)
    low, high = float(scores.min()), float(scores.max())
    if n < FEWEST or high - low <= 1e-9 * abs(high):
        return none
    unit, order = ((scores - low) / (high - low)).sort(stable=True)
    tiny = 1e-12
    w1 = max(float((unit - unit.mean()).square().sum()), tiny)
    w2, cut = split_in_two(unit)
    logs = torch.empty(REFERENCES, 2, dtype=torch.float64)
    for row in logs:
        drawn = torch.rand(n, generator=rng, device=rng.device).cpu().double().sort().values
        row[0] = (drawn - drawn.mean()).square().sum().log()
        row[1] = torch.tensor(max(split_in_two(drawn)[0], tiny)).log()
    gaps = logs.mean(0) - torch.tensor([w1, max(w2, tiny)], dtype=torch.float64).log()
    slack = float(logs[:, 1].std(correction=0)) * (1 + 1 / REFERENCES) ** 0.5
    if float(gaps[0]) >= float(gaps[1]) - slack:
        return none
    none[order[cut:]] = True
    return none


class FLDetector:
    """The mean without the clients whose updates have long differed from their forecast.

    Zhang et al. 2022 (KDD), algorithms 1 and 2. Forecast of client i: its last update plus H (w - w'), where
    w' is the global vector that update was made from and H the L-BFGS approximation from the last `window`
    steps of the global vector and changes of the mean update. The round's distances to the forecasts are
    divided by their mean; a client's score is the mean of its last `window` such numbers. If the gap statistic
    finds more than one group of scores, the higher one of two is dropped.

    Stated here: updates are deltas, not gradients, which only changes the sign and scale of H; the paper divides by
    the sum, which is the same where all clients take part in every round, but where few of a round's clients are known
    from before, a share of all is large for the first and small for later ones, whoever they are; the paper drops
    detected clients for good and starts training anew, here they are judged anew each round; only clients with at
    least `warmup` scores are judged, before that all are averaged (note `judged`); a client's first round gives none,
    and a run in which nobody could be judged is an error. If half of the judged clients or more are in the higher
    group, nobody is dropped (note `fallback` = 1): the premise that attackers are the erratic minority does not hold
    then. It fails for attackers who repeat themselves more closely than honest clients do. Where few of many clients
    take part in a round it finds much less: forecasts are old, and the gap statistic sees few scores.

    Kept in memory: a row for each client ever seen, the global vectors they were made from, and 2 `window` +
    2 vectors.
    """

    def __init__(self, *, window: int = 10, warmup: int = 3) -> None:
        need(window >= 1, "fldetector", "window >= 1", "Raise it.", window=window)
        bounded = 1 <= warmup <= window
        need(bounded, "fldetector", "1 <= warmup <= window", "Change it.", warmup=warmup, window=window)
        self.window, self.warmup = window, warmup
        self.last = RowMemory("fldetector")
        self.made_at: dict[str, int] = {}  # client id -> round of its last row
        self.vectors: dict[str, Tensor] = {}  # round -> (d,) global vector its rows were made from
        self.marks: dict[str, list[float]] = {}  # client id -> its last normalised distances
        self.steps: list[Tensor] = []  # (d,) changes of the global vector, oldest first
        self.changes: list[Tensor] = []  # (d,) changes of the mean update
        self.before: list[Tensor] = []  # global vector and mean update of the round before

    def __call__(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        enough = ctx.rounds is None or ctx.rounds > self.warmup
        got = {"rounds": ctx.rounds, "warmup": self.warmup}
        need(enough, "fldetector", "more rounds than warmup", "Raise rounds or lower warmup.", **got)
        vector = ctx.global_vector.detach().to("cpu", torch.float32, copy=True)
        fresh = self._score(updates, vector)
        judged = [i for i, name in enumerate(updates.ids) if len(self.marks.get(name, [])) >= self.warmup]
        judged.sort(key=lambda i: updates.ids[i])
        scores = torch.zeros(updates.n, dtype=torch.float64)
        kept = torch.ones(updates.n, dtype=torch.bool)
        for i, name in enumerate(updates.ids):
            marks = self.marks.get(name, [])
            scores[i] = sum(marks) / len(marks) if marks else 0.0
        fallback = False
        if judged:
            places = torch.tensor(judged)
            found = two_groups(scores[places], ctx.rng)
            fallback = 2 * int(found.sum()) >= len(judged)
            kept[places] = ~found | fallback
        weights = kept.double() / int(kept.sum())
        notes = {"judged": float(len(judged)), "fallback": float(fallback)}
        decision = Decision.weighted(updates, weights, kept=kept, scores=scores, notes=notes)
        if self.last.keeps:
            self.last.store(updates, fresh)
            self._remember(updates, ctx.round, vector, decision.update.detach().to("cpu", torch.float32, copy=True))
        return decision

    def _score(self, updates: UpdateMatrix, vector: Tensor) -> Tensor:
        """Append each known client's distance to its forecast, in means of the round; whose row is still to be stored.

        The latter as (n,) bool.
        """
        rows = self.last.of(updates)
        fresh = torch.ones(updates.n, dtype=torch.bool)
        known = [i for i in by_id(updates.ids).tolist() if rows[i] is not None]
        if not known:
            return fresh
        moves = {made: vector - self.vectors[str(made)] for made in {self.made_at[updates.ids[i]] for i in known}}
        if (fast := kernels.for_rules(updates)) is not None:  # the new rows are stored in the same pass
            squares = self._forecast(updates, rows, moves, fast)
            fresh[torch.tensor(known)] = False
        else:
            shifts = {made: self._shift(step) for made, step in moves.items()}
            squares = torch.zeros(updates.n, dtype=torch.float64)
            for place, block in updates.blocks():
                wide = block.cpu().double()
                for i in known:
                    row = rows[i]
                    assert row is not None
                    foreseen = row[place].double() + shifts[self.made_at[updates.ids[i]]][place]
                    squares[i] += (wide[i] - foreseen).square().sum()
        distances = squares.sqrt()
        total = float(distances.sum())
        for i in known:
            mark = float(distances[i]) / total * len(known) if total > 0 else 0.0
            name = updates.ids[i]
            self.marks[name] = [*self.marks.get(name, []), mark][-self.window :]
        return fresh

    def _shift(self, step: Tensor) -> Tensor:
        """H times a step of the global vector, 0 while there is no curvature known: (d,) float64."""
        if not self.steps:
            return torch.zeros(len(step), dtype=torch.float64)
        return hessian_times(self.steps, self.changes, step)

    def _forecast(
        self, updates: UpdateMatrix, rows: Sequence[Tensor | None], moves: Mapping[int, Tensor], fast: Any
    ) -> Tensor:
        """Squared distances of the rows to their forecasts, (n,); the last rows become the new ones.

        `moves` are the steps of the global vector since the round that a row was made in.
        """
        k, made = len(self.steps), sorted(moves)
        vectors = [*self.steps, *self.changes, *(moves[at] for at in made)]
        weights = torch.zeros(len(made), len(vectors), dtype=torch.float64)
        if k:
            of_steps = fast.inner_products(vectors[: 2 * k], vectors[:k]).T
            of_moves = fast.inner_products(vectors[: 2 * k], vectors[2 * k :]).T
            for at, inner in enumerate(of_moves):
                found = hessian_weights(of_steps, inner)
                weights[at, : 2 * k], weights[at, 2 * k + at] = found[:-1], found[-1]
        which = [
            made.index(self.made_at[i]) if row is not None else 0 for i, row in zip(updates.ids, rows, strict=True)
        ]
        squares: Tensor = fast.forecast(updates, rows, vectors, weights, which)
        return squares

    def once(self) -> None:
        """There will be no other round: keep nothing of this one."""
        self.last.keeps = False

    def _remember(self, updates: UpdateMatrix, round: int, vector: Tensor, update: Tensor) -> None:
        if self.before and len(self.before[0]) == len(vector):
            step = vector - self.before[0]
            if bool(step.any()):
                self.steps = [*self.steps, step][-self.window :]
                self.changes = [*self.changes, update - self.before[1]][-self.window :]
        self.before = [vector, update]
        self.made_at.update(dict.fromkeys(updates.ids, round))
        self.vectors[str(round)] = vector.clone()  # a checkpoint takes no tensor twice
        used = {str(made) for made in self.made_at.values()}
        self.vectors = {made: v for made, v in self.vectors.items() if made in used}

    def state_dict(self) -> dict[str, Any]:
        return {
            "last": dict(self.last.rows),
            "made_at": dict(self.made_at),
            "vectors": dict(self.vectors),
            "marks": {name: list(marks) for name, marks in self.marks.items()},
            "steps": list(self.steps),
            "changes": list(self.changes),
            "before": list(self.before),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last.load(state.get("last", {}))
        self.made_at = {name: int(made) for name, made in state.get("made_at", {}).items()}
        self.vectors = {made: vector.cpu() for made, vector in state.get("vectors", {}).items()}
        self.marks = {name: list(marks) for name, marks in state.get("marks", {}).items()}
        self.steps, self.changes, self.before = (
            [vector.cpu() for vector in state.get(name, [])] for name in ("steps", "changes", "before")
        )
