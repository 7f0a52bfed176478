"""The span of what an update's layers were fed: which hidden vectors lie in it, and which do not.

The gradient of a linear layer's weight (out, in) is a sum of dy x^T over the positions of the batch, so its rows lie in
the span of the inputs x. Of a LoRA layer y = (W + s B A) x the gradient of B (out, r) is a sum of s dy (A x)^T: its
rows lie in the span of the A x, in r dimensions; that of A (r, in) is a sum of s (B^T dy) x^T, which is 0 while B is.
While there are fewer different inputs than dimensions, whatever else is fed to the layer does not lie in the span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedllm_sec.attacks.privacy.reading import batches, logits_of, padded, still
from fedllm_sec.attacks.privacy.seen import Observation, Row
from fedllm_sec.errors import AttackError

ROUNDING = 1e-7  # of the largest singular value of a float32 matrix: what rounding leaves lies below
DROP = 10.0  # by how much the last direction of a span is longer than rounding
ENERGY = 0.99  # of an update that fills all dimensions, the directions that hold this share of its squared length


@dataclass(frozen=True)
class Span:
    """The span of one layer's inputs, as one of its parameters gives it away."""

    layer: str  # name of the module
    basis: Tensor  # (k, m) orthonormal rows, float64
    factor: Tensor | None  # (m, in) LoRA's A, through which inputs are seen; None: they are seen as they are
    exact: bool  # whether there are fewer directions than dimensions; else they are the longest ones
    most: int  # the shorter side of the parameter: as many directions as it could give away

    def residual(self, inputs: Tensor) -> Tensor:
        """What share of each input's squared length lies outside: (...,), from 0 to 1. An input is (..., in)."""
        x = inputs.double()
        if self.factor is not None:
            x = x @ self.factor.T
        length = x.square().sum(-1)
        inside = (x @ self.basis.T).square().sum(-1)
        return (1 - inside / length.clamp_min(1e-300)).clamp(0, 1)


def directions(matrix: Tensor, noise: float) -> tuple[Tensor, bool]:
    """Orthonormal rows (k, m) that span the rows of a matrix (n, m), and whether k < m.

    Where all singular values tell a direction, those directions are left that hold `ENERGY` of the squared length,
    m - 1 at most.
    """
    _, values, rows = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = rank_of(values.tolist(), noise)
    if rank < matrix.shape[1]:
        return rows[:rank], True
    held = values.square().cumsum(0) / values.square().sum()
    return rows[: min(int((held < ENERGY).sum()) + 1, matrix.shape[1] - 1)], False


def rank_of(values: Sequence[float], noise: float) -> int:
    """How many singular values, in falling order, tell a direction: those before their widest drop into rounding.

    Rounding lies below `noise`, or ten times `ROUNDING` of the largest. Where no drop there is `DROP` or more, values
    fall on through it, the span is full, and all of them count: a threshold alone would find 120 to 127 of 128
    directions where 142 different inputs have filled them.
    """
    if not values or not values[0] > 0:
        return 0
    above, below = max(ROUNDING * values[0], noise), max(DROP * ROUNDING * values[0], noise)
    drops = {
        k: values[k - 1] / max(values[k], 1e-300)
        for k in range(1, len(values))
        if values[k - 1] > above and values[k] <= below
    }
    widest = max(drops, key=lambda k: drops[k], default=len(values))
    return widest if drops.get(widest, 0.0) >= DROP else len(values)


def spans_of(seen: Observation, layers: Sequence[str] | None = None) -> list[Span]:
    """The spans of all layers, or of these, whose parameters were sent, in the order of the model.

    There is none where nothing moved.
    """
    parts, begun, found = seen.parts(), seen.layout.split(seen.start), []
    for name, part in seen.model.named_modules():
        if layers is not None and name not in layers:
            continue
        for parameter, factor in parameters_of(name, part):
            if parameter not in parts:
                continue
            noise = _rounding(begun[parameter]) if seen.what == "delta" else 0.0
            basis, exact = directions(parts[parameter], noise)
            if len(basis):
                found.append(Span(name, basis, factor_of(seen, factor), exact, min(parts[parameter].shape)))
    return found


def factor_of(seen: Observation, name: str | None) -> Tensor | None:
    """The received values of LoRA's A of this name, float64; None where inputs are seen as they are."""
    if name is None:
        return None
    begun = seen.layout.split(seen.start)
    return (begun[name] if name in begun else seen.model.get_parameter(name).detach()).double().cpu()


def parameters_of(name: str, part: nn.Module) -> Iterator[tuple[str, str | None]]:
    """A linear layer's parameters that give away its input, each with that through which it is seen."""
    if hasattr(part, "lora_B") and "default" in getattr(part, "lora_B", {}):
        a, b = (f"{name}.lora_{factor}.default.weight" for factor in "AB")
        yield b, a
        yield a, None
    elif isinstance(part, nn.Linear) and "lora_" not in name:
        yield f"{name}.weight", None


def _rounding(begun: Tensor) -> float:
    """By how much a difference of parameters is wrong, as a singular value: both were rounded to float32."""
    return float(torch.finfo(torch.float32).eps * begun.abs().max() * sum(begun.shape) ** 0.5)


class _HeardAllError(Exception):
    """Ends a pass whose later layers nobody asks for."""


@contextmanager
def listening(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What these layers are fed, by name, in the pass meanwhile, which ends with the last of them."""
    heard: dict[str, Tensor] = {}

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        def listen(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            heard[name] = given[0].detach()
            if len(heard) == len(layers):
                raise _HeardAllError

        return model.get_submodule(name).register_forward_pre_hook(listen)

    handles = [hook(name) for name in layers]
    try:
        with suppress(_HeardAllError):
            yield heard
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fed_to(seen: Observation, layers: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """What these layers of the received model are fed for tokens (rows, positions): (rows, positions, in) each."""
    parts = seen.layout.split(seen.start.to(next(seen.model.parameters()).device))
    with still(seen.model), listening(seen.model, layers) as heard:
        logits_of(seen, parts, ids)
    return {name: x.cpu() for name, x in heard.items()}


def residuals(seen: Observation, rows: Sequence[Row]) -> Tensor:
    """How far each row's hidden vectors lie from the spans: (rows,), 0 where all lie inside.

    The mean over the positions that are fed, of the layer whose mean is least. Deng et al. 2026 (arXiv 2604.21197)
    project hidden vectors on the span of a layer's gradient; the paper's text was not at hand, so which layers are
    taken, the share of the squared length, and the mean over positions are choices made here.
    """
    spans = spans_of(seen)
    if not spans:
        raise AttackError("membership: no linear layer moved, so there is no span. Observe another client.")
    if any(span.exact for span in spans):
        spans = [span for span in spans if span.exact]
    layers = list(dict.fromkeys(span.layer for span in spans))
    found = torch.empty(len(rows), dtype=torch.float64)
    for numbers in batches(rows):
        heard = fed_to(seen, layers, padded([rows[i].ids for i in numbers])[:, :-1])
        outside = [span.residual(heard[span.layer]) for span in spans]  # (rows, positions) each
        for k, i in enumerate(numbers):
            found[i] = min(float(each[k, : len(rows[i].ids) - 1].mean()) for each in outside)
    return found
