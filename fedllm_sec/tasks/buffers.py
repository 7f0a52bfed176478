"""What a model holds beside its trained parameters: running statistics of BatchNorm, and other buffers.

They are no part of the vector on which rules measure distances, cosines and signs: clustered or clipped with weights
they would be weighed against gradients. They travel beside it as one more vector, floats first, then counters, in
float64, in which both are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedllm_sec.errors import DataError
from fedllm_sec.matrix import Layout
from fedllm_sec.models.statistics import tracking

Mode = Literal["average", "local", "batch"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Buffers:
    """The persistent buffers of a model as views of two flat vectors: `floats` (b,) float32, `counters` (c,) int64.

    `initial` (b + c,) is what they were at first: the model in memory holds those of whoever used it last.
    """

    def __init__(self, model: nn.Module) -> None:
        kept = [place for place in _persistent(model) if place[3].dtype != torch.bool]  # masks stay as they are
        self.layout, self.floats = _views([place for place in kept if place[3].is_floating_point()], torch.float32)
        self.counted, self.counters = _views([place for place in kept if not place[3].is_floating_point()], torch.int64)
        self.initial = self.read().cpu()

    def read(self) -> Tensor:
        """A copy of what the model holds now: (b + c,) float64."""
        return torch.cat([self.floats.double(), self.counters.double()])

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Let the model hold these: (b + c,)."""
        self.floats.copy_(values[: len(self.floats)])
        self.counters.copy_(values[len(self.floats) :].long())

    def tensors(self) -> dict[str, Tensor]:
        """Every buffer by name, as a file holds it."""
        return {**self.layout.split(self.floats), **self.counted.split(self.counters)}

    def named(self, values: Tensor) -> dict[str, Tensor]:
        """Buffers (b + c,) by name, as the model would hold them."""
        floats, counters = values[: len(self.floats)].float(), values[len(self.floats) :].long()
        return {**self.layout.split(floats), **self.counted.split(counters)}


Place = tuple[nn.Module, str, str, Tensor]  # module, key, full name, value


def _persistent(model: nn.Module) -> Iterator[Place]:
    """Each buffer that a state dict holds, in order."""
    for prefix, part in model.named_modules():
        for key, value in part._buffers.items():
            if value is not None and key not in part._non_persistent_buffers_set:
                yield part, key, f"{prefix}.{key}".lstrip("."), value


def _views(places: Sequence[Place], dtype: torch.dtype) -> tuple[Layout, Tensor]:
    """The buffers at these places, made views of one flat vector; one that several modules share is in it once."""
    once = list({id(value): (name, value) for *_, name, value in reversed(places)}.values())[::-1]
    layout = Layout.of(once)
    flat = torch.cat([value.reshape(-1).to(dtype) for _, value in once] or [torch.zeros(0, dtype=dtype)])
    views = {id(value): view for (_, value), view in zip(once, layout.split(flat).values(), strict=True)}
    for part, key, _, value in places:
        part._buffers[key] = views[id(value)]
    return layout, flat


def normalises(model: nn.Module) -> bool:
    """Whether a layer of the model takes statistics over the rows of a batch, of which there must be two then."""
    return any(isinstance(part, nn.modules.batchnorm._NormBase) for part in model.modules())


def beside(model: nn.Module, mode: Mode | None) -> tuple[Buffers | None, Mode | None]:
    """What travels beside the model's vector, and how; by default buffers are averaged.

    With `batch` layers normalise by the statistics of the batch at hand, in evaluation too, and keep none.
    """
    layers = tracking(model)
    if mode is not None and not layers and not (mode == "batch" and normalises(model)):
        raise DataError(f"model.buffers: {mode}: the model has no layer that keeps running statistics. Remove it.")
    if mode == "batch":
        for _, part in layers:
            part.track_running_stats = False
            part.running_mean = part.running_var = part.num_batches_tracked = None  # type: ignore[assignment]
    found = Buffers(model)
    return (found, mode or "average") if len(found.floats) else (None, mode)
