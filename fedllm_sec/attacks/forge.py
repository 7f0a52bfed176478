"""Malicious rows from honest ones in one call, for notebooks and other frameworks."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm_sec.attacks import MENU
from fedllm_sec.attacks.threat import stand_in
from fedllm_sec.errors import AttackError, RecipeError, reason
from fedllm_sec.kernels.usable import usable
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.dense import need_dense
from fedllm_sec.matrix.shown import only_shown
from fedllm_sec.protocols import Decision, ThreatView
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.seeds import generator_for


def forge(
    honest: Any,
    name: str | Callable[..., Any],
    *,
    m: int,
    own: Any = None,
    counts: Sequence[float] | None = None,
    own_counts: Sequence[float] | None = None,
    ids: Sequence[str] | None = None,
    own_ids: Sequence[str] | None = None,
    global_vector: Any = None,
    last_update: Any = None,
    server_lr: float = 1.0,
    defense: Callable[[UpdateMatrix], Decision] | None = None,
    layout: Layout | None = None,
    round: int = 1,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """m malicious rows (m, d) from h honest rows (h, d), all knowledge granted; `forge(honest, "alie", m=2)`.

    `honest` is a torch or numpy matrix of updates; the answer has the same kind, dtype and device, and
    `honest` is not changed. `own` (m, d) is what the attackers' own training gave; without it each has the
    mean of the honest rows. `counts` (h) and `own_counts` (m) are the examples they claim, by default 1 each;
    `ids` and `own_ids` who they are, by default numbers. Honest rows that a server would set aside (values that
    are not finite, lengths beyond 1e36) are not shown to the attack, with a warning. `name` is a menu name of kind
    update, "package.module:name", or a callable ThreatView -> rows. `defense` (UpdateMatrix -> Decision) is what
    attacks that search their strength try out, on the honest rows and then the attackers', with these ids and
    counts; `server_lr` is what the server multiplies the update by. Other keywords are the attack's settings. The
    same seed gives the same rows.
    """
    rows = _matrix(honest, "honest")
    h, d = rows.shape
    if isinstance(m, bool) or not isinstance(m, (int, np.integer)) or m < 1:
        raise AttackError(f"forge: m={m!r}: needs a whole number of attackers, at least 1.")
    names, claims = _each(ids, "ids", h, map(str, range(h))), _each(counts, "counts", h, [1.0] * h)
    sound = usable(UpdateMatrix.of(rows, counts=claims))
    if not all(sound):
        out = ", ".join(name for name, good in zip(names, sound, strict=True) if not good)
        warnings.warn(f"forge: honest rows that a server would set aside are not shown: {out}.", stacklevel=2)
        rows = rows[torch.tensor(sound, device=rows.device)]
    if own is None:
        mine = (rows.float().mean(0) if len(rows) else torch.zeros(d, device=rows.device)).expand(m, d)
    else:
        mine = _matrix(own, "own").to(rows.device)
        if tuple(mine.shape) != (m, d):
            raise AttackError(f"forge: own has shape {tuple(mine.shape)}, needs ({m}, {d}): one row for each attacker.")
        mine = stand_in(mine, usable(UpdateMatrix.of(mine)))
    view = ThreatView(
        own=mine,
        others=rows,
        global_vector=_vector(global_vector, d, "global_vector", rows, torch.zeros(d, device=rows.device)),
        last_update=_vector(last_update, d, "last_update", rows, None),
        defense=defense,
        layout=layout if layout is not None else Layout.single(d),
        own_counts=_each(own_counts, "own_counts", m, [1.0] * m),
        cohort_size=len(rows) + m,
        round=round,
        rng=generator_for(seed, round, "forge"),
        own_ids=_each(own_ids, "own_ids", m, map(str, range(h, h + m))),
        other_ids=tuple(itertools.compress(names, sound)),
        other_counts=tuple(itertools.compress(claims, sound)),
        server_lr=server_lr,
    )
    if len({*view.own_ids, *view.other_ids}) < view.cohort_size:
        raise AttackError(f"forge: the same id twice among {(*view.other_ids, *view.own_ids)}. Give distinct ids.")
    attack = _resolved(name, settings)
    with only_shown("forge", AttackError, own_rows=mine, honest_rows=rows):
        forged = attack(view)
    if tuple(forged.shape) != (m, d):
        raise AttackError(f"forge: {name} gave shape {tuple(forged.shape)}, must be ({m}, {d}).")
    if isinstance(honest, np.ndarray):
        return forged.contiguous().cpu().numpy().astype(honest.dtype, copy=False)
    return forged.contiguous().to(honest) if isinstance(honest, Tensor) else forged.contiguous()


def _resolved(name: str | Callable[..., Any], settings: dict[str, Any]) -> Callable[[ThreatView], Tensor]:
    if callable(name):
        if settings:
            raise AttackError(f"forge: settings {sorted(settings)} are for menu names; bind them to the callable.")
        return name
    if not isinstance(name, str):
        raise AttackError(f"forge: {name!r}: must be a name of the menu, package.module:name, or a callable.")
    if name in MENU and MENU[name].kind != "update":
        raise AttackError(f"forge: {name} is of kind {MENU[name].kind!r}; only update attacks forge rows.")
    menu = {key: entry for key, entry in MENU.items() if entry.kind == "update"}
    try:
        made: Callable[[ThreatView], Tensor] = resolve(name, settings, menu, "forge")
    except RecipeError as error:
        raise AttackError(str(error)) from None
    return made


def _each(given: Iterable[Any] | None, place: str, n: int, otherwise: Iterable[Any]) -> tuple[Any, ...]:
    """One for each row."""
    if given is not None and not isinstance(given, Iterable):
        raise AttackError(f"forge: {place}: {given!r}: must be a list, with one for each of {n} rows.")
    listed = tuple(otherwise if given is None else given)
    if len(listed) != n:
        raise AttackError(f"forge: {place} has {len(listed)} entries for {n} rows. Give one for each row.")
    return listed


def _matrix(given: Any, place: str) -> Tensor:
    """Floating rows (n, d) over the caller's memory where that is possible."""
    if isinstance(given, Sequence):
        try:
            given = torch.stack([torch.as_tensor(row) for row in given]) if len(given) else torch.empty(0, 0)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise AttackError(
                f"forge: {place}: cannot be a matrix ({reason(error)}). Give rows of one length."
            ) from None
    if isinstance(given, np.ndarray) and given.dtype.kind == "f":
        kind = given.dtype if given.dtype.itemsize <= 8 else np.dtype(np.float64)
        given = np.ascontiguousarray(given, kind.newbyteorder("="))
    rows = torch.from_numpy(given) if isinstance(given, np.ndarray) and given.dtype.kind in "fiub" else given
    if not isinstance(rows, Tensor):
        raise AttackError(f"forge: {place} is a {type(given).__name__}, needs a torch or numpy matrix.")
    need_dense(rows, f"forge: {place}:", AttackError)
    if rows.ndim != 2 or 0 in rows.shape:
        raise AttackError(f"forge: {place} needs shape (n, d) with n, d >= 1, got {tuple(rows.shape)}.")
    if not rows.dtype.is_floating_point:
        raise AttackError(f"forge: {place} has dtype {rows.dtype}, needs a floating type.")
    rows = rows.detach()
    return rows.float() if rows.dtype == torch.float64 else rows


def _vector(given: Any, d: int, place: str, like: Tensor, otherwise: Tensor | None) -> Any:
    if given is None:
        return otherwise
    try:
        vector = torch.as_tensor(given).detach().to(like.device, torch.float32, copy=True)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise AttackError(f"forge: {place}: cannot be a vector ({reason(error)}). Give ({d},) numbers.") from None
    need_dense(vector, f"forge: {place}:", AttackError)
    if tuple(vector.shape) != (d,):
        raise AttackError(f"forge: {place} has shape {tuple(vector.shape)}, needs ({d},).")
    return vector
