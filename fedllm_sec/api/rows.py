"""The numerics alone, for other frameworks and notebooks: rows in, one vector out."""

from __future__ import annotations

import contextlib
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
from fedllm_sec.matrix.dense import need_dense
from fedllm_sec.protocols import Decision, RoundContext
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.seeds import generator_for

Stage = str | tuple[str, Mapping[str, Any]] | Mapping[str, Any] | Callable[..., Any]


def aggregate(
    rows: Any,
    name: str | Callable[..., Any],
    *,
    before: Stage | Sequence[Stage] = (),
    counts: Sequence[float] | None = None,
    ids: Sequence[str | int] | None = None,
    chunk_mb: float | None = None,
    seed: int = 0,
    round: int = 1,
    global_vector: Any = None,
    last_update: Any = None,
    root_update: Any = None,
    **settings: Any,
) -> Decision:
    """One rule on the rows of one round; `aggregate(rows, "multi_krum", f=2).update` is the answer.

    `rows` is an (n, d) matrix, a list of n vectors (d,), a list of n dicts {name: array} or of n lists of arrays (as
    Flower has them), of torch tensors or numpy arrays of a floating type, or an UpdateMatrix (which may lie in a file);
    `update` has the same kind, shape and dtype as one row. A row is an update (new minus old parameters). In dicts and
    lists, entries of integers and booleans (counters, masks) are no parameters: no rule sees them, and `update` has the
    median of what the clients sent. `ids` may be numbers; rules know them as text. `name` is a menu name,
    "package.module:name", or a callable (updates, ctx) -> Decision: pass an instance of a class to carry its memory
    from call to call; a rule called by name has none. `before` is a stage or a list of them, each "name", ("name",
    {settings}), {"name": ..., settings} as in a recipe, or a callable. Unusable rows (not finite, absurdly large) are
    set aside with a warning; their weight is 0 and their score inf. Numbers are computed from float32 values. The
    caller's arrays are never changed.
    """
    if not isinstance(round, (int, np.integer)):
        raise DefenseError(f"aggregate: round={round!r}: must be a whole number, 1 for the first round.")
    matrix, back = read_rows(rows, ids, counts, chunk_mb)
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
    stages = [_stage(item, f"before[{i}]") for i, item in enumerate(_listed(before))]
    pipeline = Pipeline(stages, _resolved(name, settings, "rule", "aggregate"))
    if round <= 1 and isinstance(name, str) and hasattr(pipeline.rule, "once"):
        pipeline.rule.once()  # made for this call: what it would remember is dropped with it
    decision = pipeline.decide(clean, ctx)
    if round > 1 and isinstance(name, str) and _remembers(pipeline.rule):
        warnings.warn(
            f"aggregate: {name} remembers earlier rounds, and this one was made for this call: in round {round} it "
            f"knows nothing of them. Make it once and pass it: rule = {type(pipeline.rule).__name__}(...), then "
            f"aggregate(rows, rule, round={round}).",
            stacklevel=2,
        )
    return replace(
        decision,
        update=back(decision.update, [i for i, id in enumerate(all_ids) if id not in reasons]),
        weights=restore(decision.weights, clean.ids, all_ids, 0.0),
        kept=restore(decision.kept, clean.ids, all_ids, 0.0),
        scores=restore(decision.scores, clean.ids, all_ids, float("inf")),
        notes={**decision.notes, **({"set_aside": float(len(reasons))} if reasons else {})},
    )


def _listed(before: Any) -> Sequence[Stage]:
    """One stage or several, as several."""
    one = (
        isinstance(before, tuple) and len(before) == 2 and isinstance(before[0], str) and isinstance(before[1], Mapping)
    )
    if one or isinstance(before, (str, Mapping)) or callable(before):
        return [before]
    if not isinstance(before, Sequence):
        raise DefenseError(f"before: {before!r}: must be a stage, or a list of stages.")
    return before


