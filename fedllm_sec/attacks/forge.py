"""Malicious rows from honest ones in one call, for notebooks and other frameworks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm_sec.attacks import MENU
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import Decision, ThreatView
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.seeds import generator_for


def forge(
    honest: Any,
    name: str | Callable[..., Any],
    *,
    m: int,
    own: Any = None,
    global_vector: Any = None,
    last_update: Any = None,
    defense: Callable[[UpdateMatrix], Decision] | None = None,
    layout: Layout | None = None,
    round: int = 1,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """m malicious rows (m, d) from h honest rows (h, d), all knowledge granted; `forge(honest, "alie", m=2)`.

    `honest` is a torch or numpy matrix of updates; the answer has the same kind, dtype and device, and
    `honest` is not changed. `own` (m, d) is what the attackers' own training gave; without it each has the
    mean of the honest rows. `name` is a menu name of kind update, "package.module:name", or a callable
    ThreatView -> rows. `defense` (UpdateMatrix -> Decision) is what attacks that search their strength try
    out. Other keywords are the attack's settings. The same seed gives the same rows.
    """
    rows = _matrix(honest, "honest")
    h, d = rows.shape
    if m < 1:
        raise AttackError(f"forge: m={m}: needs at least 1 attacker.")
    if own is None:
        mine = rows.float().mean(0, keepdim=True).expand(m, d)
    else:
        mine = _matrix(own, "own").to(rows.device)
        if tuple(mine.shape) != (m, d):
            raise AttackError(f"forge: own has shape {tuple(mine.shape)}, needs ({m}, {d}): one row for each attacker.")
    view = ThreatView(
        own=mine,
        others=rows,
        global_vector=_vector(global_vector, d, "global_vector", rows, torch.zeros(d, device=rows.device)),
        last_update=_vector(last_update, d, "last_update", rows, None),
        defense=defense,
        layout=layout if layout is not None else Layout.single(d),
        own_counts=(1.0,) * m,
        cohort_size=h + m,
        round=round,
        rng=generator_for(seed, round, "forge"),
    )
    forged = _resolved(name, settings)(view)
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
    if name in MENU and MENU[name].kind != "update":
        raise AttackError(f"forge: {name} is of kind {MENU[name].kind!r}; only update attacks forge rows.")
    menu = {key: entry for key, entry in MENU.items() if entry.kind == "update"}
    try:
        made: Callable[[ThreatView], Tensor] = resolve(name, settings, menu, "forge")
    except RecipeError as error:
        raise AttackError(str(error)) from None
    return made


def _matrix(given: Any, place: str) -> Tensor:
    """Floating rows (n, d) over the caller's memory where that is possible."""
    if isinstance(given, Sequence):
        given = torch.stack([torch.as_tensor(row) for row in given]) if len(given) else torch.empty(0, 0)
    rows = torch.from_numpy(np.ascontiguousarray(given)) if isinstance(given, np.ndarray) else given
    if not isinstance(rows, Tensor):
        raise AttackError(f"forge: {place} is a {type(given).__name__}, needs a torch or numpy matrix.")
    if rows.ndim != 2 or 0 in rows.shape:
        raise AttackError(f"forge: {place} needs shape (n, d) with n, d >= 1, got {tuple(rows.shape)}.")
    if not rows.dtype.is_floating_point:
        raise AttackError(f"forge: {place} has dtype {rows.dtype}, needs a floating type.")
    rows = rows.detach()
    return rows.float() if rows.dtype == torch.float64 else rows


def _vector(given: Any, d: int, place: str, like: Tensor, otherwise: Tensor | None) -> Any:
    if given is None:
        return otherwise
    vector = torch.as_tensor(given).detach().to(like.device, torch.float32)
    if tuple(vector.shape) != (d,):
        raise AttackError(f"forge: {place} has shape {tuple(vector.shape)}, needs ({d},).")
    return vector
