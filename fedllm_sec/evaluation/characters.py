"""What a character model is worth, and what a label flip did to it: measured on held-out text each round."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.evaluation.intervals import wilson
from fedllm_sec.evaluation.repeatable import Repeatable
from fedllm_sec.protocols import Labelled


@dataclass
class CharEvaluation:
    """Held-out sequences on the device. `spread(batches, width, score)` is `Machine.spread`."""

    test: Labelled
    batch_size: int
    attacked: Labelled | None = None  # clean sequences on which the flip is looked for
    wanted: Tensor | None = None  # (characters,) what the attack wants in the place of each, -1 where nothing

    def _batches(self, rows: Labelled) -> tuple[Tensor, ...]:
        return torch.split(torch.arange(len(rows.y)), self.batch_size)

    def quality(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any]:
        """Log-loss per character (nats), perplexity, and the share of characters predicted right.

        The interval of the accuracy takes characters as independent, which makes it somewhat too narrow.
        """
        score = Repeatable(lambda at: task.score(self.test, at), ("score", self.test))
        sums = spread(self._batches(self.test), 2, score).sum(0)
        n = self.test.y.numel()
        loss = float(sums[0]) / n
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": wilson(int(sums[1]), n),
            "per_class": None,
            "exact_match": None,
            "token_overlap": None,
        }

    def attack(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any] | None:
        """How often a flipped character's substitute is predicted in its place, and a substitute in another's place.

        A place counts for false triggers where its character is not flipped and a substitute would be wrong: with
        {e: a} all places but those of e and a.
        """
        if self.attacked is None or self.wanted is None:
            return None
        rows, wanted = self.attacked, self.wanted
        taken = Repeatable(lambda at: task.taken_for(rows, at, wanted), ("taken for", rows, wanted))
        sums = spread(self._batches(rows), 4, taken).sum(0)
        hits, places, false, others = (int(s) for s in sums)
        rates = {"asr": wilson(hits, places), "false_trigger": wilson(false, others)}
        why = {
            "asr": "none of the flipped characters occurs in the held-out text",
            "false_trigger": "no character of the held-out text is neither flipped nor a substitute",
        }
        beside = rows.y.numel() - places - others
        left_out = {"characters that flipped ones are replaced by": beside} if beside else {}
        return {**rates, "reasons": {k: why[k] for k, v in rates.items() if v is None}, "left_out": left_out}
