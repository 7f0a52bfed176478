"""Which (epsilon, delta) the noise of a defense has spent, or why none: read off its stages, counted round by round."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.defenses.accountant import compose, gaussian_epsilon, mean_sensitivity
from fedllm_sec.defenses.after import weak_dp
from fedllm_sec.defenses.before import norm_clipping, weak_dp_client
from fedllm_sec.defenses.columns import mean
from fedllm_sec.defenses.noise import each_value
from fedllm_sec.protocols import After, Before, Defense

DELTA = 1e-5
NO_NOISE = "neither weak_dp nor weak_dp_client adds noise"
CHANGED = "the server does not add the update as it is (algorithm.server_lr, momentum or the FL method change it)"


class Spent:
    """What replacing one client could have shown so far, by the Gaussian mechanism of each round.

    Two ways are backed. Of the global models: rows clipped to a number (norm_clipping) by the only stage before a mean
    with equal weights, a server that adds the update as it is, and weak_dp with absolute noise as the first stage
    after. Of the rows themselves, and so of all that is made of them: weak_dp_client with a number as radius as the
    first stage before, whatever rule and server do with the noisy rows.
    """

    def __init__(self, before: Sequence[Before], rule: Defense, after: Sequence[After]) -> None:
        self.mu = 0.0  # of all rounds so far, composed
        self.rows = noise_of_rows(before)
        self.why = None if self.rows is not None else unbacked(before, rule, after)  # why there is no epsilon
        if self.why is None and self.rows is None:
            self.radius = float((settings_if(before[0], norm_clipping) or {})["radius"])
            self.sigma = float((settings_if(after[0], weak_dp) or {})["sigma"])

    def decided(self, d: int) -> None:
        """The stages before the rule have seen a round's rows of d values."""
        if self.rows is not None:  # a row moves by at most 2 C
            self.mu = compose([self.mu, 2 / self.rows(d)])

    def stepped(self, start: Tensor, update: Tensor | None, vector: Tensor, n: int) -> None:
        """The server took `start` (d,) to `vector`, by the `update` that it made of n rows."""
        if self.why is not None or self.rows is not None:
            return
        if update is None or not torch.equal(vector, start.to(vector) + update.to(vector)):
            self.why = CHANGED
        else:
            self.mu = compose([self.mu, mean_sensitivity(self.radius, n) / self.sigma])

    def told(self, delta: float = DELTA, *, sent: str | None = None) -> dict[str, Any]:
        """{"epsilon", "delta", "because"}: one of epsilon and because is None. Before the first round nothing is spent.

        `sent` says what else of the rows the server sends, without noise. An epsilon is that of noise nobody knows: see
        docs/measures.md on the seed that draws it.
        """
        why = self.why if self.rows is not None or self.why is not None else sent
        return {"epsilon": gaussian_epsilon(self.mu, delta) if why is None else None, "delta": delta, "because": why}

    def state_dict(self) -> dict[str, Any]:
        return {"mu": self.mu, "why": self.why}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mu, self.why = float(state["mu"]), state["why"]


def noise_of_rows(before: Sequence[Before]) -> Callable[[int], float] | None:
    """d -> the noise of each of a row's d values in clip lengths, where nothing but numbers decide both; else None."""
    own = settings_if(before[0], weak_dp_client) if before else None
    if own is None or own.get("radius", "median") == "median" or own["sigma"] <= 0:
        return None
    return functools.partial(_each, float(own["sigma"]), bool(own.get("absolute")))


def _each(sigma: float, absolute: bool, d: int) -> float:
    return each_value(sigma, 1.0, d, absolute)


def unbacked(before: Sequence[Before], rule: Defense, after: Sequence[After]) -> str | None:
    """Why the global models of stages like these have no (epsilon, delta) whatever the server does; None: they may."""
    noise = settings_if(after[0], weak_dp) if after else None
    if noise is None:
        if any(settings_if(stage, weak_dp_client) is not None for stage in before):
            return "weak_dp_client is not the first stage, or has no number as radius, or its sigma is 0"
        return NO_NOISE
    if not noise.get("absolute"):
        return "weak_dp's noise is relative to the step, whose length the rows decide (set its absolute: true)"
    if noise["sigma"] <= 0:
        return "weak_dp adds no noise: its sigma is 0"
    clip = settings_if(before[0], norm_clipping) if len(before) == 1 else None
    if clip is None or clip.get("radius", "median") == "median":
        return (
            "rows are not clipped to a number by the only stage before the rule "
            "(defense.before: [{name: norm_clipping, radius: ...}])"
        )
    uniform = settings_if(rule, mean)
    if uniform is None or uniform.get("weights") != "uniform":
        return "the rule is not the mean with equal weights (defense.rule: {name: mean, weights: uniform})"
    return None


def settings_if(part: Any, function: Any) -> dict[str, Any] | None:
    """The settings of `part`, defaults among them, if it is `function` or that with settings bound; else None."""
    bound = part if isinstance(part, functools.partial) else functools.partial(part)
    if bound.func is not function:
        return None
    known = inspect.signature(function).parameters.values()
    defaults = {setting.name: setting.default for setting in known if setting.default is not setting.empty}
    return {**defaults, **bound.keywords}
