"""PoisonedFL: the same signs in every round, as long as the model lets itself be pushed that way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.attacks.update.sight import repeat
from fedllm_sec.errors import AttackError
from fedllm_sec.protocols import ThreatView

LEAST = 0.5  # below this the factor is lowered no more
CONFIDENCE = 0.99  # of the binomial test


class PoisonedFL:
    """One random sign vector for the whole run; how large each coordinate and the row are is read off the last step.

    Xie et al. 2025 (PoisonedFL, CVPR), algorithm 1: row = c ||g|| k * s, with s the signs drawn once, g the last
    global step, k the unit vector of |g - (||g|| / ||m||) m| and m the attackers' last row: k is what in g was not
    theirs. Every `every` rounds c becomes 0.7 c (not below 0.5) where fewer coordinates of the model moved with s since
    the last look than chance allows at 1 %. All attackers send the same row, and no honest row is needed.

    Stated here: `factor` is the paper's c_0 (8), `every` its e (50); the 1 % point is the binomial's for any d, not a
    table of four; coordinates that did not move count as moved against s (the authors look at their value instead). In
    its first round an attacker knows no last step and sends its own row; where g - (||g|| / ||m||) m is zero, so is the
    row.
    """

    def __init__(self, *, factor: float = 8.0, every: int = 50) -> None:
        if factor <= 0:
            raise AttackError(f"poisonedfl.factor: {factor}: must be above 0.")
        if every < 1:
            raise AttackError(f"poisonedfl.every: {every}: must be a number of rounds from 1.")
        self.factor, self.every = factor, every
        self.signs: Tensor | None = None  # (d,) int8
        self.last: Tensor | None = None  # (d,) what the attackers sent last
        self.seen: Tensor | None = None  # (d,) the global vector at the last look
        self.rounds = 0  # attacked since then

    def __call__(self, view: ThreatView) -> Tensor:
        if self.signs is None:
            drawn = torch.rand(view.own.shape[1], generator=view.rng, device=view.rng.device) < 0.5
            self.signs = (1 - 2 * drawn.to(torch.int8)).cpu()
            self.seen = view.global_vector.detach().float().cpu().clone()
        self.rounds += 1
        if self.rounds > self.every:
            self._look(view.global_vector)
        if view.last_update is None:
            rows = view.own.float().clone()
            self.last = rows[0].cpu()
            return rows
        row = self._row(view.last_update.double().cpu())
        self.last = row
        return repeat(row.to(view.own.device), len(view.own))

    def _row(self, step: Tensor) -> Tensor:
        """The row (d,) float32, from the last global step (d,) float64."""
        assert self.signs is not None
        mine = torch.zeros_like(step) if self.last is None else self.last.double()
        size, length = float(step.norm()), float(mine.norm())
        sizes = (step - mine * (size / length if length > 0 else 0.0)).abs()
        sizes /= sizes.norm().clamp_min(torch.finfo(torch.float64).tiny)
        return (self.factor * size * sizes * self.signs).float()

    def _look(self, vector: Tensor) -> None:
        """Lower the factor where the model has not moved with the signs since the last look, and begin anew."""
        assert self.signs is not None
        assert self.seen is not None
        from scipy.stats import binom  # a second and a half of processor time, which other runs need not spend

        now = vector.detach().float().cpu()
        along = int(((now - self.seen).sign() == self.signs).sum())
        if along < int(binom.ppf(CONFIDENCE, len(now), 0.5)) and 0.7 * self.factor >= LEAST:
            self.factor *= 0.7
        self.seen, self.rounds = now.clone(), 1

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"factor": self.factor, "rounds": self.rounds}
        known = {"signs": self.signs, "last": self.last, "seen": self.seen}
        return state | {name: value for name, value in known.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.factor, self.rounds = float(state["factor"]), int(state["rounds"])
        self.signs, self.last, self.seen = state.get("signs"), state.get("last"), state.get("seen")
