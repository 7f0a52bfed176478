"""The smoothed test of a model: what most of its noisy copies answer, and how large a backdoor cannot change that."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fedllm_sec.evaluation.certify import smoothed_votes, vote_bounds
from fedllm_sec.evaluation.intervals import wilson

STEPS = 4  # radii at which certified accuracy is told, besides 0


@dataclass(frozen=True)
class Outcomes:
    """What one model answers on held-out rows. None: the task has no classes, or the run no attack to be judged."""

    classes: int
    said: Tensor | None = None  # (rows,) the class that is named; -1: none
    truth: Tensor | None = None  # (rows,) the right one; -1: the row has none
    hits: Tensor | None = None  # (probe rows,) bool: the attacker's answer
    false_hits: Tensor | None = None  # (clean rows,) bool: the same answer without the trigger


class Answering(Protocol):
    """An evaluation that can say what a model answers, row by row."""

    def outcomes(self, task: Any, spread: Callable[..., Tensor]) -> Outcomes: ...


@dataclass(frozen=True)
class Smoothing:
    """How the last model is smoothed. `radius` certifies two vote bounds, `why` says why there is none."""

    sigma: float  # noise of each value of the global vector
    copies: int
    radius: Callable[[float, float], float] | None = None
    why: str = ""


def smoothed(
    evaluation: Answering,
    task: Any,
    vector: Tensor,
    spread: Callable[..., Tensor],
    smoothing: Smoothing,
    rng: torch.Generator,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What stands in `quality` and in `attack` of the smoothed model, {} where there is nothing to be judged.

    Its class is the one that most copies name; it gives the attacker's answer where more than half of them do.
    """

    def answers(noisy: Tensor) -> Outcomes:
        with torch.no_grad():
            task.parameters.copy_(noisy)
        return evaluation.outcomes(task, spread)

    def predict(noisy: Tensor) -> Tensor:
        found = answers(noisy)
        said = [] if found.said is None else [found.said.long() + 1]  # 0: none
        return torch.cat([*said, *(part.long() for part in (found.hits, found.false_hits) if part is not None)])

    known = answers(vector)
    if known.said is None and known.hits is None:
        return {}, {}
    votes = smoothed_votes(
        predict, vector, sigma=smoothing.sigma, copies=smoothing.copies, classes=max(known.classes, 1) + 1, rng=rng
    )
    with torch.no_grad():
        task.parameters.copy_(vector)
    sizes = [0 if part is None else len(part) for part in (known.said, known.hits, known.false_hits)]
    of_rows, of_probe, of_clean = torch.split(votes, sizes)
    quality: dict[str, Any] = {}
    if known.truth is not None:
        quality = _accuracy(of_rows[known.truth >= 0], known.truth[known.truth >= 0], smoothing)
    attack = {
        name: wilson(int((part[:, 1] > smoothing.copies / 2).sum()), len(part))
        for name, part, rows in (
            ("smoothed_asr", of_probe, known.hits),
            ("smoothed_false_trigger", of_clean, known.false_hits),
        )
        if rows is not None
    }
    return quality, attack


def _accuracy(votes: Tensor, truth: Tensor, smoothing: Smoothing) -> dict[str, Any]:
    """Smoothed accuracy, and by radius the share of rows that are right and certified to stay so."""
    winner, lower, upper = vote_bounds(votes)
    right = winner == truth + 1
    found: dict[str, Any] = {"smoothed_accuracy": wilson(int(right.sum()), len(truth)), "certified": None}
    if smoothing.radius is None:
        return {**found, "reasons": {"certified": smoothing.why}}
    radius = functools.cache(smoothing.radius)  # votes are whole numbers: few bounds differ
    radii = [radius(a, b) for a, b in zip(lower[right].tolist(), upper[right].tolist(), strict=True)]
    found["certified"] = {f"{r:.3g}": wilson(sum(own >= r for own in radii), len(truth)) for r in shown(radii)}
    return found


def shown(radii: Sequence[float]) -> list[float]:
    """0 and STEPS equal steps to the largest finite radius, rounded down to 3 digits."""
    top = max((r for r in radii if r < math.inf), default=0.0)
    return list(dict.fromkeys(_down(top * k / STEPS) for k in range(STEPS + 1)))


def _down(value: float) -> float:
    if value <= 0:
        return 0.0
    unit: float = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.floor(value / unit) * unit
