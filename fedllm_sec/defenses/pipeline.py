"""A whole defense: stages before the rule, the rule, stages after the server's step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.defenses.accountant import compose, gaussian_epsilon, mean_sensitivity
from fedllm_sec.defenses.after import weak_dp
from fedllm_sec.defenses.before import norm_clipping
from fedllm_sec.defenses.columns import mean
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.shown import only_shown
from fedllm_sec.protocols import After, Before, Decision, Defense, RoundContext


class Pipeline:
    """before stages -> rule -> server step -> after stages, as one object with one state.

    `decide` answers with weights, kept and scores of the clients themselves, also when a stage such as
    bucketing put other rows in their place. `finish` takes the global vector the server has stepped to.
    """

    def __init__(self, before: Sequence[Before], rule: Defense, after: Sequence[After] = ()) -> None:
        self.before, self.rule, self.after = tuple(before), rule, tuple(after)
        self._sensitivity: float | None = None  # of this round's update, where clipping bounds it
        self._update: Tensor | None = None
        self._mu = 0.0  # of all noised rounds so far, composed
        self._accounted = True

    def decide(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        """Rows to one update, (d,)."""
        rows = updates
        mix: Tensor | None = torch.eye(updates.n, dtype=torch.float64)  # rows = mix @ updates, while that is known
        for stage in self.before:
            with shown_to(stage, ctx, rows=rows.rows):
                changed = stage(rows, ctx)
            step = mixing_step(rows, changed)
            mix = None if mix is None or step is None else step @ mix
            rows = changed
        with shown_to(self.rule, ctx, rows=rows.rows):
            decision = self.rule(rows, ctx)
        self._sensitivity, self._update = self._bounded(updates.n), decision.update
        return for_clients(decision, rows, updates, mix)

    def finish(self, vector: Tensor, ctx: RoundContext) -> Tensor:
        """The new global vector (d,) to the one that is kept."""
        self._account(vector, ctx)
        for stage in self.after:
            with shown_to(stage, ctx, new_vector=vector):
                vector = stage(vector, ctx)
        return vector

    def rehearse(self, updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        """What `decide` would answer, with no change to this pipeline's state: for attackers who may try."""
        return copy.deepcopy(self).decide(updates, ctx)

    def privacy(self, delta: float = 1e-5) -> dict[str, float] | None:
        """{"epsilon", "delta"} spent so far on replacing one client, or None if no accountant backs it.

        Backed is: each round, rows clipped to a number (norm_clipping) as the last stage before a uniform
        mean, a server that adds the update as it is, and weak_dp with absolute noise as the first stage
        after.
        """
        if not self._accounted or self._mu == 0.0:
            return None
        return {"epsilon": gaussian_epsilon(self._mu, delta), "delta": delta}

    def _bounded(self, n: int) -> float | None:
        clip = settings_if(self.before[-1], norm_clipping) if len(self.before) == 1 else None
        uniform = settings_if(self.rule, mean)
        if clip is None or uniform is None or uniform.get("weights") != "uniform":
            return None
        radius = clip.get("radius", "median")
        return None if radius == "median" else mean_sensitivity(float(radius), n)

    def _account(self, vector: Tensor, ctx: RoundContext) -> None:
        noise = settings_if(self.after[0], weak_dp) if self.after else None
        update, sensitivity, self._update = self._update, self._sensitivity, None
        if noise is None or not noise.get("absolute") or noise["sigma"] <= 0 or sensitivity is None or update is None:
            self._accounted = False
        elif torch.equal(vector, ctx.global_vector.to(vector) + update.to(vector)):
            self._mu = compose([self._mu, sensitivity / float(noise["sigma"])])
        else:
            self._accounted = False

    def state_dict(self) -> dict[str, Any]:
        """The state of all parts that have one: tensors, numbers and strings in dicts."""
        parts = {name: part.state_dict() for name, part in self._parts() if hasattr(part, "state_dict")}
        return {"parts": parts, "mu": self._mu, "accounted": self._accounted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a pipeline with the same parts."""
        for name, part in self._parts():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(state["parts"][name])
        self._mu, self._accounted = float(state["mu"]), bool(state["accounted"])

    def _parts(self) -> list[tuple[str, Any]]:
        before = [(f"before{i}", part) for i, part in enumerate(self.before)]
        after = [(f"after{i}", part) for i, part in enumerate(self.after)]
        return [*before, ("rule", self.rule), *after]


def shown_to(part: Any, ctx: RoundContext, **seen: Tensor) -> AbstractContextManager[None]:
    """A DefenseError that names the stage or rule, if it writes into the rows or the vectors it was shown."""
    made = part.func if isinstance(part, functools.partial) else part
    name = getattr(made, "__name__", type(made).__name__)
    vectors = {"global_vector": ctx.global_vector, "last_update": ctx.last_update, "root_update": ctx.root_update}
    return only_shown(name, DefenseError, **seen, **vectors)


def settings_if(part: Any, function: Any) -> dict[str, Any] | None:
    """The settings of `part` if it is `function` with settings bound, as `resolve` makes it; else None."""
    if part is function:
        return {}
    if isinstance(part, functools.partial) and part.func is function:
        return dict(part.keywords)
    return None


def mixing_step(old: UpdateMatrix, new: UpdateMatrix) -> Tensor | None:
    """W with new = W @ old as (k, n) float64, or None where the rows were replaced by others."""
    if new.rows is old.rows:
        start = torch.eye(old.sources, dtype=torch.float64) if old.mixing is None else old.mixing
        end = torch.eye(new.sources, dtype=torch.float64) if new.mixing is None else new.mixing
        step: Tensor = end @ torch.linalg.pinv(start)
        return step
    if new.ids == old.ids:  # noise and the like: each row is still its client's
        return torch.eye(old.n, dtype=torch.float64)
    return None


def for_clients(decision: Decision, rows: UpdateMatrix, updates: UpdateMatrix, mix: Tensor | None) -> Decision:
    """The decision on `rows` = mix @ updates, told in terms of the clients of `updates`.

    Weights become mix^T w. Where a row is still one client's, scores and kept stay; where rows are groups,
    a client's score is the average over the groups it is in, and kept is not said, unless no row was kept: then no
    client was.
    """
    if rows.ids == updates.ids:
        weights = decision.weights if mix is None or decision.weights is None else mix.T @ decision.weights
        return replace(decision, weights=weights)
    nobody = decision.kept is not None and not bool(decision.kept.any())
    kept = torch.zeros(updates.n, dtype=torch.bool) if nobody else None
    if mix is None:
        return replace(decision, weights=None, kept=kept, scores=None)
    weights = None if decision.weights is None else mix.T @ decision.weights
    share = mix.abs()
    share = share / share.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    scores = None if decision.scores is None else share.T @ decision.scores
    return replace(decision, weights=weights, kept=kept, scores=scores)
