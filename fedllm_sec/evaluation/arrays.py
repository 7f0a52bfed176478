"""What a small classifier is worth, and what an attack did to it: measured on held-out rows each round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.evaluation.repeatable import Repeatable
from fedllm_sec.evaluation.smoothed import Outcomes
from fedllm_sec.protocols import Labelled


@dataclass
class ArrayEvaluation:
    """Held-out rows on the device. `spread(batches, width, score)` is `Machine.spread`.

    `hits` (classes, classes) bool says whether predicting the column's class on a clean row of the row's class is what
    the attack wants there. `left_out` counts the held-out rows that are neither triggered nor clean, by the reason.
    """

    test: Labelled
    batch_size: int
    triggered: Labelled | None = None  # the attack's probe: y is what the attack wants
    clean: Labelled | None = None  # rows on which the attack's success can happen and would be wrong
    hits: Tensor | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    pairs: tuple[Labelled, Labelled] | None = None  # a few test rows, and the same with the trigger: to be looked at
    learnt: bool = False  # whether the trigger is one that attackers have learnt in the run

    def parts(self) -> dict[str, Labelled]:
        """The rows that are measured, by what they are."""
        named = {"held-out": self.test, "triggered": self.triggered, "clean": self.clean}
        return {name: rows for name, rows in named.items() if rows is not None}

    def quality(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any]:
        """Mean log-loss (nats) and accuracy, over all rows and over those of each class, by its number.

        A row that got no answer (-1: logits that are not finite) is not right.
        """
        found = self._score(task, spread, self.test)
        truth = self.test.y.cpu()
        right = found[:, 1].long() == truth
        present = sorted(set(truth.tolist()))
        return {
            "loss": float(found[:, 0].mean()),
            "perplexity": None,
            "accuracy": wilson(int(right.sum()), len(found)),
            "per_class": {str(c): wilson(int(right[truth == c].sum()), int((truth == c).sum())) for c in present},
            "exact_match": None,
            "token_overlap": None,
        }

    def attack(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any] | None:
        """Attack success rate on the probe, and the rate of the same answers on the clean rows.

        A row that got no answer is no success. Without a clean row the second rate is None, and `reasons` says why.
        """
        if self.triggered is None:
            return None
        hits, false_hits, reasons = *self._hits(task, spread), {}
        assert hits is not None
        if false_hits is None:
            reasons["false_trigger"] = "no held-out row on which the attack's success could happen and would be wrong"
        return {
            "asr": wilson(int(hits.sum()), len(hits)),
            "false_trigger": None if false_hits is None else wilson(int(false_hits.sum()), len(false_hits)),
            "reasons": reasons,
            "left_out": dict(self.left_out),
        }

    def outcomes(self, task: Any, spread: Callable[..., Tensor]) -> Outcomes:
        """What the model answers on each row, for the smoothed test."""
        said = self._score(task, spread, self.test)[:, 1].long()
        return Outcomes(self.test.classes, said, self.test.y.cpu(), *self._hits(task, spread))

    def _hits(self, task: Any, spread: Callable[..., Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Whether the attacker's answer was given on each row of the probe, and on each clean row: (rows,) bool."""
        if self.triggered is None:
            return None, None
        chosen = self._score(task, spread, self.triggered)[:, 1].long()
        false_hits = None
        if self.clean is not None and self.hits is not None and len(self.clean.y):
            said = self._score(task, spread, self.clean)[:, 1].long()
            false_hits = self.hits[self.clean.y.cpu(), said.clamp_min(0)] & (said >= 0)
        return chosen == self.triggered.y.cpu(), false_hits

    def _score(self, task: Any, spread: Callable[..., Tensor], rows: Labelled) -> Tensor:
        batches = list(torch.split(torch.arange(len(rows.y)), self.batch_size))
        if getattr(task, "kept", None) == "batch" and len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]  # over one row layers could not normalise
        return spread(batches, 2, Repeatable(lambda at: task.score(rows, at), ("score", rows)))
