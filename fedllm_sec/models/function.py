"""A classifier as a function of its flat vector: who tries one out leaves no trace in the model that is in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedllm_sec.errors import DataError
from fedllm_sec.matrix import Layout


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """The name and the module of the last linear layer: the classifier on top of the encoder."""
    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    if not layers:
        raise DataError("model.name: has no linear layer, so there is no telling encoder and classifier apart.")
    return layers[-1]


@dataclass(frozen=True)
class Classifier:
    """What a vector (d,) makes of images (k, channels, height, width) in [0, 1]; differentiable in both.

    The model is in evaluation mode, with `buffers` where given: running statistics stay as they are.
    """

    model: nn.Module
    layout: Layout
    read: Callable[[Any], Tensor]  # what the model gives -> logits
    mean: Tensor = field(default_factory=lambda: torch.zeros(1))
    std: Tensor = field(default_factory=lambda: torch.ones(1))
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    def logits(self, vector: Tensor, x: Tensor) -> Tensor:
        """(k, classes) float32."""
        return self._called(vector, x)

    def features(self, vector: Tensor, x: Tensor) -> Tensor:
        """What the last linear layer reads: (k, h)."""
        held: list[Tensor] = []
        _, head = head_of(self.model)
        hook = head.register_forward_hook(lambda part, given, made: held.extend((given[0], made)))
        try:
            logits = self._called(vector, x)
        finally:
            hook.remove()
        if len(held) != 2 or not torch.equal(held[1].detach().float(), logits.detach()):
            raise DataError(
                "model.name: its last linear layer does not give the logits, so there is no telling encoder and "
                "classifier apart."
            )
        return held[0].float()

    def head(self) -> slice:
        """Where in the vector the last linear layer's parameters lie, which are next to each other."""
        name, _ = head_of(self.model)
        own = [place for key, place in self.layout.slices().items() if key.startswith(f"{name}.")]
        if not own or own[-1].stop - own[0].start != sum(place.stop - place.start for place in own):
            raise DataError(f"model.name: its last linear layer {name} is not trained whole, so not alone either.")
        return slice(own[0].start, own[-1].stop)

    def _called(self, vector: Tensor, x: Tensor) -> Tensor:
        training = self.model.training
        self.model.eval()
        try:
            state = {**self.layout.split(vector), **self.buffers}
            return self.read(torch.func.functional_call(self.model, state, ((x - self.mean) / self.std,)))
        finally:
            self.model.train(training)


@dataclass(frozen=True)
class Indicator:
    """A task that the server has trained into the model it sent, and how it looks for it in what comes back."""

    x: Tensor  # (k, channels, height, width) in [0, 1]
    y: Tensor  # (k,) int64
    classifier: Classifier  # with the running statistics that planting has left
    planted: float = 1.0  # how much of it the planted model does itself, as clients are judged
    moved: float = 0.0  # how far planting has moved the model
    left: float = 0.0  # the share of all rows that the model told right before planting, under its own statistics
