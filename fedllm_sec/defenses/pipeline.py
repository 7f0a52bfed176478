"""A whole defense: stages before the rule, the rule, stages after the server's step."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.defenses.privacy import DELTA, Spent
from fedllm_sec.defenses.space import Space
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.factors import NoColumns
from fedllm_sec.matrix.shown import only_shown, plain
from fedllm_sec.protocols import After, Before, Decision, Defense, RoundContext
from fedllm_sec.seeds import generator_for


class Pipeline:
    """before stages -> rule -> server step -> after stages, as one object with one state.

    `decide` answers with weights and kept of the clients themselves, also when a stage such as bucketing put other
    rows in their place. `finish` takes the global vector the server has stepped to. Each stage draws from a stream of
    its own, so no two noises of a round are one.
    """

    def __init__(
        self, before: Sequence[Before], rule: Defense, after: Sequence[After] = (), enter: Space | None = None
    ) -> None:
        self.enter = enter  # what the rows are compared as (space.py); None: as they are
        self.before, self.rule, self.after = tuple(before), rule, tuple(after)
        for part in (*self.before, rule):
            _need_to_take(part, "updates", "ctx")
        for part in self.after:
            _need_to_take(part, "vector", "ctx")
        self.spent = Spent(self.before, rule, self.after)
        if enter is not None and enter.unbacked is not None:
            self.spent.rows, self.spent.why = None, enter.unbacked
        self._made: tuple[Tensor | None, int] = None, 0  # this round's update, and of how many rows
        self.noted: dict[str, float] = {}  # what the stages after the server's step have to say of this round

    def decide(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        """Rows to one update, (d,)."""
        rows, trace, seed, renaming, self.noted = updates, Trace(updates), drawn_seed(ctx), "", {}
        if self.enter is not None:
            rows = self.enter(updates, ctx)
            trace.follow(updates, rows)
        for i, stage in enumerate(self.before):
            own, rows = drawing(ctx, seed, f"before{i}"), readable(stage, rows, trace)
            changed = self._acted(stage, rows, own, updates, renaming, UpdateMatrix)
            trace.follow(rows, changed)
            if set(changed.ids) - set(updates.ids) - set(rows.ids):
                renaming = name_of(stage)
            rows = changed
        rows = readable(self.rule, rows, trace)
        decision = self._acted(self.rule, rows, drawing(ctx, seed, "rule"), updates, renaming, Decision)
        need_shapes(self.rule, decision, rows)
        if not own_part(self.rule) and not bool(decision.update.isfinite().all()):
            raise DefenseError(f"{name_of(self.rule)}: gave back an update with values that are no finite numbers.")
        decision = replace(decision, notes={**ctx.notes, **decision.notes})
        self._made = decision.update, updates.n
        self.spent.decided(updates.d)
        return decision if rows is updates else for_clients(decision, rows, updates, trace.mix(rows))

    @staticmethod
    def _acted(
        part: Any, rows: UpdateMatrix, ctx: RoundContext, clients: UpdateMatrix, renaming: str, wanted: type
    ) -> Any:
        """What a stage or the rule makes of rows, some of which the stage `renaming` gave names that are no client's.

        Who remembers them by that name remembers other clients in every round: a DefenseError.
        """
        known = set(clients.ids)
        strange = [id for id in rows.ids if id not in known] if renaming else []
        try:
            with shown_to(part, ctx, rows=rows.rows):
                made = part(rows, ctx)
            if not isinstance(made, wanted):
                raise DefenseError(f"{name_of(part)}: gave back {type(made).__name__}, no {wanted.__name__}.")
        except NoColumns as error:
            raise DefenseError(f"{name_of(part)}: {error}") from error
        except DefenseError as error:
            if not strange:
                raise
            seen = f"It was given the {rows.n} rows {strange[0]}, ... that {renaming} made of {clients.n} clients'."
            raise DefenseError(f"{error} {seen}") from error
        if strange and (remembered := set(strange) & set(keys_of(state_of(part)))):
            raise DefenseError(
                f"{name_of(part)}: remembers clients by id from round to round, and {renaming} before it gives rows "
                f'that are no client\'s ("{min(remembered)}", other clients in every round). Drop {renaming} or choose '
                "a rule that does not remember clients."
            )
        return made

    def finish(self, vector: Tensor, ctx: RoundContext) -> Tensor:
        """The new global vector (d,) to the one that is kept."""
        update, n = self._made
        self.spent.stepped(ctx.global_vector, update, vector, n)
        self._made = None, 0
        seed = drawn_seed(ctx)
        for i, stage in enumerate(self.after):
            own = drawing(ctx, seed, f"after{i}")
            with shown_to(stage, own, new_vector=vector):
                made = stage(vector, own)
            need_shape(stage, "a vector", made, vector.shape)
            vector = made
        self.noted = dict(ctx.notes)
        return vector

    def rehearse(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        """What `decide` would answer, with no change to this pipeline's state: for attackers who may try."""
        return copy.deepcopy(self).decide(updates, ctx)

    def privacy(self, delta: float = DELTA, *, sent: str | None = None) -> dict[str, Any]:
        """{"epsilon", "delta", "because"}: what is spent so far on replacing one client, or why no number holds."""
        return self.spent.told(delta, sent=sent)

    def state_dict(self) -> dict[str, Any]:
        """The state of all parts that have one: tensors, numbers and strings in dicts."""
        parts = {name: state_of(part) for name, part in self._parts() if hasattr(part, "state_dict")}
        return {"parts": parts, "spent": self.spent.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a pipeline with the same parts."""
        for name, part in self._parts():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(state["parts"][name])
        self.spent.load_state_dict(state["spent"])

    def _parts(self) -> list[tuple[str, Any]]:
        before = [(f"before{i}", part) for i, part in enumerate(self.before)]
        after = [(f"after{i}", part) for i, part in enumerate(self.after)]
        return [*before, ("rule", self.rule), *after]


def _need_to_take(part: Any, *given: str) -> None:
    """A DefenseError where a stage or rule, of one's own perhaps, cannot be called as they all are."""
    try:
        inspect.signature(part).bind(*given)
    except TypeError as error:
        raise DefenseError(f"{name_of(part)}: cannot be called with ({', '.join(given)}): {error}.") from error


def need_shape(part: Any, what: str, given: Any, shape: Sequence[int]) -> None:
    """A DefenseError where a stage or rule gave something else than a tensor of this shape."""
    if not isinstance(given, Tensor) or given.shape != shape:
        seen = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"of type {type(given).__name__}"
        raise DefenseError(f"{name_of(part)}: gave back {what} {seen}, must be a tensor of shape {tuple(shape)}.")


def need_shapes(rule: Any, decision: Decision, rows: UpdateMatrix) -> None:
    """A DefenseError where a part of a decision on rows has another form than `Decision` says."""
    need_shape(rule, "an update", decision.update, (rows.d,))
    for name in ("weights", "kept", "scores"):
        if (value := getattr(decision, name)) is not None:
            need_shape(rule, name, value, (rows.n,))
    for name, value in decision.notes.items():
        if not isinstance(value, (int, float)):
            raise DefenseError(f"{name_of(rule)}: its note {name} is of type {type(value).__name__}, no number.")


def drawn_seed(ctx: RoundContext) -> int:
    """A number drawn from the context's stream, to seed the streams of the stages with."""
    return int(torch.randint(2**63 - 1, (), generator=ctx.rng, device=ctx.rng.device))


def drawing(ctx: RoundContext, seed: int, stage: str) -> RoundContext:
    """The context with the stream of one stage: whatever the others draw, and under the same seed, it draws its own."""
    return replace(ctx, rng=generator_for(seed, stage, device=ctx.rng.device))


def name_of(part: Any) -> str:
    """How a stage or rule is called in the code."""
    made = part.func if isinstance(part, functools.partial) else part
    return str(getattr(made, "__name__", type(made).__name__))


def own_part(part: Any) -> bool:
    """Whether a stage or rule is of this package."""
    made = part.func if isinstance(part, functools.partial) else part
    return str(getattr(made, "__module__", type(made).__module__)).startswith("fedllm_sec.")


def readable(part: Any, rows: UpdateMatrix, trace: Trace) -> UpdateMatrix:
    """The rows as a stage or rule gets them: one from outside may read `rows` itself, which then holds nothing else."""
    if own_part(part):
        return rows
    try:
        stored = plain(rows)
    except NoColumns as error:
        raise DefenseError(f"{name_of(part)}: {error}") from error
    trace.follow(rows, stored)
    return stored


def state_of(part: Any) -> dict[str, Any]:
    """What a part remembers, {} where it does not."""
    return dict(part.state_dict()) if hasattr(part, "state_dict") else {}


def keys_of(state: Any) -> Iterator[str]:
    """The keys of a state, however deep: client ids are among them."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield str(key)
            yield from keys_of(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from keys_of(value)


def shown_to(part: Any, ctx: RoundContext, **seen: Tensor) -> AbstractContextManager[None]:
    """A DefenseError that names the stage or rule, if it writes into the rows or the vectors it was shown."""
    vectors = {"global_vector": ctx.global_vector, "last_update": ctx.last_update, "root_update": ctx.root_update}
    return only_shown(name_of(part), DefenseError, **seen, **vectors)


class Trace:
    """What the rows are made of, followed from stage to stage: W with rows = W @ updates, while that is known.

    A lazy mix says so itself. Rows that a stage has put in place of others (noise and the like) are those of the
    client whose id they bear; see `protocols.Before`.
    """

    def __init__(self, updates: UpdateMatrix) -> None:
        self.start = updates  # rows that hold the same stored rows as the present ones
        self.before: Tensor | None = None  # (n, clients) with start = before @ updates; None: the identity
        self.known = True

    def follow(self, rows: UpdateMatrix, changed: UpdateMatrix) -> None:
        """A stage made `changed` of `rows`."""
        if changed.rows is rows.rows or not self.known:
            return
        place = {id: i for i, id in enumerate(rows.ids)}
        self.known = set(changed.ids) <= set(place)
        if self.known:
            self.before = self._mix(rows)[[place[id] for id in changed.ids]]
            self.start = changed

    def mix(self, rows: UpdateMatrix) -> Tensor | None:
        """W (k, n) float64 for the present rows; None where rows were replaced and bear other ids."""
        return self._mix(rows) if self.known else None

    def _mix(self, rows: UpdateMatrix) -> Tensor:
        step = mixture(rows, self.start)
        return step if self.before is None else step @ self.before


def mixture(rows: UpdateMatrix, start: UpdateMatrix) -> Tensor:
    """W (k, n) float64 with rows = W @ start, which hold the same stored rows. What is not mixed in is exactly 0.

    Where `start` is chosen and scaled rows, as a round's are, nothing is lost; where it mixes them itself, what is left
    of zeros by rounding becomes 0 again.
    """
    end = torch.eye(rows.sources, dtype=torch.float64) if rows.mixing is None else rows.mixing
    if start.mixing is None:
        return end
    used = start.mixing != 0
    if bool((used.sum(0) <= 1).all()) and bool((used.sum(1) <= 1).all()):
        return end @ torch.where(used, 1 / start.mixing, 0.0).T
    step: Tensor = end @ torch.linalg.pinv(start.mixing)
    return torch.where(step.abs() <= 1e-12 * step.abs().max(), 0.0, step)


def for_clients(decision: Decision, rows: UpdateMatrix, updates: UpdateMatrix, mix: Tensor | None) -> Decision:
    """The decision on `rows` = mix @ updates, told in terms of the clients of `updates`.

    Weights become mix^T w. A verdict on rows is one on clients only where each row is one client's, scaled at most:
    then kept and scores are theirs, and a client that a stage left out is not kept. Where rows mix clients, a row's
    score is nobody's, and a client is kept whose row has a weight in the update; of a rule without weights, whose row
    is in a row that was kept. Where it is not known what the rows are made of only "nobody" can be told.
    """
    kept, weights, n = decision.kept, decision.weights, updates.n
    if mix is None:
        nobody = kept is not None and not bool(kept.any())
        return replace(decision, weights=None, kept=torch.zeros(n, dtype=torch.bool) if nobody else None, scores=None)
    weights = None if weights is None else mix.T @ weights.to(mix)
    if (own := own_places(rows, updates, mix)) is None:
        if kept is not None:
            kept = weights != 0 if weights is not None else (mix[kept.cpu()] != 0).any(0)
        return replace(decision, weights=weights, kept=kept, scores=None)
    if kept is not None:
        kept = torch.zeros(n, dtype=torch.bool).index_fill_(0, own[kept.cpu()], True)
    scores = decision.scores
    if scores is not None:  # a client without a row has none
        scores = None if len(own) < n else torch.empty_like(scores).index_copy_(0, own.to(scores.device), scores)
    return replace(decision, weights=weights, kept=kept, scores=scores)


def own_places(rows: UpdateMatrix, updates: UpdateMatrix, mix: Tensor) -> Tensor | None:
    """Whose each of the rows is, (k,) places among the clients; None where some row is not one client's alone."""
    place = {id: i for i, id in enumerate(updates.ids)}
    if rows.ids == updates.ids:
        own = torch.arange(updates.n)
    elif set(rows.ids) <= set(place) and len(set(rows.ids)) == rows.n:
        own = torch.tensor([place[id] for id in rows.ids])
    else:
        return None
    others = mix.clone()
    others[torch.arange(rows.n), own] = 0
    return None if bool(others.any()) else own