def _stage(item: Stage, place: str) -> Any:
    """A stage as a name, ("name", {settings}), {"name": ..., settings} or a callable."""
    if isinstance(item, Mapping):
        settings = dict(item)
        if not isinstance(name := settings.pop("name", None), str):
            raise DefenseError(f"{place}: {dict(item)} names no stage. Give {{'name': ..., its settings}}.")
        return _resolved(name, settings, "before", place)
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping):
        return _resolved(item[0], item[1], "before", place)
    return _resolved(item, {}, "before", place)


def _remembers(rule: Any) -> bool:
    """Whether a rule that has seen one round keeps something of it."""

    def filled(state: Any) -> bool:
        values = state.values() if isinstance(state, Mapping) else state if isinstance(state, list) else ()
        return isinstance(state, Tensor) or any(filled(value) for value in values)

    return hasattr(rule, "state_dict") and filled(rule.state_dict())


def _resolved(name: str | Callable[..., Any], settings: Mapping[str, Any], kind: str, place: str) -> Any:
    """The callable behind a name with its settings; mistakes are DefenseErrors here."""
    if callable(name):
        if settings:
            raise DefenseError(f"{place}: settings {sorted(settings)} are for menu names; bind them to the callable.")
        return name
    if not isinstance(name, str):
        raise DefenseError(f"{place}: {name!r}: must be a name, a callable, or a name with its settings.")
    menu = {key: entry for key, entry in MENU.items() if entry.kind == kind}
    if name in MENU and name not in menu:
        raise DefenseError(f'{place}: "{name}" is a stage of kind "{MENU[name].kind}", not "{kind}".')
    try:
        return resolve(name, settings, menu, place)
    except RecipeError as error:
        raise DefenseError(" ".join(error.problems)) from None


def read_rows(
    rows: Any, ids: Sequence[str | int] | None, counts: Sequence[float] | None, chunk_mb: float | None
) -> tuple[UpdateMatrix, Callable[[Tensor, Sequence[int]], Any]]:
    """The update matrix of whatever rows were given, and how to turn an update (d,) back into that kind.

    That also takes the places of the rows that could be used, whose integers are looked at for those of the answer.
    """
    if isinstance(rows, UpdateMatrix):
        if ids is not None or counts is not None or chunk_mb is not None:
            raise DefenseError("aggregate: an UpdateMatrix has its own ids, counts and chunk_mb. Set them there.")
        return rows, lambda update, usable: update
    whole: list[dict[str, Any]] = []  # integer and boolean entries of each row
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
        listed = _each_row(rows)
        if not listed:
            raise DefenseError("aggregate: the list of rows is empty. Give at least one row.")
        like = listed[0]
        layout = _layout(like)
        vectors = [flat(row, layout, f"row {i}") for i, row in enumerate(listed)]
        whole = [entries(row, f"row {i}")[1] for i, row in enumerate(listed)]
        for i, own in enumerate(whole):
            _alike({k: v.shape for k, v in own.items()}, {k: v.shape for k, v in whole[0].items()}, f"row {i}")
        matrix = torch.stack([v.detach().to(torch.float32) for v in vectors])
    n = len(matrix)
    for label, given in (("ids", ids), ("counts", counts)):
        if given is not None and (size := len(given) if hasattr(given, "__len__") else "no") != n:
            raise DefenseError(f"aggregate: {label} has {size} entries for {n} rows. Give one for each row.")
    names = None if ids is None else [str(id) for id in ids]
    if names is not None and len(set(names)) != n:
        raise DefenseError("aggregate: ids has the same id twice. Give distinct ids.")
    updates = UpdateMatrix.of(matrix, ids=names, counts=counts, layout=layout, chunk_mb=chunk_mb)
    if not np.isfinite(sum(updates.counts)):
        raise DefenseError(
            "aggregate: the counts do not add up to a finite number. Give the rows' numbers of examples."
        )

    def back(update: Tensor, usable: Sequence[int]) -> Any:
        integers = {key: middle([whole[i][key] for i in usable]) for key in (whole[0] if whole else {})}
        return like_row(update, like, layout, integers)

    return updates, back


def _each_row(rows: Any) -> list[Any]:
    """The rows of whatever gives one after another."""
    if not isinstance(rows, Mapping):
        with contextlib.suppress(TypeError, NotImplementedError):
            return list(rows)
    raise DefenseError(
        f"aggregate: rows is a {type(rows).__name__}, needs a matrix (n, d) or a list of n rows; of clients by "
        "name, list(rows.values()) and ids=list(rows)."
    )


