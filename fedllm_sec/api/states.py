"""Whole state dicts of any torch model: a rule on what was trained, and what travels beside it as a person expects."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.api.rows import aggregate, middle
from fedllm_sec.defenses.buffers import MEAN, VARIANCE, combined, refused
from fedllm_sec.defenses.screen import FLOATS, screen
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import Decision

COUNTER = "num_batches_tracked"  # how torch calls BatchNorm's
MOST_BATCHES = 2**53  # up to which float64 counts exactly


@dataclass(frozen=True)
class Merged:
    """The new global state, what the rule decided, and what of the clients was not taken.

    `decision.update` (d,) are the trained parameters' changes in the order of `trained`; weights, kept and scores are
    of all clients, in their order.
    """

    state: dict[str, Tensor]
    decision: Decision
    trained: list[str]  # names of the parameters that the rule saw
    frozen: list[str]  # names that most clients sent back as they were: they stay
    refused: dict[str, str]  # client id -> why its state, or its running statistics, were not taken
    buffers_refused: dict[str, str]  # of those, who had a row in the rule all the same


def aggregate_state_dicts(
    states: Sequence[Mapping[str, Tensor]],
    global_state: Mapping[str, Tensor],
    name: Any,
    *,
    ids: Sequence[str | int] | None = None,
    counts: Sequence[float] | None = None,
    **settings: Any,
) -> Merged:
    """One rule on the state dicts that clients send back; `.state` is what the global model then loads.

    A client's row is its parameters minus those of `global_state`, which it was sent; `name`, `counts`, `before` and
    the rule's settings are those of `aggregate`. Nothing of a client's is trusted: a state with other names, shapes or
    kinds, with a value that is not finite or that the global dtype cannot hold, or whose tied tensors differ is set
    aside, and `refused` says why. Other floating dtypes (float32, float16, bfloat16, float64) are taken.

    - Parameters that more than half of the clients send back bit for bit are frozen: no rule sees them, they stay.
    - Tensors that share memory in `global_state` (tied embeddings) are one parameter, and share memory in the answer.
    - Running means and variances are no parameters: screened, and combined by the rule's own row weights, or by the
      median where it has none; a refused client's are not taken. Counters (num_batches_tracked) take the middle one.
    - Other integers and booleans stay where more than half of the clients have them so, else take the median.
    - Changes are computed in float32, added in float64 and come back in the dtype of `global_state`. Nobody's tensors
      are changed.
    """
    if not isinstance(global_state, Mapping) or not isinstance(states, Sequence) or isinstance(states, str):
        kinds = f"{type(states).__name__} and {type(global_state).__name__}"
        raise DefenseError(
            f"aggregate_state_dicts: states and global_state are {kinds}: must be a list of state dicts, and one state "
            "dict, in this order."
        )
    clients = [str(i) for i in (ids if ids is not None else range(len(states)))]
    if len(clients) != len(states) or len(set(clients)) != len(clients) or not states:
        raise DefenseError(f"aggregate_state_dicts: {len(states)} states and the ids {clients}: give each its own id.")
    if counts is not None and len(counts) != len(states):
        raise DefenseError(f"aggregate_state_dicts: {len(counts)} counts for {len(states)} states. Give one for each.")
    given = _tensors(global_state)
    shared = _shared(given)
    reasons = {id: why for id, state in zip(clients, states, strict=True) if (why := _unlike(state, given, shared))}
    at = [i for i, id in enumerate(clients) if id not in reasons]
    if not at:
        raise DefenseError(f"aggregate_state_dicts: none of the states can be used: {reasons}.")
    usable = [states[i] for i in at]
    floats = [key for key, value in given.items() if value.is_floating_point() and shared.get(key, key) == key]
    statistics = [key for key in floats if key.rpartition(".")[2] in (MEAN, VARIANCE)]
    parameters = [key for key in floats if key not in statistics]
    frozen = [key for key in parameters if _mostly(usable, key, given[key])]
    trained = [key for key in parameters if key not in frozen]
    if not trained:
        raise DefenseError("aggregate_state_dicts: most clients send every parameter back as it was sent to them.")
    layout = Layout.of((key, given[key]) for key in trained)
    rows = torch.stack(
        [
            torch.cat([(s[key].detach().double() - given[key].double()).float().flatten() for key in trained])
            for s in usable
        ]
    )
    told = [float(counts[i]) for i in at] if counts is not None else None
    matrix = UpdateMatrix.of(rows, ids=[clients[i] for i in at], counts=told, layout=layout)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        decision = aggregate(matrix, name, **settings)
    for warning in said:
        if "are set aside" not in str(warning.message):  # said below, with the others
            warnings.warn(str(warning.message), stacklevel=2)
    reasons |= screen(matrix)[1]
    rowless = set(reasons)
    made = {
        key: (given[key].detach().double() + part.double()).to(given[key].dtype)
        for key, part in layout.split(decision.update).items()
    }
    sound = [k for k, i in enumerate(at) if clients[i] not in reasons]
    beside = [usable[k] for k in sound]
    weights = None if decision.weights is None else decision.weights[torch.tensor(sound)]
    made |= _statistics(given, statistics, beside, [clients[at[k]] for k in sound], weights, reasons)
    for key, value in given.items():
        if key not in made and not value.is_floating_point():
            same = _mostly(beside, key, value)
            made[key] = value.clone() if same else middle([state[key] for state in beside]).to(value)
    for key, value in given.items():
        made.setdefault(key, made[shared[key]] if key in shared and shared[key] != key else value.clone())
    if reasons:
        listed = "; ".join(f"{id}: {why}" for id, why in list(reasons.items())[:5])
        warnings.warn(f"aggregate_state_dicts: not taken of {len(reasons)} of {len(states)} clients: {listed}.",
                      stacklevel=2)  # fmt: skip
    buffers_refused = {id: why for id, why in reasons.items() if id not in rowless}
    state, spread = {key: made[key] for key in given}, _for_all(decision, at, len(states))
    return Merged(state, spread, trained, frozen, reasons, buffers_refused)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {str(key): value for key, value in state.items()}
    for key, value in found.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_complex():
            raise DefenseError(f"aggregate_state_dicts: global_state: {key} is no dense tensor of real numbers.")
    return found


def _shared(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Each name of a tensor whose memory an earlier one has too -> the first such name, its own included."""
    first: dict[tuple[Any, ...], list[str]] = {}
    for key, value in state.items():
        if value.numel():
            first.setdefault((value.data_ptr(), tuple(value.shape), value.stride(), value.dtype), []).append(key)
    return {key: names[0] for names in first.values() if len(names) > 1 for key in names}


