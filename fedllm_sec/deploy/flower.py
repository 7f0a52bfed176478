"""Our rules inside anybody's Flower app: one line to change.

    strategy = RobustStrategy(FedAvg(), rule="multi_krum", f=2)

The app stays as it is: whatever its model, its replies' arrays are compared with what they answer to, a rule decides
on the differences, and the strategy inside is handed one reply that holds the result.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedllm_sec.api.rows import Stage
from fedllm_sec.api.states import Merged, aggregate_state_dicts
from fedllm_sec.deploy.decisions import Decisions, made
from fedllm_sec.deploy.exchange import CarefulGrid, in_short
from fedllm_sec.deploy.replies import MOST_EXAMPLES, number
from fedllm_sec.deploy.wire import Refused
from fedllm_sec.errors import DefenseError
from fedllm_sec.kernels.claims import capped
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import RoundContext
from fedllm_sec.seeds import generator_for

HEADER = 4096  # bytes that numpy's header may take beside the numbers


class RobustStrategy(Strategy):
    """A Flower strategy whose training replies first go through our pipeline.

    `inner` is any strategy (FedAvg, FedAdam, ...) and keeps its settings; `rule`, its settings, `before` and `after`
    are as in `fedllm_sec.aggregate`: menu names, ("name", {settings}) or callables. Rules that remember do so by node
    id. Replies that cannot be used are refused with a reason: other arrays, shapes, types or sizes than were sent,
    values that are not finite, claims that are no numbers of examples (the metric `weighted_by`; else that of the
    strategy inside). `deltas` says that the app's clients send differences. `log` is a folder whose history.jsonl gets
    a line a round, for `fedllm-sec report`; a round that is skipped is also a warning. `screen` is True: nobody's reply
    goes unscreened.
    """

    def __init__(
        self,
        inner: Strategy,
        rule: str | Callable[..., Any] = "multi_krum",
        *,
        before: Sequence[Stage] = (),
        after: Sequence[Stage] = (),
        screen: bool = True,
        deltas: bool = False,
        log: str | Path | None = None,
        weighted_by: str | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if screen is not True:
            raise DefenseError(f"RobustStrategy: screen={screen!r}: replies are always screened. Leave it out.")
        self.inner, self.deltas, self.seed = inner, deltas, seed
        self.weighted_by: str = weighted_by or getattr(inner, "weighted_by_key", "num-examples")
        self.rule = made(rule, settings, "rule", "rule")
        self.before = [made(item, {}, "before", f"before[{i}]") for i, item in enumerate(before)]
        self.after = [made(item, {}, "after", f"after[{i}]") for i, item in enumerate(after)]
        self.sent: dict[str, Tensor] = {}
        self.grid: CarefulGrid | None = None
        self.log = Decisions.begun(log, rule, settings)

    def start(self, grid: Grid, *args: Any, **settings: Any) -> Result:
        """The rounds, over a grid of which no reply can raise or block."""
        self.grid = CarefulGrid(grid)
        return super().start(self.grid, *args, **settings)

    def summary(self) -> None:
        self.inner.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the strategy inside sends; what it sends is what replies are compared with."""
        self.sent = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
        return self.inner.configure_train(server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One reply from all that can be used, by the rule, for the strategy inside; none where there are too few."""
        refused = {str(node): why for node, why in (self.grid.missing if self.grid is not None else {}).items()}
        states: dict[str, dict[str, Tensor]] = {}
        usable: dict[str, Message] = {}
        counts: dict[str, float] = {}
        for reply in replies:
            node = str(reply.metadata.src_node_id)
            try:
                if node in states:
                    raise Refused("it has sent a reply already")
                counts[node] = self._count(reply)
                states[node] = self._state(reply)
                usable[node] = reply
            except Refused as error:
                refused.setdefault(node, in_short(str(error)))
            except Exception as error:  # whatever a strange reply makes of being looked at
                refused.setdefault(node, in_short(f"cannot be read: {type(error).__name__}: {error}"))
        names = {n: (*(c := usable[n].content).array_records, *c.metric_records) for n in states}
        for node, own in names.items():  # the strategy inside may go by them
            if own != (usual := Counter(names.values()).most_common(1)[0][0]):
                refused[node] = in_short(f"its records are called {', '.join(own)}, most replies' {', '.join(usual)}")
                del states[node]
        examples = sum(counts[node] for node in states)
        merged, skipped = None, "no reply can be used"
        if states:
            try:
                merged = self._merged(server_round, states, [counts[node] for node in states])
                if merged.decision.kept is not None and not bool(merged.decision.kept.any()):
                    merged, skipped = None, "the rule kept nobody"
            except DefenseError as error:
                skipped = in_short(str(error))
        if merged is None:
            self.log.add(server_round, list(states), None, refused, examples, 0.0, skipped)
            who = "; ".join(f"node {node}: {why}" for node, why in list(refused.items())[:3])
            warnings.warn(f"RobustStrategy: round {server_round} is skipped: {skipped}. {who}", stacklevel=2)
            return None, None
        refused |= merged.refused
        taken = [node for node in states if node not in merged.refused or node in merged.buffers_refused]
        content = self._content(merged, usable[taken[0]], [usable[n] for n in taken], sum(counts[n] for n in taken))
        handed = copy.copy(usable[taken[0]])
        handed.content = content
        arrays, metrics = self.inner.aggregate_train(server_round, [handed])
        if arrays is not None:
            arrays = self._finished(server_round, arrays, merged.trained)
        length = float(merged.decision.update.norm())
        self.log.add(server_round, list(states), merged, refused, examples, length, None)
        return arrays, metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's own mean of the replies whose metrics are those that most clients send, all finite numbers.

        A claim of examples weighs no more than CAP median claims, as in the rules.
        """
        kept: dict[int, Message] = {}
        for reply in replies:
            try:
                self._count(reply)
                kept.setdefault(reply.metadata.src_node_id, reply)
            except Exception as error:
                warnings.warn(f"evaluation of node {reply.metadata.src_node_id}: {in_short(str(error))}", stacklevel=2)
        if not kept:
            return None
        shapes = {node: _shape_of(reply) for node, reply in kept.items()}
        usual = Counter(shapes.values()).most_common(1)[0][0]
        alike = [m for node, m in kept.items() if shapes[node] == usual]
        counts = [self._count(m) for m in alike]
        return self.inner.aggregate_evaluate(
            server_round, [self._weighing(m, most) for m, most in zip(alike, capped(counts).tolist(), strict=True)]
        )

    # ------------------------------------------------------------ a reply

    def _weighing(self, reply: Message, most: float) -> Message:
        """The same reply, claiming at most so many examples."""
        ((name, metrics),) = reply.content.metric_records.items()
        if float(metrics[self.weighted_by]) <= most:  # type: ignore[arg-type]
            return reply
        weighed = copy.copy(reply)
        weighed.content = RecordDict({**reply.content, name: MetricRecord({**metrics, self.weighted_by: most})})
        return weighed

    def _count(self, reply: Message) -> float:
        """The claimed examples of a reply whose metrics are all finite numbers."""
        if reply.has_error():
            raise Refused(f"its device answers with an error: {reply.error.reason}")
        records = reply.content.metric_records
        if len(records) != 1:
            raise Refused(f"has {len(records)} metric records, must be 1")
        (metrics,) = records.values()
        for name, value in metrics.items():
            for each in value if isinstance(value, list) else [value]:
                number(each, name[:40], -math.inf, math.inf)
        if self.weighted_by not in metrics:
            raise Refused(f"claims no {self.weighted_by}")
        count = number(metrics[self.weighted_by], self.weighted_by, 0.0, MOST_EXAMPLES)
        if count <= 0:
            raise Refused(f"claims {count:g} examples")
        return count

    def _state(self, reply: Message) -> dict[str, Tensor]:
        """The arrays of a reply, which must be those that were sent, to the byte."""
        records = reply.content.array_records
        if len(records) != 1:
            raise Refused(f"has {len(records)} array records, must be 1")
        (arrays,) = records.values()
        if len(arrays) != len(self.sent) or set(arrays) != set(self.sent):
            odd = sorted(set(map(str, arrays)) ^ set(self.sent))[:3]
            raise Refused(f"has {len(arrays)} arrays, {len(self.sent)} were sent; other names: {', '.join(odd)}")
        state = {name: read_array(arrays[name], wanted, name) for name, wanted in self.sent.items()}
        if not self.deltas:
            return state
        sent = self._compared()
        return {k: sent[k] + v.double() if v.is_floating_point() else v for k, v in state.items()}

    def _compared(self) -> dict[str, Tensor]:
        """What replies are compared with: in float64 for differences, most of which a sum in the model's type loses."""
        return {k: v.double() if self.deltas and v.is_floating_point() else v for k, v in self.sent.items()}

    # ------------------------------------------------------------ the decision

    def _merged(self, server_round: int, states: Mapping[str, Mapping[str, Tensor]], counts: Sequence[float]) -> Merged:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # who is not taken is in the record
            return aggregate_state_dicts(
                list(states.values()), self._compared(), self.rule, ids=list(states), counts=counts,
                before=self.before, round=server_round, seed=self.seed,
            )  # fmt: skip

    def _content(self, merged: Merged, like: Message, taken: Sequence[Message], total: float) -> RecordDict:
        """A reply's content with the result in its arrays, under the names that the app's own records have."""
        state, sent = merged.state, self._compared()
        if self.deltas:
            state = {k: (v - sent[k]).to(self.sent[k].dtype) if v.is_floating_point() else v for k, v in state.items()}
        ((place, _),), ((beside, _),) = like.content.array_records.items(), like.content.metric_records.items()
        metrics = [next(iter(message.content.metric_records.values())) for message in taken]
        said = Counter(name for m in metrics for name, value in m.items() if type(value) in (int, float))
        shared = {
            name: float(np.mean([m[name] for m in metrics if type(m.get(name)) in (int, float)]))
            for name, often in said.items()
            if name != self.weighted_by and 2 * often > len(metrics)
        }
        arrays = {name: Array(value.contiguous().numpy()) for name, value in state.items()}
        return RecordDict({place: ArrayRecord(arrays), beside: MetricRecord({self.weighted_by: total, **shared})})

    def _finished(self, server_round: int, arrays: ArrayRecord, trained: Sequence[str]) -> ArrayRecord:
        """What the stages after the server's step make of its parameters, in the types that were sent.

        Flower's mean turns a counter of batches into a fraction, and the app's clients would send back another type.
        """
        found = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
        for name, value in found.items():
            if value.dtype != (own := self.sent[name].dtype) and not self.deltas:
                found[name] = (value if own.is_floating_point else value.round()).to(own)
        if not self.after:
            return ArrayRecord({name: Array(value.numpy()) for name, value in found.items()})
        layout = Layout.of((name, found[name]) for name in trained)
        vector, old = layout.join(found).float(), layout.join(self.sent).float()
        for i, stage in enumerate(self.after):
            rng = generator_for(self.seed, server_round, f"after{i}")
            vector = stage(vector, RoundContext(server_round, old, layout, rng))
        found |= {name: part.to(found[name].dtype) for name, part in layout.split(vector).items()}
        return ArrayRecord({name: Array(value.contiguous().numpy()) for name, value in found.items()})


def read_array(array: Array, wanted: Tensor, name: str) -> Tensor:
    """The tensor of an array that is of the wanted type and shape, to the byte; Refused else.

    numpy's header is read by itself, so that nothing is taken up for numbers that are not there, and no object is ever
    loaded.
    """
    if array.stype != "numpy.ndarray":
        raise Refused(f"{name}: its bytes are of kind {str(array.stype)[:40]!r}")
    size = wanted.numel() * wanted.element_size()
    if not size <= len(array.data) <= size + HEADER:
        raise Refused(f"{name}: holds {len(array.data)} bytes, {size} and a header were expected")
    file = BytesIO(array.data)
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(file)
    own = wanted.numpy().dtype
    if dtype != own or dtype.byteorder not in "=|<" or tuple(shape) != tuple(wanted.shape):
        raise Refused(f"{name}: is {dtype} {tuple(shape)}, {own} {tuple(wanted.shape)} was sent")
    if len(array.data) - file.tell() != size:
        raise Refused(f"{name}: holds {len(array.data) - file.tell()} bytes of numbers, must be {size}")
    numbers = np.frombuffer(array.data, dtype=own, offset=file.tell())
    return torch.from_numpy(np.array(numbers.reshape(shape, order="F" if by_column else "C"), order="C"))


def _shape_of(reply: Message) -> tuple[Any, ...]:
    """The name of a reply's record, the names of its metrics, and how long those that are lists are."""
    ((name, metrics),) = reply.content.metric_records.items()
    return name, *sorted((key, len(value) if isinstance(value, list) else -1) for key, value in metrics.items())
