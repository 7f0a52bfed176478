"""All trainable parameters of a model as views of one flat vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedllm_sec.errors import DataError
from fedllm_sec.models.statistics import tracking


def flatten(parameters: Sequence[torch.nn.Parameter]) -> torch.nn.Parameter:
    """One flat float32 vector (d,) of which the parameters, and their gradients, become views."""
    if not parameters:
        raise DataError("model: it has no trainable parameters. Check model.lora.")
    devices = {p.device for p in parameters}
    flat = torch.nn.Parameter(torch.cat([p.detach().reshape(-1).float() for p in parameters]))
    if len(devices) > 1:
        raise DataError(f"model: trainable parameters lie on several devices {devices}.")
    flat.grad = torch.zeros_like(flat)
    start = 0
    for p in parameters:
        place = slice(start, start + p.numel())
        p.data = flat.data[place].view(p.shape)
        p.grad = flat.grad[place].view(p.shape)
        start = place.stop
    return flat


def refuse_running_statistics(model: torch.nn.Module) -> None:
    """An error for BatchNorm with running statistics: one model serves all clients in turn, and they would mix."""
    for name, part in tracking(model):
        raise DataError(
            f"model: {name} ({type(part).__name__}) keeps running statistics. They are no trained parameters, so "
            "they are in no update: no client could share them and no defense could see them, and the one model in "
            "memory would carry them from client to client. Use GroupNorm, or track_running_stats=False."
        )