def _unlike(state: Any, given: Mapping[str, Tensor], shared: Mapping[str, str]) -> str | None:
    """Why a client's state is no state of this model; None where it is one."""
    if not isinstance(state, Mapping) or set(state) != set(given):
        odd = sorted(map(str, set(given) ^ set(state)))[:3] if isinstance(state, Mapping) else [type(state).__name__]
        return f"it has other names than the global state ({', '.join(odd)})"
    for key, wanted in given.items():
        value = state[key]
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.shape != wanted.shape:
            has = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            return f"its {key} is {has} instead of {tuple(wanted.shape)}"
        if value.device.type == "meta":
            return f"its {key} holds no values (meta)"
        if value.dtype != wanted.dtype and not (wanted.dtype in FLOATS and value.dtype in FLOATS):
            return f"its {key} is {value.dtype} instead of {wanted.dtype}"
        if value.dtype != wanted.dtype and not bool(value.to(wanted.dtype).isfinite().eq(value.isfinite()).all()):
            return f"its {key} has values that {wanted.dtype} cannot hold"
        if key.rpartition(".")[2] == COUNTER and not bool(((value >= 0) & (value < MOST_BATCHES)).all()):
            return f"its {key} counts {value.tolist()} batches"
    for key, first in shared.items():
        if not torch.equal(state[key], state[first]):
            return f"its {key} and {first} differ, which are one tensor"
    return None


def _mostly(states: Sequence[Mapping[str, Tensor]], key: str, value: Tensor) -> bool:
    """Whether more than half of the states hold this value there, bit for bit."""
    return 2 * sum(torch.equal(state[key], value) for state in states) > len(states)


def _statistics(
    given: Mapping[str, Tensor],
    floats: Sequence[str],
    states: Sequence[Mapping[str, Tensor]],
    ids: Sequence[str],
    weights: Tensor | None,
    reasons: dict[str, str],
) -> dict[str, Tensor]:
    """Running statistics and their counters, of the clients that are not refused; `reasons` gets those that are."""
    counters = [key for key, v in given.items() if not v.is_floating_point() and key.rpartition(".")[2] == COUNTER]
    if not floats and not counters:
        return {}

    def flat(state: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([state[key].detach().double().flatten() for key in (*floats, *counters)])

    layout = Layout.of((key, given[key]) for key in floats)
    rows, own = torch.stack([flat(state) for state in states]), flat(given)
    not_taken = refused(rows, own, layout, ids)
    reasons |= not_taken
    for k, id in enumerate(ids):
        if id in not_taken:
            rows[k] = own  # the server's own stand in their place, as in a run
    return _parts(combined(rows, layout.size, weights), (*floats, *counters), given)


def _parts(flat: Tensor, names: Sequence[str], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vector cut into tensors of these names, in the shapes and dtypes of the global state."""
    parts = torch.split(flat, [like[key].numel() for key in names])
    return {key: part.view_as(like[key]).to(like[key].dtype) for key, part in zip(names, parts, strict=True)}


def _for_all(decision: Decision, at: Sequence[int], n: int) -> Decision:
    """The decision with a place for every client: weight 0 and score inf for those that no rule saw."""

    def spread(values: Tensor | None, missing: float) -> Tensor | None:
        if values is None:
            return None
        found = values.new_full((n,), missing) if values.dtype != torch.bool else values.new_zeros(n)
        found[torch.tensor(at)] = values
        return found

    return replace(
        decision,
        weights=spread(decision.weights, 0.0),
        kept=spread(decision.kept, 0.0),
        scores=spread(decision.scores, float("inf")),
    )
