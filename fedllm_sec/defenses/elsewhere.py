"""Checks of the kit that need other surroundings: a state from another device, models of other sizes, other places."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fedllm_sec.defenses.subject import EXAMPLES, PLANTED, StandIn, Subject
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext
from fedllm_sec.seeds import generator_for

HOLDS = "a state loaded from an accelerator"
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)  # by places that may lie anywhere
FEW, TIMES = 1_000, (1, 1_000)  # values of the small model, and how many times as many there are


class OtherDevice(TorchFunctionMode):
    """torch's meta device as an accelerator: what lies there is computed there and meets nothing of the CPU unseen.

    Meta tensors have no values, so each has a twin on the CPU, which is computed with, and which is what a copy to the
    CPU gives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.twins: dict[int, tuple[Tensor, Tensor]] = {}  # id of a meta tensor -> itself (so the id stays its), twin

    def send(self, value: Any) -> Any:
        """The value with all tensors in it on the other device."""
        return tree_map(lambda part: self._sent(part) if isinstance(part, Tensor) else part, value)

    def _sent(self, twin: Tensor) -> Tensor:
        away = torch.empty(twin.shape, dtype=twin.dtype, device="meta")
        self.twins[id(away)] = away, twin
        return away

    def _twin(self, value: Any) -> Any:
        return self.twins[id(value)][1] if self._is_away(value) else value

    def _is_away(self, value: Any) -> bool:
        return id(value) in self.twins

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = tree_leaves((args, kwargs))
        here = [part for part in parts if isinstance(part, Tensor) and part.ndim > 0 and not self._is_away(part)]
        if not any(self._is_away(part) for part in parts):
            return func(*args, **kwargs)
        if func.__name__ == "__get__" and not isinstance(asked := func(*args), Tensor):  # .device, .is_cuda, ...
            return asked
        if func is Tensor.numpy or (here and func not in (Tensor.to, Tensor.copy_, *INDEXING)):
            raise RuntimeError(f"{func.__name__}: a tensor on the accelerator meets one on the CPU.")
        made = func(*tree_map(self._twin, args), **tree_map(self._twin, kwargs))
        home = func is Tensor.cpu or (func is Tensor.to and (here or any(str(part) == "cpu" for part in parts[1:])))
        if func is Tensor.copy_:
            return args[0]
        return made if home else self.send(made)


def state_from_elsewhere(
    subject: Subject, state: dict[str, Any], last: UpdateMatrix, wanted: Decision, *, round: int
) -> None:
    """A rule says itself where its state lies: loaded from an accelerator it goes on as it would have."""
    device = OtherDevice()
    away = device.send(state)
    if not device.twins:  # it remembers no tensor
        return
    with device:
        resumed = subject.make()
        try:
            resumed.load_state_dict(away)
            got = subject.run(last, resumed, round=round)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise subject.fail(HOLDS, f"{error} In load_state_dict, put tensors where the rule computes.") from error
    subject.expect(torch.equal(got.update, wanted.update), HOLDS, "gave another update")


def sizes(subject: Subject) -> None:
    """The same settings for a model of a thousand and of a million values: as far from the mean of the rows."""
    gaps = [_gap(subject, times) for times in TIMES]
    told = ", ".join(f"{gap:.3g} at d = {FEW * times:,}" for gap, times in zip(gaps, TIMES, strict=True))
    what = f"the update is so many mean lengths from the mean: {told}"
    subject.expect(gaps[1] <= 2 * gaps[0] + 0.1, "models of other sizes", what)


def _gap(subject: Subject, times: int) -> float:
    """||update - mean|| / ||mean|| for the same rows, of length 1 or so, laid out so many times."""
    layout = Layout(("body.lora_A", "body.lora_B", "head.weight"), tuple((4, c * times) for c in (100, 100, 50)))
    rng, n = generator_for(7, "sizes"), subject.clients
    step, noise = torch.randn(FEW, generator=rng), torch.randn(n, FEW, generator=rng)
    rows, along = (part.repeat(1, times) / layout.size**0.5 for part in (step + 0.5 * noise, step[None]))
    known: dict[str, Any] = {"rounds": 10, "last_update": along[0], "root_update": along[0]}
    known |= {"root_rows": EXAMPLES, "classifier": StandIn(), "indicator": PLANTED}
    ctx = RoundContext(1, torch.zeros(layout.size), layout, generator_for(7, "rule"), **known)
    pipeline = subject.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noise that is too long warns in a run; here it fails
        update = pipeline.finish(pipeline.decide(UpdateMatrix.of(rows, layout=layout), ctx).update, ctx)
    mean = rows.mean(0)
    return float((update - mean).norm() / mean.norm())


def any_place(subject: Subject) -> None:
    """A rule that answers with the row at some place, whoever sent it, ignores all others: that is no aggregation."""
    updates = subject.data()
    taken = set(range(updates.n)) if updates.n > 1 else set()
    for first in (0, 1, updates.n // 2):
        order = [(first + i) % updates.n for i in range(updates.n)]
        ids, counts = tuple(updates.ids[i] for i in order), tuple(updates.counts[i] for i in order)
        turned = replace(updates, rows=updates.rows[order], ids=ids, counts=counts)
        update, rows = subject.run(turned).update.double(), turned.rows.double()
        along = (rows @ update) / rows.norm(dim=1)
        taken &= {i for i in range(updates.n) if float(along[i]) > (1 - 1e-9) * float(update.norm())}
    told = f"in any order of the rows the update is the one at place {min(taken, default=0)}, whoever sent it"
    subject.expect(not taken, "every row counts", told)