def entries(row: Any, place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a row that is a dict or a list of arrays, by name or place: of a floating type, and the others.

    A row that is one vector has no entries.
    """
    if isinstance(row, (list, tuple)):
        if not all(isinstance(value, (Tensor, np.ndarray)) for value in row):
            raise DefenseError(
                f"aggregate: {place} is a {type(row).__name__}, needs a torch tensor or numpy array, or a list of "
                "these. Convert it first."
            )
        row = {str(i): value for i, value in enumerate(row)}
    if not isinstance(row, Mapping):
        return {}, {}
    whole = {
        key: value
        for key, value in row.items()
        if (isinstance(value, np.ndarray) and value.dtype.kind in "iub")
        or (isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()))
    }
    return {key: value for key, value in row.items() if key not in whole}, whole


def middle(values: Sequence[Any]) -> Any:
    """The (lower) median of equally shaped arrays of integers or booleans, value by value."""
    place = (len(values) - 1) // 2
    if isinstance(values[0], Tensor):
        return torch.stack(list(values)).sort(dim=0).values[place]
    return np.asarray(np.sort(np.stack(values), axis=0)[place])


def _layout(row: Any) -> Layout:
    if isinstance(row, (Mapping, list, tuple)):
        own = entries(row, "row 0")[0]
        if not own:
            raise DefenseError("aggregate: row 0 has no array of a floating type. Give the trained parameters.")
        return Layout.of((key, as_tensor(value, key)) for key, value in own.items())
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
            value = value.astype(np.float64)  # also what another machine's order of bytes makes another type
        value = np.ascontiguousarray(value)  # torch reads no array backwards
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise DefenseError(f"aggregate: {place} is a {kind}, needs a torch tensor or numpy array. Convert it first.")
    need_dense(value, f"aggregate: {place}", DefenseError)
    if value.dtype not in FLOATS:
        kind = str(value.dtype).removeprefix("torch.")
        raise DefenseError(f"aggregate: {place} has dtype {kind}, needs a floating type. Convert it first.")
    return value


def flat(row: Any, layout: Layout, place: str = "vector") -> Tensor:
    """One row as a vector (d,), checked against the layout of the first row."""
    if isinstance(row, (Mapping, list, tuple)):
        own = {key: as_tensor(value, f"{place}, {key}") for key, value in entries(row, place)[0].items()}
        wanted = dict(zip(layout.names, layout.shapes, strict=True))
        _alike({key: tuple(value.shape) for key, value in own.items()}, wanted, place)
        return layout.join(own)
    vector = as_tensor(row, place)
    if vector.ndim != 1 or len(vector) != layout.size:
        raise DefenseError(
            f"aggregate: {place} has shape {tuple(vector.shape)}, row 0 has ({layout.size},). Send rows of one length."
        )
    return vector


def _alike(shapes: Mapping[str, Any], wanted: Mapping[str, Any], place: str) -> None:
    """The same names with the same shapes as in row 0."""
    if shapes == wanted:
        return
    odd = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
    got, want = [shapes.get(key) for key in odd[:3]], [wanted.get(key) for key in odd[:3]]
    raise DefenseError(
        f"aggregate: {place} differs from row 0 in {odd[:3]}: {got} against {want}. "
        "Send the same parameters from every client."
    )


def like_row(update: Tensor, like: Any, layout: Layout, integers: Mapping[str, Any]) -> Any:
    """An update (d,) in the kind and dtype of the caller's rows, with the integers of a dict or list."""
    if not isinstance(like, (Mapping, list, tuple)):
        return _as(update, like)
    parts = {**layout.split(update), **integers}
    if isinstance(like, Mapping):
        return {key: _as(parts[key], value) for key, value in like.items()}
    return [_as(parts[str(i)], value) for i, value in enumerate(like)]


def _as(vector: Any, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        made = vector if isinstance(vector, np.ndarray) else vector.cpu().numpy()
        return made.astype(like.dtype, copy=False)
    return vector.to(like)
