"""Prediction of the next character: a batch is rows of a tensor of character numbers on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm_sec.protocols import Labelled
from fedllm_sec.tasks.classify import Classify, Rows, chosen


class NextChar(Classify):
    """Every position of a sequence is scored; a shard is `Labelled` with x and y (n, length) int64."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        super().__init__(model, device)

    def loss(self, shard: Labelled, rows: Rows, *numbers: Tensor) -> Tensor:
        at = torch.as_tensor(rows, device=self.device)
        logits = self.model(shard.x[at]).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), shard.y[at].flatten())

    @torch.no_grad()
    def score(self, shard: Labelled, rows: Rows) -> Tensor:
        """Sum of log-losses, and how many characters were right, in each sequence: (b, 2) float64."""
        logits, truth = self._logits(shard, rows)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), truth, reduction="none")
        right = (chosen(logits) == truth).double()
        return torch.stack([losses.double().sum(1), right.sum(1)], dim=1).cpu()

    @torch.no_grad()
    def taken_for(self, shard: Labelled, rows: Rows, wanted: Tensor) -> Tensor:
        """How often a flip shows in each sequence: (b, 4) float64 hits, places, false hits and their places.

        `wanted` (characters,) gives the character that the attack wants in the place of each, -1 where none. A false
        hit is one of these in the place of a character that is not flipped and is not the predicted one itself.
        """
        logits, truth = self._logits(shard, rows)
        said, wanted = chosen(logits), wanted.to(self.device)
        aim, substitutes = wanted[truth], wanted[wanted >= 0].unique()
        possible = (aim < 0) & (substitutes != truth[..., None]).any(-1)
        false = possible & (said != truth) & torch.isin(said, substitutes)
        counts = [(aim >= 0) & (said == aim), aim >= 0, false, possible]
        return torch.stack([c.sum(1) for c in counts], dim=1).double().cpu()

    def _logits(self, shard: Labelled, rows: Rows) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(rows, device=self.device)
        return self.model(shard.x[at]).float(), shard.y[at]
