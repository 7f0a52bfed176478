"""Attackers who learn their trigger do so when a round begins, against the model that they have just been sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedllm_sec.attacks.data.learnt import TriggerView, learner
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.data.arrays import to_device
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix.shown import only_shown
from fedllm_sec.protocols import Client, tensors_of
from fedllm_sec.rounds.cohort import sample
from fedllm_sec.seeds import generator_for

if TYPE_CHECKING:
    from fedllm_sec.rounds.federation import Federation


def tune(federation: Federation, cohort: Sequence[Client], r: int) -> None:
    """Those who attack in round r learn the trigger, where there is one to learn, on their clean rows put together.

    Their rows are poisoned anew with it, the same ones as before, and the held-out rows are triggered anew. Where the
    attack is switched off, those who would attack learn it all the same and poison nothing: what such a trigger does to
    a model that nobody attacked is what an attack must beat.
    """
    threat, task, machine = federation.threat, federation.task, federation.machine
    if threat is None or (attack := learner(threat.data)) is None:
        return
    ours = _who(federation, threat, cohort, r)
    if not ours:
        return
    x = torch.cat([client.shard.x for client in ours])
    y = torch.cat([client.shard.y for client in ours])
    rng = generator_for(federation.seed, federation.before + r, "trigger")
    function, vector = task.function(federation.buffers), federation.vector.clone()  # type: ignore[attr-defined]
    attack.tune(TriggerView(function, vector, x, y, rng))
    if attack.learnt is None:
        raise AttackError("attack.data.0: its tune has set no `learnt`. Mend it.")
    attack.learnt = machine.share(attack.learnt.to(machine.device))
    for client in ours if threat.malicious else ():
        threat.poisoned[client.id] = poisoned_again(federation.seed, threat, client)
    show(federation)


def _who(federation: Federation, threat: Threat, cohort: Sequence[Client], r: int) -> list[Client]:
    """Those of the cohort who attack in round r, or who would."""
    due = threat.planned if threat.planned is not None else threat
    if not due.active(r):
        return []
    if threat.planned is not None:
        rng = generator_for(federation.seed, federation.before + r, "cohort")
        cohort = sample(federation.clients, federation.per_round, rng, due.sure(r))
    attackers = due.attackers(r)
    return [client for client in cohort if client.id in attackers]


def poisoned_again(seed: int, threat: Threat, client: Client) -> Any:
    """An attacker's shard with the trigger as it is now; which rows have it is drawn as it was before training."""
    rows = to_device(client.shard, torch.device("cpu"))  # where they were poisoned at first
    with only_shown("attack.data.0", AttackError, **tensors_of(rows)):
        made = threat.data[0].poison(rows, generator_for(seed, "poison", client.id))
    return to_device(made, client.shard.x.device)


def show(federation: Federation) -> None:
    """Let the held-out rows of this federation, which others share no more, have the trigger as it is now."""
    attack = learner(federation.threat.data) if federation.threat is not None else None
    if attack is not None and attack.learnt is not None and federation.triggered is not None:
        federation.evaluation = federation.triggered()
