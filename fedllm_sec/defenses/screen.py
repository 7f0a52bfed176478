"""What is checked on every row before a rule sees it, in one pass. A bad row is set aside, never fatal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedllm_sec.errors import DefenseError
from fedllm_sec.kernels.usable import LONGEST, lengths
from fedllm_sec.matrix import Layout, UpdateMatrix

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def screen(updates: UpdateMatrix) -> tuple[UpdateMatrix, dict[str, str]]:
    """The rows that can be used, and {client id: reason} for those that cannot.

    Set aside are rows with a value that is not finite, rows longer than 1e36, and rows whose sender claims a number
    of examples that is not finite or not positive. Raises DefenseError when no row is left.
    """
    norms = lengths(updates)
    reasons: dict[str, str] = {}
    keep: list[int] = []
    for i, (name, norm, count) in enumerate(zip(updates.ids, norms.tolist(), updates.counts, strict=True)):
        if not math.isfinite(norm):
            reasons[name] = _describe_non_finite(updates, i)
        elif norm > LONGEST:
            reasons[name] = f"its length of {norm:.3g} is beyond the limit of {LONGEST:g}"
        elif not (math.isfinite(count) and count > 0):
            reasons[name] = f"claims {count:g} training examples"
        else:
            keep.append(i)
    if not keep:
        raise DefenseError(f"screen: none of the {updates.n} rows can be used: {_listed(reasons)}.")
    return (updates if len(keep) == updates.n else updates.select(keep)), reasons


def _describe_non_finite(updates: UpdateMatrix, row: int) -> str:
    """How many values of a row are not finite, and where the first one is, by parameter name."""
    count, first = 0, -1
    for place, block in updates.select([row]).blocks():
        bad = (~torch.isfinite(block[0])).nonzero()
        if len(bad) and first < 0:
            first = place.start + int(bad[0])
        count += len(bad)
    where = f"position {first}"
    for name, place in updates.layout.slices().items():
        if place.start <= first < place.stop:
            where = f"{name}[{first - place.start}]"
    return f"{count} of {updates.d} values are not finite, the first at {where}"


def _listed(reasons: Mapping[str, str], limit: int = 5) -> str:
    shown = [f'client "{name}": {reason}' for name, reason in list(reasons.items())[:limit]]
    rest = len(reasons) - limit
    return "; ".join(shown) + (f"; and {rest} more" if rest > 0 else "")


def stack(
    rows: Sequence[Tensor],
    *,
    ids: Sequence[str],
    counts: Sequence[float] | None = None,
    layout: Layout,
    chunk_mb: float | None = None,
) -> tuple[UpdateMatrix, dict[str, str]]:
    """The update matrix of the rows of the layout's length and a floating type, and reasons for the others.

    This copies the rows into one matrix and looks at no value; `screen` does. float64 rows become float32.
    """
    reasons: dict[str, str] = {}
    keep: list[int] = []
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.shape[0] != layout.size:
            reasons[ids[i]] = f"has shape {tuple(row.shape)}, the trained parameters are ({layout.size},)"
        elif row.dtype not in FLOATS:
            reasons[ids[i]] = f"has dtype {str(row.dtype).removeprefix('torch.')}, not a floating type"
        else:
            keep.append(i)
    if not keep:
        raise DefenseError(f"screen: none of the {len(rows)} rows can be used: {_listed(reasons)}.")
    kinds = {rows[i].dtype for i in keep}
    dtype = kinds.pop() if len(kinds) == 1 and torch.float64 not in kinds else torch.float32
    matrix = UpdateMatrix.of(
        torch.stack([rows[i].detach().to(dtype) for i in keep]),
        ids=[ids[i] for i in keep],
        counts=None if counts is None else [counts[i] for i in keep],
        layout=layout,
        chunk_mb=chunk_mb,
    )
    return matrix, reasons


def restore(values: Tensor | None, ids: Sequence[str], all_ids: Sequence[str], missing: float) -> Tensor | None:
    """Per-row values of the rows that were kept, over all ids; `missing` for a row set aside."""
    if values is None:
        return None
    place = {name: i for i, name in enumerate(ids)}
    return torch.stack(
        [values[place[name]] if name in place else torch.tensor(missing, dtype=values.dtype) for name in all_ids]
    )
