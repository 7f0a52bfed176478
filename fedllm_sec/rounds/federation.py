"""The one round loop. Read it top to bottom: it is the whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedllm_sec import kernels
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.errors import AttackError, DefenseError, DivergedError
from fedllm_sec.evaluation.detection import detection
from fedllm_sec.evaluation.robustness import measure_rows
from fedllm_sec.evaluation.smoothed import Smoothing, smoothed
from fedllm_sec.kernels.claims import midpoint
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.matrix.memory import watch
from fedllm_sec.matrix.shown import only_shown
from fedllm_sec.models.lora import MOST_FLOPS, gap_flops, product_gap
from fedllm_sec.protocols import (
    Algorithm,
    Client,
    Decision,
    LocalResult,
    LocalRule,
    LocalTraining,
    Task,
    tensors_of,
)
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.rounds.client import make_optimizer, train_locally
from fedllm_sec.rounds.clock import Clock
from fedllm_sec.rounds.cohort import sample
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.remembering import Trained, own_training, remember
from fedllm_sec.rounds.server import ServerRound, nobody_kept
from fedllm_sec.seeds import generator_for


class Evaluation(Protocol):
    """Measures on held-out data, of the model that `task` holds at the time."""

    def quality(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any]: ...
    def attack(self, task: Any, spread: Callable[..., Tensor]) -> dict[str, Any] | None: ...


@dataclass
class Federation:
    """The assembled parts of a run; `build` makes one from a recipe, a notebook can make one by hand."""

    task: Task
    clients: Sequence[Client]
    training: LocalTraining
    machine: Machine
    algorithm: Algorithm
    defense: Pipeline
    threat: Threat | None
    evaluation: Evaluation | None
    vector: Tensor  # (d,) the global vector
    guards: Sequence[LocalRule] = ()  # what clients that do not attack run in their own training
    seed: int = 0
    per_round: int | None = None
    evaluate_every: int = 1
    chunk_mb: float | None = None
    root: Client | None = None  # clean data the server holds, for rules that need a root update
    facts: Mapping[str, Any] = field(default_factory=dict)  # what was made of data and model, for summary.json
    smoothing: Smoothing | None = None  # how the last model is also tested
    last_update: Tensor | None = None
    round: int = 0  # rounds done
    progress: Callable[[Sequence[Client]], Iterator[Client]] = field(default=iter)  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """All that later rounds depend on; tensors, numbers and dicts of them."""
        parts = {"defense": self.defense, "server": self.algorithm.server, "threat": self.threat}
        return {
            "round": self.round,
            "vector": self.vector,
            "last_update": self.last_update,
            "memory": {c.id: c.memory for c in self.trained() if c.memory},
            **{name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.round, self.vector, self.last_update = state["round"], state["vector"], state["last_update"]
        for client in self.trained():
            client.memory.update(state["memory"].get(client.id, {}))
        parts = {"defense": self.defense, "server": self.algorithm.server, "threat": self.threat}
        for name, part in parts.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(state[name])

    def trained(self) -> list[Client]:
        """All that train: the clients, and the server on its clean data."""
        return [*self.clients, *([self.root] if self.root is not None else [])]


def run(federation: Federation, rounds: int) -> Iterator[RoundRecord]:
    """Round after round from where the federation stands; every rank yields the same records."""
    sizes = [federation.task.size(client.shard) for client in federation.clients]
    federation.training = federation.algorithm.prepare(federation.training, sizes)
    optimizer = make_optimizer(federation.task, federation.training)
    while federation.round < rounds:
        yield play_round(federation, federation.round + 1, rounds, optimizer)


def play_round(federation: Federation, r: int, rounds: int, optimizer: torch.optim.Optimizer) -> RoundRecord:
    """Clients train, attackers forge, the defense decides, the server steps, the model is measured."""
    task, machine, threat, algorithm = federation.task, federation.machine, federation.threat, federation.algorithm
    start, seconds, clock = federation.vector, {}, Clock()
    lr = federation.training.lr_at(r, rounds)
    control = machine.share(algorithm.control(start)) if algorithm.control is not None else None

    cohort = sample(federation.clients, federation.per_round, generator_for(federation.seed, r, "cohort"))
    mine = machine.mine([threat.dress(c, r) if threat else c for c in cohort])

    def train(client: Client, guards: Sequence[LocalRule]) -> LocalResult:
        attacks: Sequence[LocalRule] = ()
        if threat is not None and client.id in threat.attackers(r):
            attacks, guards = threat.rules(client, r), ()  # nobody defends a federation against himself
        with only_shown("attack.local", AttackError, **tensors_of(client.shard)):  # later runs have the shard too
            return train_locally(
                task,
                client,
                start,
                optimizer=optimizer,
                stepper=machine,
                training=federation.training,
                rules=(*algorithm.local, *guards, *attacks),
                round=r,
                rounds=rounds,
                seed=federation.seed,
                last_update=federation.last_update,
                control=control,
            )

    results = (train(client, federation.guards) for client in federation.progress(mine))
    collected = machine.collect(results, len(cohort), task.layout.size, algorithm.remember is not None)
    root = train(federation.root, ()) if federation.root is not None else None
    seconds["train"] = clock.lap()

    # rank 0 decides; what is decided goes to every rank below
    trained: list[Trained] = []
    if algorithm.remember is not None:
        trained = own_training(cohort, collected, threat.attackers(r) if threat is not None else ())
        if federation.root is not None and root is not None:
            trained.append(Trained(federation.root, root.delta, root.steps))
    decided = _Decided(start.clone(), torch.zeros(len(cohort), dtype=torch.float64))
    if machine.main and collected is not None:
        decided = _decide(federation, cohort, *collected, root, r, rounds, clock, seconds)
        sent = "the FL method sends clients a second vector, made of rows without noise"
        decided.record["privacy"] = federation.defense.privacy(sent=sent if control is not None else None)
    vector = machine.share(decided.vector)
    if not bool(vector.isfinite().all()):
        raise DivergedError(
            f"round {r}: the global model would not be finite any more after a step from one of length "
            f"{float(start.norm()):.3g}. The model of round {r - 1} is kept. Lower algorithm.server_lr or clients.lr, "
            "or use a defense that bounds what a row weighs."
        )
    federation.vector = vector
    if trained:
        remember(algorithm, trained, machine.share(decided.parts.to(machine.device)), lr, control)
    step = federation.vector - start
    federation.last_update, federation.round = step, r

    quality = attack = None
    if federation.evaluation is not None and (r % federation.evaluate_every == 0 or r == rounds):
        quality, attack = evaluate(federation, smooth=r == rounds)
        seconds["evaluate"] = round(seconds.get("evaluate", 0.0) + clock.lap(), 4)
    return RoundRecord(
        round=r,
        cohort=[c.id for c in cohort],
        malicious=[c.id for c in cohort if threat is not None and c.id in threat.who(r)],
        attacking=threat is not None and threat.active(r),
        update_norm=float(step.norm()),
        quality=quality,
        attack=attack,
        seconds=seconds,
        **decided.record,
    )


def evaluate(federation: Federation, smooth: bool = False) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Quality and attack success of the global vector, and of its smoothed test if there is one and `smooth`."""
    assert federation.evaluation is not None
    task, machine, known = federation.task, federation.machine, federation.evaluation
    with torch.no_grad():
        task.parameters.copy_(federation.vector)
    task.model.eval()
    with machine.autocast():
        quality, attack = known.quality(task, machine.spread), known.attack(task, machine.spread)
        if smooth and federation.smoothing is not None:
            rng = generator_for(federation.seed, federation.round, "smoothing")
            more = smoothed(known, task, federation.vector, machine.spread, federation.smoothing, rng)
            quality |= more[0]
            attack = {**attack, **more[1]} if attack is not None else None
    return quality, attack


