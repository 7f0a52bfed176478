"""Before a round the server plants its indicator task in the model that it sends (defenses/indicator.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedllm_sec.defenses.indicator import best_label, logits_of, right_of
from fedllm_sec.errors import DefenseError
from fedllm_sec.models.function import Indicator
from fedllm_sec.protocols import Client, Labelled, LocalRule, LocalTraining
from fedllm_sec.rounds.client import make_optimizer, train_locally

if TYPE_CHECKING:
    from fedllm_sec.rounds.federation import Federation

SERVER = "indicator"  # whose draws they are: no client's
LEARNT = 0.5  # of its rows that a planted model tells right


@dataclass(frozen=True)
class Planting:
    """The task, how it is trained, and from which score on a client is refused."""

    rows: Labelled
    training: LocalTraining
    rules: Sequence[LocalRule]
    threshold: float


def plant(federation: Federation, r: int) -> None:
    """Train the task into the federation's vector; its running statistics stay, those of planting are for judging.

    Every rank trains the same steps and takes the first one's. What is planted follows from vector, seed and round
    alone, so a resumed run plants the same. `last_update` becomes the difference of two models that clients were sent.
    A DefenseError where the first planted model is not refused itself, or tells less than half of the rows right, as
    one does that gives all of them one label: then nobody could be told by the task.
    """
    known, task, machine, start = federation.planting, federation.task, federation.machine, federation.vector
    assert known is not None
    training = replace(known.training, joins=federation.training.joins)
    done = train_locally(
        task, Client(SERVER, known.rows), start, optimizer=make_optimizer(task, training), stepper=machine,
        training=training, rules=known.rules, round=r, rounds=r, seed=federation.seed,
        buffers=federation.buffers, before=federation.before,
    )  # fmt: skip
    moved = machine.share(done.delta)
    left: Any = None if done.buffers is None else machine.share(done.buffers.to(machine.device))
    federation.vector = start + moved
    if federation.last_update is not None:
        federation.last_update = federation.last_update + moved
    x, y, function = known.rows.x, known.rows.y, task.function  # type: ignore[attr-defined]
    before, planted = Indicator(x, y, function(federation.buffers)), Indicator(x, y, function(left))
    said = logits_of(planted, federation.vector)
    score, right = best_label(said, y), right_of(said, y)
    held = right_of(logits_of(before, start), y)
    federation.indicator = replace(planted, planted=score, moved=float(moved.norm()), left=held)
    if r == 1 and not (score >= known.threshold and right >= LEARNT):
        raise DefenseError(
            f"backdoor_indicator: after planting the model itself scores {score:.2f} (threshold={known.threshold:g}) "
            f"and tells {right:.2f} of the rows right (at least {LEARNT:g}): the task was not learnt, so that nobody "
            "could be told by it. Raise epochs or lr, lower mu, take fewer rows, or begin with a trained model "
            "(pretrain, model.start)."
        )
