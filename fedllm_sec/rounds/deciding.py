"""Rank 0's part of a round: the attack, screening, the defense and the server's step, and the record of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.defenses.buffers import combined, refused
from fedllm_sec.defenses.dp_sgd import DpSgd
from fedllm_sec.errors import DefenseError, DivergedError
from fedllm_sec.evaluation.detection import detection
from fedllm_sec.evaluation.robustness import measure_rows
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.memory import watch
from fedllm_sec.models.products import MOST_FLOPS, gap_flops, product_gap
from fedllm_sec.protocols import Decision, Labelled, LocalResult
from fedllm_sec.rounds.clock import Clock
from fedllm_sec.rounds.server import ServerRound, nobody_kept
from fedllm_sec.rounds.source import Came

if TYPE_CHECKING:
    from fedllm_sec.rounds.federation import Federation

NOBODY_PROTECTED = "nobody: the recipe's public seed draws the noise"  # beside an epsilon, which asks for a secret one


def undecided() -> dict[str, Any]:
    """Rank 0's part of a record in which nobody has sent or judged anything yet."""
    return {
        "losses": {}, "norms": {}, "quarantined": {}, "buffers_refused": {},
        "weights": None, "kept": None, "scores": None, "notes": {},
        "skipped": None, "lora_gap": None, "detection": None, "robustness": None, "stealth": None, "memory_mb": {},
    }  # fmt: skip


@dataclass
class Decided:
    """The new global vector, what was taken of the rows, and rank 0's part of the record."""

    vector: Tensor
    parts: Tensor  # (n,) float64: how much of its row each client of the cohort remembers; 0 in a skipped round
    buffers: Tensor | None = None  # (b,) what the model is to hold beside its vector
    gains: Tensor | None = None  # what base weights gain, as `Averaging.packed` has it
    record: dict[str, Any] = field(default_factory=undecided)


def at_hand(federation: Federation) -> dict[str, Any]:
    """The server's model and clean rows, where they are of images, and what it has planted."""
    task, root = federation.task, federation.root.shard if federation.root is not None else None
    return {
        "root_rows": root if isinstance(root, Labelled) else None,
        "classifier": task.function(federation.buffers) if hasattr(task, "function") else None,
        "indicator": federation.indicator,
    }


def decide(
    federation: Federation,
    came: Came,
    root: LocalResult | None,
    r: int,
    rounds: int,
    clock: Clock,
    seconds: dict[str, float],
) -> Decided:
    """Attack, screening, defense and server step, on rank 0."""
    threat, algorithm, start = federation.threat, federation.algorithm, federation.vector
    averaging = federation.averaging
    assert came.collected is not None
    rows, claims, buffers = came.collected
    ids = tuple(c.id for c in came.cohort)
    updates = UpdateMatrix.of(
        rows,
        ids=ids,
        counts=claims[:, 0].tolist(),
        layout=federation.task.layout,
        chunk_mb=federation.chunk_mb,
        device=start.device,
    )

    # what each row is multiplied by before the defense; the server's own update takes part as one more row
    steps = torch.cat([claims[:, 1], torch.tensor([float(root.steps)] if root is not None else []).double()])
    factors = algorithm.factors(steps, federation.training) if algorithm.factors is not None else torch.ones_like(steps)
    server = ServerRound(
        defense=federation.defense,
        rule=algorithm.server,
        start=start,
        last_update=federation.last_update,
        root_update=root.delta * float(factors[-1]) if root is not None else None,
        factors=dict(zip(ids, factors.tolist(), strict=False)),
        sizes={c.id: federation.task.size(c.shard) for c in federation.clients},
        layout=updates.layout,
        chunk_mb=federation.chunk_mb,
        steps=midpoint(claims[:, 1]),
        lr=federation.training.lr_at(r, rounds),
        seed=federation.seed,
        round=r,
        rounds=rounds,
        before=federation.before,
        frozen=averaging.frozen(r) if averaging is not None else (),
        **at_hand(federation),
    )

    if threat is not None:
        last = federation.last_update
        known = {
            "vector": start.to(rows.device),
            "last_update": None if last is None else last.to(rows.device),
            "server_lr": algorithm.server_lr,
        }
        forged = threat.forge(updates, round=r, defense=server.rehearse, **known)
        if forged is not None:
            for place, row in zip(*forged, strict=True):
                rows[place] = row  # the matrix is the loop's own
        if federation.buffers is not None:
            buffers = threat.forge_buffers(buffers, ids, federation.task.buffers.layout, r)
    federation.observer.saw(updates, start, r)
    seconds["attack"] = clock.lap()

    decided = Decided(start.clone(), torch.zeros(len(ids), dtype=torch.float64), federation.buffers)
    record = decided.record
    record["losses"] = dict(zip(ids, claims[:, 2].tolist(), strict=True))
    record["norms"] = dict(zip(ids, kernels.row_norms(updates).tolist(), strict=True))
    record["quarantined"] = dict(came.absent)
    memory, rule = watch(start.device), algorithm.server
    held = rule.state_dict() if hasattr(rule, "state_dict") else {}
    try:
        clean, unusable = server.receive(updates)
        record["quarantined"] |= unusable
        decision = federation.defense.decide(clean, server.context())
        if nobody_kept(decision):
            record["skipped"] = "the rule kept nobody"
        else:
            decided.vector, took = server.step(decision, clean, rule, federation.defense, "defense")
            if averaging is not None and algorithm.server_lr is not None:
                made = averaging.take(decided.vector, clean, decision, start, algorithm.server_lr)
                if made is not None:
                    decided.vector, record["lora_gap"] = made.vector, made.gap
                if made is not None and made.gains is not None:
                    decided.gains = averaging.packed(made.gains, len(ids))
            decided.parts[[ids.index(id) for id in clean.ids]] = took.parts
            if federation.buffers is not None:
                decided.buffers, record["buffers_refused"] = _buffers(federation, buffers, ids, clean.ids, decision)
    except DefenseError as error:
        if not record["quarantined"] and all(bool(row.isfinite().all()) for row in rows):
            raise  # not the clients' doing: the recipe asks for what cannot be
        if hasattr(rule, "load_state_dict"):
            rule.load_state_dict(held)  # a stage after the server's step may have failed
        record["skipped"], record["memory_mb"] = str(error), memory()
        seconds["defense"] = clock.lap()
        return decided
    record["memory_mb"] = memory()
    seconds["defense"] = clock.lap()

    # from here on evaluation, which alone may know who is malicious
    _note_decision(record, decision, clean)
    record["notes"] |= federation.defense.noted
    weights = decision.weights if decision.weights is not None else torch.full((clean.n,), 1.0 / clean.n)
    if record["lora_gap"] is not None or (averaging is not None and averaging.personal):
        pass  # known from the averages themselves, or there is no one product
    elif gap_flops(clean.layout, clean.n) <= MOST_FLOPS:
        record["lora_gap"] = product_gap(clean, weights, start, getattr(federation.task, "scales", None))
    else:
        record["notes"]["lora_gap_left_out"] = 1.0
    if threat is not None and (threat.active(r) or not threat.malicious):  # attackers who pause are honest
        bad = threat.who(r)
        record["detection"] = detection(record["kept"], record["scores"], clean.ids, bad, record["weights"])
        record |= measure_rows(clean, decision.update, bad)
    seconds["evaluate"] = clock.lap()
    return decided


