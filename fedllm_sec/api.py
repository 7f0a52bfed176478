"""The numerics alone, for other frameworks and notebooks: rows in, one vector out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm_sec.defenses import MENU
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.defenses.screen import FLOATS, restore, screen
from fedllm_sec.errors import DefenseError, RecipeError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.seeds import generator_for

Stage = str | tuple[str, Mapping[str, Any]] | Callable[..., Any]


def aggregate(
    rows: Any,
    name: str | Callable[..., Any],
    *,
    before: Sequence[Stage] = (),
    counts: Sequence[float] | None = None,
    ids: Sequence[str] | None = None,
    chunk_mb: float | None = None,
    seed: int = 0,
    round: int = 1,
    global_vector: Any = None,
    last_update: Any = None,
    root_update: Any = None,
    **settings: Any,
) -> Decision:
    """One rule on the rows of one round; `aggregate(rows, "multi_krum", f=2).update` is the answer.

    `rows` is an (n, d) matrix, a list of n vectors (d,), or a list of n dicts {name: array}, of torch tensors or numpy
    arrays of a floating type, or an UpdateMatrix (which may lie in a file); `update` has the same kind, shape and dtype
    as one row. A row is an update (new minus old parameters). `name` is a menu name, "package.module:name", or a
    callable (updates, ctx) -> Decision: pass an instance of a class to carry its memory from call to call. `before`
    lists stages as "name" or ("name", {settings}). Unusable rows (not finite, absurdly large) are set aside with a
    warning; their weight is 0 and their score inf. Numbers are computed from float32 values. The caller's arrays are
    never changed.
    """
    matrix, kind = read_rows(rows, ids, counts, chunk_mb)
    all_ids = matrix.ids
    clean, reasons = screen(matrix)
    if reasons:
        listed = "; ".join(f'row "{key}": {reason}' for key, reason in reasons.items())
        warnings.warn(f"aggregate: {len(reasons)} of {len(all_ids)} rows are set aside. {listed}.", stacklevel=2)

    def vector(value: Any) -> Tensor | None:
        return None if value is None else flat(value, matrix.layout).to(torch.float32)

    start = vector(global_vector)
    ctx = RoundContext(
        round=round,
        global_vector=torch.zeros(matrix.d, device=matrix.rows.device) if start is None else start,
        layout=matrix.layout,
        rng=generator_for(seed, round, "aggregate"),
        last_update=vector(last_update),
        root_update=vector(root_update),
    )
    stages = [_stage(item, f"before[{i}]") for i, item in enumerate(before)]
    pipeline = Pipeline(stages, _resolved(name, settings, "rule", "aggregate"))
    decision = pipeline.decide(clean, ctx)
    return replace(
        decision,
        update=kind(decision.update),
        weights=restore(decision.weights, clean.ids, all_ids, 0.0),
        kept=restore(decision.kept, clean.ids, all_ids, 0.0),
        scores=restore(decision.scores, clean.ids, all_ids, float("inf")),
        notes={**decision.notes, **({"set_aside": float(len(reasons))} if reasons else {})},
    )


def _stage(item: Stage, place: str) -> Any:
    if isinstance(item, tuple):
        return _resolved(item[0], item[1], "before", place)
    return _resolved(item, {}, "before", place)


def _resolved(name: str | Callable[..., Any], settings: Mapping[str, Any], kind: str, place: str) -> Any:
    """The callable behind a name with its settings; mistakes are DefenseErrors here."""
    if callable(name):
        if settings:
            raise DefenseError(f"{place}: settings {sorted(settings)} are for menu names; bind them to the callable.")
        return name
    menu = {key: entry for key, entry in MENU.items() if entry.kind == kind}
    if name in MENU and name not in menu:
        raise DefenseError(f'{place}: "{name}" is a stage of kind "{MENU[name].kind}", not "{kind}".')
    try:
        return resolve(name, settings, menu, place)
    except RecipeError as error:
        raise DefenseError(" ".join(error.problems)) from None


def read_rows(
    rows: Any, ids: Sequence[str] | None, counts: Sequence[float] | None, chunk_mb: float | None
) -> tuple[UpdateMatrix, Callable[[Tensor], Any]]:
    """The update matrix of whatever rows were given, and how to turn an update (d,) back into that kind."""
    if isinstance(rows, UpdateMatrix):
        if ids is not None or counts is not None or chunk_mb is not None:
            raise DefenseError("aggregate: an UpdateMatrix has its own ids, counts and chunk_mb. Set them there.")
        return rows, lambda update: update
    if isinstance(rows, (Tensor, np.ndarray)):
        matrix = as_tensor(rows, "rows")
        if matrix.ndim != 2 or 0 in matrix.shape:
            shape = tuple(matrix.shape)
            raise DefenseError(
                f"aggregate: rows need shape (n, d) with n, d >= 1, got {shape}. Stack one row per client."
            )
        layout, like = Layout.single(matrix.shape[1]), rows
        matrix = matrix.detach()
        matrix = matrix.float() if matrix.dtype == torch.float64 else matrix
    else:
        listed = list(rows)
        if not listed:
            raise DefenseError("aggregate: the list of rows is empty. Give at least one row.")
        like = listed[0]
        layout = _layout(like)
        vectors = [flat(row, layout, f"row {i}") for i, row in enumerate(listed)]
        matrix = torch.stack([v.detach().to(torch.float32) for v in vectors])
    n = len(matrix)
    for label, given in (("ids", ids), ("counts", counts)):
        if given is not None and len(given) != n:
            raise DefenseError(f"aggregate: {label} has {len(given)} entries for {n} rows. Give one for each row.")
    if ids is not None and len(set(ids)) != n:
        raise DefenseError("aggregate: ids has the same id twice. Give distinct ids.")
    updates = UpdateMatrix.of(matrix, ids=ids, counts=counts, layout=layout, chunk_mb=chunk_mb)
    return updates, lambda update: like_row(update, like, layout)


def _layout(row: Any) -> Layout:
    if isinstance(row, Mapping):
        return Layout.of((key, as_tensor(value, key)) for key, value in row.items())
    vector = as_tensor(row, "row 0")
    if vector.ndim != 1:
        raise DefenseError(f"aggregate: row 0 has shape {tuple(vector.shape)}, needs (d,). Flatten it or pass dicts.")
    return Layout.single(len(vector))


def as_tensor(value: Any, place: str) -> Tensor:
    """A tensor over the same memory as a torch or numpy array of a floating type."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f":
            raise DefenseError(f"aggregate: {place} has dtype {value.dtype}, needs a floating type. Convert it first.")
        if value.dtype not in (np.float16, np.float32, np.float64):
            value = value.astype(np.float64)
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise DefenseError(f"aggregate: {place} is a {kind}, needs a torch tensor or numpy array. Convert it first.")
    if value.dtype not in FLOATS:
        kind = str(value.dtype).removeprefix("torch.")
        raise DefenseError(f"aggregate: {place} has dtype {kind}, needs a floating type. Convert it first.")
    return value


