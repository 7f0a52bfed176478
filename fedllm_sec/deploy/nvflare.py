"""Our rules in an NVFlare job: an `Aggregator` for its ScatterAndGather workflow. Needs `pip install nvflare`.

    job.to_server(RobustAggregator("multi_krum", {"f": 1}), id="aggregator")

Whatever the model, what clients send is compared with the global model that they were sent; a rule decides on the
differences. Clients may send whole models (WEIGHTS) or differences (WEIGHT_DIFF), and get back what most of them sent.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from torch import Tensor

from fedllm_sec.api.rows import Stage
from fedllm_sec.api.states import Merged, aggregate_state_dicts
from fedllm_sec.deploy.decisions import Decisions, made
from fedllm_sec.deploy.exchange import in_short
from fedllm_sec.deploy.replies import MOST_EXAMPLES, number
from fedllm_sec.deploy.wire import Refused
from fedllm_sec.errors import DefenseError


class RobustAggregator(Aggregator):  # type: ignore[misc]  # nvflare has no types
    """One rule on a round's contributions. `rule`, its `settings` and `before` are menu names.

    A contribution that cannot be used is rejected with a reason: of another round, a second one, other names, shapes or
    types, values or claimed steps that are no finite numbers. A client's weight is its claimed steps, 1 where it claims
    none, as NVFlare's own aggregator has it. Rules that remember do so by the client's name. `log` is a folder for
    `fedllm-sec report`; it lies in the server's workspace where the path is relative.
    """

    def __init__(
        self, rule: str = "multi_krum", settings: Mapping[str, Any] | None = None, before: Sequence[Stage] = (),
        log: str | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rule, self.settings, self.before, self.log, self.seed = rule, settings, before, log, seed
        # NVFlare writes a component down by its arguments: what is made of them is made in the first round
        self._made: tuple[Any, list[Any], Decisions] | None = None
        self._rounds = 0  # that were aggregated: a job may begin at any number
        self._lock = threading.Lock()  # contributions are accepted in threads
        self.reset(None)

    def reset(self, fl_ctx: FLContext | None) -> None:
        """Forget the round's contributions; what the rule remembers stays."""
        self._states: dict[str, dict[str, Tensor]] = {}
        self._counts: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self._kinds: dict[str, str] = {}  # in which each of them came

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Take a contribution up; False, with the reason in the record, where it cannot be used."""
        id = str(shareable.get_peer_prop(key=ReservedKey.IDENTITY_NAME, default="?"))  # the server's own word for it
        with self._lock:
            try:
                self._take(id, shareable, fl_ctx)
                return True
            except Exception as error:  # whatever a strange contribution makes of being looked at
                said = str(error) if isinstance(error, Refused) else f"cannot be read: {type(error).__name__}: {error}"
                if id not in self._states:
                    self._refused[id] = in_short(said)
                self.log_warning(fl_ctx, f"{in_short(id)}: {in_short(said)}")
                return False

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """The new global model, or what it gains; the old one where nothing can be used or the rule cannot decide."""
        with self._lock:
            self._rounds += 1
            number, given = self._rounds, _global(fl_ctx)
            rule, before, decisions = self._ready()
            ids, examples = list(self._states), sum(self._counts.values())
            merged, skipped = None, "no contribution can be used"
            if ids:
                try:
                    merged = self._merged(number, given, rule, before)
                    if merged.decision.kept is not None and not bool(merged.decision.kept.any()):
                        merged, skipped = None, "the rule kept nobody"
                except DefenseError as error:
                    skipped = in_short(str(error))
            refused = {**self._refused, **(merged.refused if merged is not None else {})}
            length = float(merged.decision.update.norm()) if merged is not None else 0.0
            decisions.add(number, ids, merged, refused, examples, length, None if merged is not None else skipped)
            if merged is None:
                self.log_warning(fl_ctx, f"round {number}: the model stays: {skipped}")
            state = merged.state if merged is not None else given
            came = list(self._kinds.values())
            kind = max(came, key=came.count, default=DataKind.WEIGHTS)  # as most of them have it
            if kind == DataKind.WEIGHT_DIFF:
                state = {k: _wide(v) - _wide(given[k]) for k, v in state.items() if v.dtype != torch.bool}
            state = {key: value.to(given[key].dtype) for key, value in state.items()}
            self.reset(fl_ctx)
            return DXO(kind, data=_as_sent(state, fl_ctx)).to_shareable()

    def _ready(self) -> tuple[Any, list[Any], Decisions]:
        if self._made is None:
            settings = dict(self.settings or {})
            rule = made(self.rule, settings, "rule", "rule")
            before = [made(item, {}, "before", f"before[{i}]") for i, item in enumerate(self.before)]
            self._made = rule, before, Decisions.begun(self.log, self.rule, settings)
        return self._made

    def _take(self, id: str, shareable: Shareable, fl_ctx: FLContext) -> None:
        if id in self._states:
            raise Refused("it has contributed already")
        if (code := shareable.get_return_code()) not in (None, ReturnCode.OK):
            raise Refused(f"it answers with {code}")
        of, now = shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND), fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        if type(of) is not int or of != now:
            raise Refused(f"it contributes to round {str(of)[:40]}, this is round {now}")
        dxo = from_shareable(shareable)
        if dxo.data_kind not in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF):
            raise Refused(f"it sends {str(dxo.data_kind)[:40]}, must be WEIGHTS or WEIGHT_DIFF")
        steps = dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND)
        count = 1.0 if steps is None else number(steps, "its steps", -math.inf, MOST_EXAMPLES)
        if count <= 0:
            raise Refused(f"claims {count:g} steps")
        if not (given := _global(fl_ctx)):
            raise Refused("the workflow holds no global model to compare with: give it a persistor (persistor_id)")
        if not isinstance(dxo.data, Mapping) or set(dxo.data) != set(given):
            raise Refused("has other names than the global model")
        state = {key: _tensor(value, key, given[key]) for key, value in dxo.data.items()}
        if dxo.data_kind == DataKind.WEIGHT_DIFF:
            wide = {k: _wide(v) for k, v in given.items()}
            state = {k: v if v.dtype == torch.bool else wide[k] + v.to(wide[k].dtype) for k, v in state.items()}
        for key, value in state.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise Refused(f"{key}: holds values that are not finite")
        self._states[id], self._counts[id], self._kinds[id] = state, count, dxo.data_kind
        self._refused.pop(id, None)

    def _merged(self, number: int, given: Mapping[str, Tensor], rule: Any, before: Sequence[Any]) -> Merged:
        states: list[Mapping[str, Tensor]] = list(self._states.values())
        if DataKind.WEIGHT_DIFF in self._kinds.values():
            given, *states = ({k: _wide(v) for k, v in state.items()} for state in (given, *states))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # who is not taken is in the record
            return aggregate_state_dicts(
                states, given, rule, ids=list(self._states), counts=list(self._counts.values()),
                before=before, round=number, seed=self.seed,
            )  # fmt: skip


def _global(fl_ctx: FLContext) -> dict[str, Tensor]:
    """The global model that the round began with, as NVFlare's workflow keeps it."""
    weights = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
    return {str(key): _own(value) for key, value in weights.items()}