def private_so_far(federation: Federation, rows: DpSgd | None, control: Tensor | None) -> dict[str, Any]:
    """What a record says of privacy: of clients, and of their rows where `rows` counts them."""
    sent = "the FL method sends clients a second vector, made of rows without noise"
    spent = federation.defense.privacy(sent=sent if control is not None else None)
    own = {"rows": rows.told(federation.guards)} if rows is not None else {}
    for one in [spent, *own.values()]:
        if federation.before and one["epsilon"] is not None:
            because = f"the {federation.before} rounds of pretrain were made of the clients' rows without noise"
            one |= {"epsilon": None, "because": because}
    protected = {"protects": NOBODY_PROTECTED} if spent["epsilon"] is not None else {}
    return {**spent, **protected, **own}


def refuse_diverged(vector: Tensor, start: Tensor, r: int) -> None:
    """Raise where the model after round r is not finite, or its step is longer than float32 can square."""
    if bool((vector - start).norm().isfinite()):
        return
    what = "no client's training from the global model, of length {}, gives finite numbers"
    if not bool(vector.isnan().all()):
        what = "the global model would not be finite any more after a step from one of length {}"
    raise DivergedError(
        f"round {r}: {what.format(f'{float(start.norm()):.3g}')}. The model of round {r - 1} is kept. Lower "
        "algorithm.server_lr or clients.lr, or use a defense that bounds what a row weighs."
    )


def _buffers(
    federation: Federation, buffers: Tensor, ids: Sequence[str], taken: Sequence[str], decision: Decision
) -> tuple[Tensor, dict[str, str]]:
    """What the model holds beside its vector after the round, and whose buffers are refused: the server's own stand in.

    `taken` are the clients whose rows the defense saw.
    """
    assert federation.buffers is not None
    places = [ids.index(id) for id in taken]
    reasons = refused(buffers, federation.buffers, federation.task.buffers.layout, ids)
    bad = torch.tensor([id in reasons for id in ids])
    used = torch.where(bad[:, None], federation.buffers, buffers)[places]
    return combined(used, federation.task.buffers.layout.size, decision.weights), reasons


def _note_decision(record: dict[str, Any], decision: Decision, updates: UpdateMatrix) -> None:
    ids = updates.ids
    if decision.weights is not None:
        record["weights"] = dict(zip(ids, decision.weights.tolist(), strict=True))
    if decision.kept is not None:
        record["kept"] = [id for id, kept in zip(ids, decision.kept.tolist(), strict=True) if kept]
    if decision.scores is not None:
        record["scores"] = dict(zip(ids, decision.scores.tolist(), strict=True))
    record["notes"] = {key: float(value) for key, value in decision.notes.items()}