@dataclass
class _Decided:
    """The new global vector, what was taken of the rows, and rank 0's part of the record."""

    vector: Tensor
    parts: Tensor  # (n,) float64: how much of its row each client of the cohort remembers; 0 in a skipped round
    record: dict[str, Any] = field(
        default_factory=lambda: {
            "losses": {}, "norms": {}, "quarantined": {}, "weights": None, "kept": None, "scores": None, "notes": {},
            "skipped": None, "lora_gap": None, "detection": None, "robustness": None, "stealth": None, "memory_mb": {},
        }
    )  # fmt: skip


def _decide(
    federation: Federation,
    cohort: Sequence[Client],
    rows: Tensor,
    claims: Tensor,
    root: LocalResult | None,
    r: int,
    rounds: int,
    clock: Clock,
    seconds: dict[str, float],
) -> _Decided:
    """Attack, screening, defense and server step, on rank 0."""
    threat, algorithm, start = federation.threat, federation.algorithm, federation.vector
    ids = tuple(c.id for c in cohort)
    updates = UpdateMatrix.of(
        rows, ids=ids, counts=claims[:, 0].tolist(), layout=federation.task.layout, chunk_mb=federation.chunk_mb
    )

    # what each row is multiplied by before the defense; the server's own update takes part as one more row
    steps = torch.cat([claims[:, 1], torch.tensor([float(root.steps)] if root is not None else []).double()])
    factors = algorithm.factors(steps) if algorithm.factors is not None else torch.ones_like(steps)
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
    )

    if threat is not None:
        known = {"vector": start, "last_update": federation.last_update, "server_lr": algorithm.server_lr}
        forged = threat.forge(updates, round=r, defense=server.rehearse, **known)
        if forged is not None:
            rows.index_copy_(0, torch.tensor(forged[0], device=rows.device), forged[1])  # the matrix is the loop's own
    seconds["attack"] = clock.lap()

    decided = _Decided(start.clone(), torch.zeros(len(ids), dtype=torch.float64))
    record = decided.record
    record["losses"] = dict(zip(ids, claims[:, 2].tolist(), strict=True))
    record["norms"] = dict(zip(ids, kernels.row_norms(updates).tolist(), strict=True))
    memory, rule = watch(rows.device), algorithm.server
    held = rule.state_dict() if hasattr(rule, "state_dict") else {}
    try:
        clean, record["quarantined"] = server.receive(updates)
        decision = federation.defense.decide(clean, server.context())
        if nobody_kept(decision):
            record["skipped"] = "the rule kept nobody"
        else:
            decided.vector, took = server.step(decision, clean, rule, federation.defense, "defense")
            decided.parts[[ids.index(id) for id in clean.ids]] = took.parts
    except DefenseError as error:
        if not record["quarantined"] and torch.isfinite(rows).all():
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
    if gap_flops(clean.layout, clean.n) <= MOST_FLOPS:
        record["lora_gap"] = product_gap(clean, weights, start)
    else:
        record["notes"]["lora_gap_left_out"] = 1.0
    if threat is not None and (threat.active(r) or not threat.malicious):  # attackers who pause are honest
        bad = threat.who(r)
        record["detection"] = detection(record["kept"], record["scores"], clean.ids, bad, record["weights"])
        record |= measure_rows(clean, decision.update, bad)
    seconds["evaluate"] = clock.lap()
    return decided


def _note_decision(record: dict[str, Any], decision: Decision, updates: UpdateMatrix) -> None:
    ids = updates.ids
    if decision.weights is not None:
        record["weights"] = dict(zip(ids, decision.weights.tolist(), strict=True))
    if decision.kept is not None:
        record["kept"] = [id for id, kept in zip(ids, decision.kept.tolist(), strict=True) if kept]
    if decision.scores is not None:
        record["scores"] = dict(zip(ids, decision.scores.tolist(), strict=True))
    record["notes"] = {key: float(value) for key, value in decision.notes.items()}