def _as_sent(state: Mapping[str, Tensor], fl_ctx: FLContext) -> dict[str, Any]:
    """Tensors where the global model has tensors, numpy's arrays where it has those."""
    weights = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
    return {k: v if isinstance(weights[k], Tensor) else np.asarray(v.numpy()) for k, v in state.items()}


def _wide(value: Tensor) -> Tensor:
    """In float64, where it is no integer: most of a difference is lost in a sum in the model's own type."""
    return value.double() if value.is_floating_point() else value


def _own(value: Any) -> Tensor:
    return value.detach().clone() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _tensor(value: Any, name: str, wanted: Tensor) -> Tensor:
    """A client's array as a tensor; Refused where its shape or kind is not that of the global model's."""
    if not isinstance(value, (Tensor, np.ndarray, np.generic)):
        raise Refused(f"{name}: is a {type(value).__name__}, must be an array")
    if tuple(value.shape) != tuple(wanted.shape):
        raise Refused(f"{name}: has shape {tuple(value.shape)}, must be {tuple(wanted.shape)}")
    if not isinstance(value, Tensor) and value.dtype.kind not in "fiub":
        raise Refused(f"{name}: is of type {value.dtype}, which no model holds")
    found = _own(value)
    if found.is_floating_point() != wanted.is_floating_point():
        raise Refused(f"{name}: is {found.dtype}, must be {wanted.dtype}")
    return found