def flat(row: Any, layout: Layout, place: str = "vector") -> Tensor:
    """One row as a vector (d,), checked against the layout of the first row."""
    if isinstance(row, Mapping):
        shapes = {key: tuple(as_tensor(value, f"{place}, {key}").shape) for key, value in row.items()}
        wanted = dict(zip(layout.names, layout.shapes, strict=True))
        if shapes != wanted:
            odd = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
            got, want = [shapes.get(key) for key in odd[:3]], [wanted.get(key) for key in odd[:3]]
            raise DefenseError(
                f"aggregate: {place} differs from row 0 in {odd[:3]}: {got} against {want}. "
                "Send the same parameters from every client."
            )
        return layout.join({key: as_tensor(value, key) for key, value in row.items()})
    vector = as_tensor(row, place)
    if vector.ndim != 1 or len(vector) != layout.size:
        raise DefenseError(
            f"aggregate: {place} has shape {tuple(vector.shape)}, row 0 has ({layout.size},). Send rows of one length."
        )
    return vector


def like_row(update: Tensor, like: Any, layout: Layout) -> Any:
    """An update (d,) in the kind and dtype of the caller's rows."""
    if isinstance(like, Mapping):
        parts = layout.split(update)
        return {key: _as(parts[key], value) for key, value in like.items()}
    return _as(update, like)


def _as(vector: Tensor, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return vector.cpu().numpy().astype(like.dtype, copy=False)
    return vector.to(like)
