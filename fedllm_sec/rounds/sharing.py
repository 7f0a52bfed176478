"""What was made before: the same training gives the same row, and the same pass over held-out rows the same numbers.

The runs of a grid train many clients alike: honest ones from the same vector under every attack, all of them while an
attack has not begun; and there they measure the same model. A row, and a pass over held-out rows, is known by all that
it depends on, so one that is taken from the store is, byte for byte, the one that would have been made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm_sec.evaluation.repeatable import Repeatable
from fedllm_sec.protocols import Client, LocalResult, LocalRule
from fedllm_sec.rounds.source import Asked, Came, Source, trained_here
from fedllm_sec.rounds.store import Digests, Store, Unlike, code, digest, place

if TYPE_CHECKING:
    from fedllm_sec.rounds.federation import Federation

TRAINED, TAKEN = "trained", "taken"  # of rows: by this process, and from the store
MEASURED, FOUND = "measured", "found"  # the same of passes over held-out rows


# ---------------------------------------------------------------- rows


def shared(store: Store, settings: str) -> Source:
    """Clients that train in this process, or have trained the same before; `settings` are those of their training.

    Never taken are rows beside which something else happens: where a client runs a defense of its own, an attacker
    changes its steps, or an observer looks on.
    """
    shards: dict[str, tuple[Any, str]] = {}  # client id -> its shard and the digest of it

    def source(federation: Federation, cohort: Sequence[Client], asked: Asked) -> Came:
        device = federation.machine.device
        if federation.machine.world > 1:
            return trained_here(federation, cohort, asked)
        base = digest([settings, code(), place(device), _round(federation, asked)])

        def train(client: Client, guards: Sequence[LocalRule]) -> LocalResult:
            key = _key(federation, client, guards, asked.round, base, shards)
            if key is None:
                return asked.train(client, guards)
            if (parts := store.get(key, _shapes(asked))) is not None:
                store.counts[TAKEN] += 1
                return unpacked(client.id, parts, device)
            made = asked.train(client, guards)
            store.counts[TRAINED] += 1
            store.put(key, packed(made))
            return made

        return trained_here(federation, cohort, replace(asked, train=train))

    return source


def packed(row: LocalResult) -> dict[str, Tensor]:
    """A row as tensors."""
    numbers = torch.tensor([row.count, row.steps, row.loss], dtype=torch.float64)
    beside = {} if row.buffers is None else {"buffers": row.buffers}
    return {"delta": row.delta, "numbers": numbers, **beside}


def unpacked(id: str, parts: dict[str, Tensor], device: torch.device) -> LocalResult:
    """The row that they were of."""
    count, steps, loss = parts["numbers"].tolist()
    return LocalResult(id, parts["delta"].to(device), count, int(steps), loss, parts.get("buffers"))


def _shapes(asked: Asked) -> dict[str, tuple[int, ...] | None]:
    beside = (asked.beside,) if asked.beside else None
    return {"delta": tuple(asked.start.shape), "numbers": (3,), "buffers": beside}


def _round(federation: Federation, asked: Asked) -> list[Any]:
    """What all clients of a round are sent, and by what they train."""
    training, shifted = federation.training, federation.shifted
    rounds = asked.rounds if training.lr_schedule != "constant" else None
    sent = [asked.start, asked.control, federation.buffers, shifted.state_dict() if shifted is not None else None]
    ruled = bool(federation.algorithm.local) or federation.averaging is not None
    seen = asked.last_update if ruled else None  # only a rule sees the last step
    return [federation.seed, federation.before, asked.round, rounds, training, sent, seen]


def _key(
    federation: Federation, client: Client, guards: Sequence[LocalRule], round: int, base: str,
    shards: dict[str, tuple[Any, str]],
) -> str | None:  # fmt: skip
    """The name of a client's row; None where it is the row of more than can be said here."""
    threat = federation.threat
    attacks = threat is not None and client.id in threat.attackers(round)
    rules = threat.rules(client, round) if attacks and threat is not None else guards
    if rules or federation.observer.rules(client.id, round):
        return None
    held, known = shards.get(client.id, (None, ""))
    try:
        if held is not client.shard:
            known = digest(client.shard)
            shards[client.id] = client.shard, known
        return digest([base, client.id, known, client.memory])
    except Unlike:
        return None


# ---------------------------------------------------------------- passes over held-out rows


def measured_once(store: Store, settings: str, federation: Federation) -> Callable[..., Tensor]:
    """`Machine.spread` of a federation, whose numbers may have been found before; `settings` say which model and data.

    A pass is known by the model in memory (its vector, its buffers, what base weights have gained), the batches and
    what it is of. One that is not `Repeatable`, or that is of what cannot be compared, is made anew; one that drew from
    torch's generator or changed the model's buffers is not kept, since the next one would miss that.
    """
    machine, digests = federation.machine, Digests()

    def spread(batches: Sequence[Any], width: int, score: Any) -> Tensor:
        if machine.world > 1 or not isinstance(score, Repeatable):
            return machine.spread(batches, width, score)
        model = _model(federation)
        try:
            of = [digests.of(part) for part in score.of]
            base = [settings, code(), place(machine.device), model]
            key = digest(["pass", base, federation.task.parameters, list(batches), width, of])
        except Unlike:
            return machine.spread(batches, width, score)
        rows = sum(len(batch) for batch in batches)
        if (parts := store.get(key, {"numbers": (rows, width)})) is not None:
            store.counts[FOUND] += 1
            return parts["numbers"]
        drawn = _drawn(machine.device)
        made = machine.spread(batches, width, score)
        store.counts[MEASURED] += 1
        if _drawn(machine.device) == drawn and _model(federation) == model:
            store.put(key, {"numbers": made})
        return made

    return spread


def _model(federation: Federation) -> str:
    """The digest of what the model in memory holds beside its vector and the weights that its settings name."""
    task, shifted = federation.task, federation.shifted
    scale = [getattr(task, name, None) for name in ("mean", "std")]  # by which images are normalised
    return digest([dict(task.model.named_buffers()), scale, shifted.state_dict() if shifted is not None else None])


def _drawn(device: torch.device) -> str:
    """Where torch's generators stand."""
    return digest([torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None])
