"""An attack on what a model holds beside its vector, which no rule on rows sees."""

from __future__ import annotations

from torch import Tensor

from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import ThreatView


class BnStatistics:
    """Poisoned statistics of BatchNorm: running means and variances times a factor; the row stays the attacker's own.

    A model normalises by them in evaluation only, so the training loss shows nothing. No paper; averaging statistics
    without a look at them is common practice. The server refuses negative variances and what is far from the usual
    (`defenses/buffers.py`), so a factor that is to act stays below its bounds.
    """

    def __init__(self, *, mean: float = -1.0, variance: float = 50.0) -> None:
        if mean == 1.0 and variance == 1.0:
            raise AttackError("bn_statistics: mean and variance times 1 are the client's own. Give other factors.")
        self.mean, self.variance = mean, variance

    def __call__(self, view: ThreatView) -> Tensor:
        return view.own.clone()

    def forge_buffers(self, own: Tensor, layout: Layout) -> Tensor:
        """Buffers (m, b + c) to submit instead of the attackers' own; `layout` is that of the b floats."""
        forged = own.clone()
        for name, place in layout.slices().items():
            if name.endswith("running_mean"):
                forged[:, place] *= self.mean
            elif name.endswith("running_var"):
                forged[:, place] *= self.variance
        return forged
