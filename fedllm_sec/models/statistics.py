"""Which layers of a model keep running statistics: numbers that training changes and that are no trained parameters."""

from __future__ import annotations

from torch import nn


def tracking(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and layer of each BatchNorm that keeps running statistics."""
    kinds = nn.modules.batchnorm._NormBase
    return [
        (name, part) for name, part in model.named_modules() if isinstance(part, kinds) and part.track_running_stats
    ]
