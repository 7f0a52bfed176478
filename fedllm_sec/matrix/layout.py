"""Where each named parameter lies in a flat vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where each named parameter lies in the flat vector, in order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> Layout:
        """The layout of named tensors, for example the trainable part of `model.named_parameters()`."""
        pairs = [(name, tuple(tensor.shape)) for name, tensor in named]
        return cls(tuple(name for name, _ in pairs), tuple(shape for _, shape in pairs))

    @classmethod
    def single(cls, size: int) -> Layout:
        """One unnamed block of `size` parameters, for rows whose structure is not known."""
        return cls(("vector",), ((size,),))

    @property
    def size(self) -> int:
        """d, the number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def slices(self) -> dict[str, slice]:
        """Each name's place in the flat vector."""
        places, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            places[name] = slice(start, start + math.prod(shape))
            start = places[name].stop
        return places

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector (d,), by name and in shape."""
        places = self.slices()
        return {n: vector[places[n]].view(s) for n, s in zip(self.names, self.shapes, strict=True)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The flat vector (d,) of named tensors; the inverse of `split`."""
        return torch.cat([tensors[name].reshape(-1) for name in self.names])
