"""Mean, deviation and scatter of the honest rows, and what lies beyond them, from one read of them.

On the CPU the work is compiled and fed by the same stream of column segments as the kernels of the defenses; elsewhere
it is plain torch. Letters: h honest rows, d parameters.
"""

# The compiled functions have no annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.updates import new_rows

Perturbation = Literal["unit", "sign", "std"]
KINDS = {"unit": 0, "sign": 1, "std": 2}
NO_ROWS = np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class Columns:
    """What each coordinate of the rows looks like, (d,) float32 each; empty where it was not asked for."""

    mean: Tensor
    deviation: Tensor  # population standard deviation


@dataclass(frozen=True)
class Scatter:
    """Rows x_i seen from their mean: y_i = x_i - mean, and a direction p to leave the mean by."""

    mean: Tensor  # (d,) float32
    direction: Tensor  # (d,) float32, p: -mean (unit, not yet of length 1), -sign(mean), or -std
    gram: Tensor  # (h + 1, h + 1) float64: inner products of y_1 ... y_h and p; with_mean adds the mean


def columns(rows: Tensor, *, deviation: bool = False) -> Columns:
    """Statistics of rows (h, d): always the mean, the deviation if asked for."""
    updates, d = UpdateMatrix.of(rows), rows.shape[1]
    out = Columns(new_rows(d, device=rows.device), new_rows(d if deviation else 0, device=rows.device))
    if _compiles(rows):
        from fedllm_sec.attacks.update import compiled

        targets = out.mean.numpy(), out.deviation.numpy()

        def work(s: Any) -> None:
            compiled.statistics(s.full, s.half, s.kind, s.offsets, NO_ROWS, s.start, s.stop, s.place.start, *targets)

        _stream(updates, work)
        return out
    for place, block in updates.blocks():
        centre = block.double().mean(0)
        out.mean[place] = centre.float()
        if deviation:
            out.deviation[place] = (block - centre).square_().mean(0).sqrt_().float()
    return out


def beyond(rows: Tensor, b: float, drawn: Tensor, m: int) -> Tensor:
    """Rows (m, d) just beyond the rows (h, d), against the direction of their mean; `drawn` (d,) is in [0, 1).

    From the edge e outwards to b e where that is farther out, else to e / b; row k lies frac(drawn + k / m) of the way.
    """
    updates = UpdateMatrix.of(rows)
    out = new_rows(m, rows.shape[1], device=rows.device)
    if _compiles(rows):
        from fedllm_sec.attacks.update import compiled

        targets = np.float32(b), drawn.numpy(), out.numpy()

        def work(s: Any) -> None:
            compiled.beyond(s.full, s.half, s.kind, s.offsets, NO_ROWS, s.start, s.stop, s.place.start, *targets)

        _stream(updates, work)
        return out
    for place, block in updates.blocks():
        rises = block.double().mean(0) > 0
        edge = torch.where(rises, block.amin(0), block.amax(0)).float()
        step = torch.where(rises == (edge < 0), edge * (b - 1), edge * (1 / b - 1))
        out[:, place] = between(edge, step, drawn[place], m)
    return out


def between(edge: Tensor, step: Tensor, drawn: Tensor, m: int) -> Tensor:
    """Rows (m, d): edge + frac(drawn + k / m) * step, for drawn in [0, 1)."""
    out = new_rows(m, len(edge), device=edge.device)
    for k, row in enumerate(out):
        torch.add(drawn, k / m, out=row)
        row.frac_().mul_(step).add_(edge)
    return out


def scatter(rows: Tensor, perturbation: Perturbation, *, with_mean: bool = False) -> Scatter:
    """Mean, direction and all inner products of rows (h, d)."""
    updates, (h, d) = UpdateMatrix.of(rows), rows.shape
    mean, direction = new_rows(d, device=rows.device), new_rows(d, device=rows.device)
    k = h + 2 if with_mean else h + 1
    gram = torch.zeros(k, k, dtype=torch.float64)
    if _compiles(rows):
        from fedllm_sec.attacks.update import compiled

        targets = mean.numpy(), direction.numpy()

        def work(s: Any) -> Tensor:
            part = np.zeros((k, k))
            where = (s.full, s.half, s.kind, s.offsets, NO_ROWS, s.start, s.stop, s.place.start)
            compiled.scatter(*where, KINDS[perturbation], *targets, part)
            return torch.from_numpy(part)

        for part in _stream(updates, work):
            gram += part
        gram = gram.triu() + gram.triu(1).T
        squares = gram.diagonal()[:h]
        if 1e-28 * d < float(squares.max()) < 1e34:  # float32 products hold in this range
            return Scatter(mean, direction, gram)
        gram = torch.zeros_like(gram)
    for place, block in updates.blocks():
        centre = block.double().mean(0)
        off = block - centre
        away = {
            "unit": lambda c=centre: -c,
            "sign": lambda c=centre: -c.sign(),
            "std": lambda y=off: -y.square().mean(0).sqrt(),
        }[perturbation]()
        mean[place], direction[place] = centre.float(), away.float()
        wide = torch.cat([off, away[None], centre[None]])[:k]
        gram += (wide @ wide.T).cpu()
    return Scatter(mean, direction, gram)


def _compiles(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and not kernels.plain() and find_spec("numba") is not None


def _stream(updates: UpdateMatrix, work: Any) -> list[Any]:
    from fedllm_sec.kernels import cpu_backend

    return list(cpu_backend.stream(updates, work))
