"""The one round loop. Read it top to bottom: it is the whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedllm_sec.attacks.threat import Threat
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.defenses.repair import Trained as AfterTraining
from fedllm_sec.errors import AttackError, FedError
from fedllm_sec.evaluation.smoothed import Smoothing, smoothed
from fedllm_sec.matrix.shown import only_shown
from fedllm_sec.matrix.storage import ON_DEVICE, Storage
from fedllm_sec.models.function import Indicator
from fedllm_sec.models.shifted import Shifted
from fedllm_sec.protocols import Algorithm, Client, LocalResult, LocalRule, LocalTraining, Task, tensors_of
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.rounds.averaging import Averaging
from fedllm_sec.rounds.client import make_optimizer, private_of, train_locally
from fedllm_sec.rounds.clock import Clock
from fedllm_sec.rounds.cohort import sample
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.deciding import Decided, decide, private_so_far, refuse_diverged, undecided
from fedllm_sec.rounds.observing import NOBODY, Observer
from fedllm_sec.rounds.personal import hold, kept_by_clients, measured, with_own
from fedllm_sec.rounds.planting import Planting, plant
from fedllm_sec.rounds.remembering import OWN_BUFFERS, Trained, keep_own, own_training, remember
from fedllm_sec.rounds.repairing import mend
from fedllm_sec.rounds.source import Asked, Source, trained_here
from fedllm_sec.rounds.tuning import show, tune
from fedllm_sec.seeds import generator_for


class Evaluation(Protocol):
    """Measures on held-out data, of the model that `task` holds at the time; `transcribed` has answers in words too."""

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
    start: bool = False  # whether the model is still to be measured before the first round
    chunk_mb: float | None = None
    storage: Storage = ON_DEVICE  # where the rows of a round are kept
    root: Client | None = None  # clean data the server holds, for rules that need a root update
    planting: Planting | None = None  # what the server trains into the model before it sends it
    indicator: Indicator | None = None  # what it has planted in this round
    facts: Mapping[str, Any] = field(default_factory=dict)  # what was made of data and model, for summary.json
    repair: Callable[[AfterTraining], Tensor] | None = None  # what changes the last model, once
    smoothing: Smoothing | None = None  # how the last model is also tested
    observer: Observer = NOBODY  # who keeps what some clients send
    buffers: Tensor | None = None  # (b,) float64 what the global model holds beside its vector, where it has buffers
    averaging: Averaging | None = None  # how adapters are averaged; None: factor by factor, as all other parameters
    last_update: Tensor | None = None
    round: int = 0  # rounds done
    before: int = 0  # attack-free rounds done before these: draws of round r are those of round before + r
    source: Source = trained_here  # where the rows of a round come from
    spread: Callable[..., Tensor] | None = None  # how passes over held-out rows are made; None: by the machine
    progress: Callable[[Iterator[int], int], Iterator[int]] = lambda turns, n: turns  # places of a cohort of n
    triggered: Callable[[], Evaluation] | None = None  # the evaluation with the trigger as attackers have learnt it

    def state_dict(self) -> dict[str, Any]:
        """All that later rounds depend on; tensors, numbers and dicts of them."""
        parts = {"defense": self.defense, "server": self.algorithm.server, "threat": self.threat}
        own = {str(i): guard.state_dict() for i, guard in enumerate(self.guards) if hasattr(guard, "state_dict")}
        return {
            "round": self.round,
            "vector": self.vector,
            **({"buffers": self.buffers} if self.buffers is not None else {}),
            **({"base": shifted.state_dict()} if (shifted := self.shifted) is not None else {}),
            "last_update": self.last_update,
            "memory": {c.id: c.memory for c in self.trained() if c.memory},
            **({"guards": own} if own else {}),
            **{name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")},
        }

    @property
    def shifted(self) -> Shifted | None:
        """What has been added to base weights, where that is done."""
        return self.averaging.shifted if self.averaging is not None else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.shifted is not None:
            self.shifted.load_state_dict(state["base"])
        self.round, self.vector, self.last_update = state["round"], state["vector"], state["last_update"]
        self.start = False  # it was measured before there was a state
        if self.buffers is not None:
            self.buffers = state["buffers"].cpu().double()
        for client in self.trained():
            client.memory.update(state["memory"].get(client.id, {}))
        parts = {"defense": self.defense, "server": self.algorithm.server, "threat": self.threat}
        for name, part in parts.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(state[name])
        for i, guard in enumerate(self.guards):
            if hasattr(guard, "load_state_dict"):
                guard.load_state_dict(state["guards"][str(i)])
        show(self)

    def begin_after(self, state: Mapping[str, Any]) -> None:
        """Take up the model, the FL method and the clients' memory of a clean run; attack and defense begin afresh.

        Its last round is the one before the first: rounds count from there.
        """
        if self.shifted is not None:
            self.shifted.load_state_dict(state["base"])
        self.before, self.vector, self.last_update = state["round"], state["vector"], state["last_update"]
        if self.buffers is not None:
            self.buffers = state["buffers"].cpu().double()
        for client in self.clients:
            client.memory.update(state["memory"].get(client.id, {}))
        if hasattr(self.algorithm.server, "load_state_dict"):
            self.algorithm.server.load_state_dict(state["server"])

    def trained(self) -> list[Client]:
        """All that train: the clients, and the server on its clean data."""
        return [*self.clients, *([self.root] if self.root is not None else [])]


def run(federation: Federation, rounds: int) -> Iterator[RoundRecord]:
    """Round after round from where the federation stands; every rank yields the same records.

    Where the model is to be measured before it is trained, that is round 0 and comes first.
    """
    sizes = [federation.task.size(client.shard) for client in federation.clients]
    federation.training = federation.algorithm.prepare(federation.training, sizes)
    optimizer = make_optimizer(federation.task, federation.training)
    if federation.start:
        federation.start = False
        yield measure_start(federation)
    while federation.round < rounds:
        with federation.storage.in_use():
            record = play_round(federation, federation.round + 1, rounds, optimizer)
        yield record


def measure_start(federation: Federation) -> RoundRecord:
    """The record of round 0: the model before anybody trained it; no clients, no decision."""
    if federation.evaluation is None:
        raise FedError("start: nothing is measured of this federation. Give it an evaluation, or set start to False.")
    clock = Clock()
    quality, attack, answers = evaluate(federation)
    return RoundRecord(
        round=0, cohort=[], malicious=[], attacking=False, update_norm=0.0,
        quality=quality, attack=attack, seconds={"evaluate": clock.lap()}, answers=answers, **undecided(),
    )  # fmt: skip


def play_round(federation: Federation, r: int, rounds: int, optimizer: torch.optim.Optimizer) -> RoundRecord:
    """Clients train, attackers forge, the defense decides, the server steps, the model is measured."""
    task, machine, threat, algorithm = federation.task, federation.machine, federation.threat, federation.algorithm
    kept, seconds, clock = federation.vector, {}, Clock()
    if federation.planting is not None:
        plant(federation, r)
    start = federation.vector
    lr = federation.training.lr_at(r, rounds)
    control = machine.share(algorithm.control(start)) if algorithm.control is not None else None

    averaging = federation.averaging
    rng = generator_for(federation.seed, federation.before + r, "cohort")
    sure = threat.sure(r) if threat is not None else None
    if threat is not None:
        threat.see(federation.last_update)
    cohort: Sequence[Client] = sample(federation.clients, federation.per_round, rng, sure)
    tune(federation, cohort, r)

    def train(client: Client, guards: Sequence[LocalRule]) -> LocalResult:
        return train_client(federation, client, start, optimizer, guards, control, r, rounds)

    local = getattr(task, "kept", None) == "local"
    everywhere = algorithm.remember is not None or kept_by_clients(federation)
    width = len(federation.buffers) if federation.buffers is not None else 0
    asked = Asked(r, rounds, start, federation.last_update, control, train, everywhere, width)
    came = federation.source(federation, cohort, asked)
    cohort, collected = came.cohort, came.collected
    root = train(federation.root, ()) if federation.root is not None else None
    if averaging is not None and collected is not None:
        mine = [] if federation.root is None or root is None else [(federation.root, root.delta)]
        averaging.keep([*zip(cohort, collected[0], strict=True), *mine], start)
    seconds["train"] = clock.lap()

    private = private_of(federation.guards)
    for client in cohort if private is not None else ():
        if threat is None or client.id not in threat.attackers(r):
            private.trained(client.id, task.size(client.shard), federation.training)  # type: ignore[union-attr]

    # rank 0 decides; what is decided goes to every rank below
    trained: list[Trained] = []
    if algorithm.remember is not None:
        trained = own_training(cohort, collected, threat.attackers(r) if threat is not None else ())
        if federation.root is not None and root is not None:
            trained.append(Trained(federation.root, root.delta, root.steps))
    decided = Decided(start.clone(), torch.zeros(len(cohort), dtype=torch.float64), federation.buffers)
    if came.too_few is not None:
        decided.record |= {"skipped": came.too_few, "quarantined": dict(came.absent)}
    elif came.lost:
        decided.vector.fill_(torch.nan)  # which ends the run below, on every rank
    elif machine.main and collected is not None:
        decided = decide(federation, came, root, r, rounds, clock, seconds)
    if machine.main:
        decided.record["privacy"] = private_so_far(federation, private, control)
    if (skipped := decided.record["skipped"]) is not None:
        decided.vector = kept.clone()
    vector = machine.share(decided.vector)
    refuse_diverged(vector, start, r)
    federation.vector = vector
    if averaging is not None and averaging.shifted is not None:
        gains = decided.gains if decided.gains is not None else torch.zeros(averaging.width(len(cohort)))
        averaging.gain(machine.share(gains.to(machine.device)), len(cohort))
    if federation.buffers is not None:
        assert decided.buffers is not None
        federation.buffers = machine.share(decided.buffers.to(machine.device)).cpu()
        if local and collected is not None:
            own = collected[2]
            federation.buffers = keep_own(task.buffers.layout.size, federation.clients, cohort, own, federation.buffers)
    if trained:
        remember(algorithm, trained, machine.share(decided.parts.to(machine.device)), lr, control)
    step = federation.vector - start
    federation.last_update, federation.round = step, r
    mended = mend(federation, evaluate, clock, seconds) if federation.repair is not None and r == rounds else None

    there = {c.id for c in cohort} | set(came.absent)
    ids = [c.id for c in federation.clients if c.id in there]
    quality, attack, answers = None, None, list[Any]()
    if federation.evaluation is not None and (r % federation.evaluate_every == 0 or r == rounds):
        quality, attack, answers = evaluate(federation, last=r == rounds)
        seconds["evaluate"] = round(seconds.get("evaluate", 0.0) + clock.lap(), 4)
    return RoundRecord(
        round=r,
        cohort=ids,
        malicious=[id for id in ids if threat is not None and id in threat.who(r)],
        attacking=threat is not None and threat.active(r),
        update_norm=float(step.norm()) if skipped is None else 0.0,
        quality=quality, attack=attack, seconds=seconds, answers=answers, repair=mended, **decided.record,
    )  # fmt: skip


def train_client(
    federation: Federation,
    client: Client,
    start: Tensor,
    optimizer: torch.optim.Optimizer,
    guards: Sequence[LocalRule],
    control: Tensor | None,
    r: int,
    rounds: int,
) -> LocalResult:
    """One client's training of round r, in a simulation or on its own device; who attacks does it by his rules."""
    together = federation.averaging.local if federation.averaging is not None else ()
    attacks: Sequence[LocalRule] = ()
    if federation.threat is not None and client.id in federation.threat.attackers(r):
        attacks, guards = federation.threat.rules(client, r), ()  # nobody defends a federation against himself
    own = federation.averaging.start_of(client, start) if federation.averaging is not None else start
    with only_shown("attack.local", AttackError, **tensors_of(client.shard)):  # later runs have the shard too
        trained = train_locally(
            federation.task,
            client,
            own,
            optimizer=optimizer,
            stepper=federation.machine,
            training=federation.training,
            rules=(*federation.algorithm.local, *together, *guards, *attacks, *federation.observer.rules(client.id, r)),
            round=r,
            rounds=rounds,
            seed=federation.seed,
            last_update=federation.last_update,
            control=control,
            buffers=client.memory.get(OWN_BUFFERS, federation.buffers),
            before=federation.before,
        )
    # a row is a difference to what the server holds, wherever the client began
    return trained if own is start else replace(trained, delta=trained.delta + (own - start))


def evaluate(federation: Federation, last: bool = False) -> tuple[dict[str, Any], dict[str, Any] | None, list[Any]]:
    """Quality and attack success of the global vector, and what is kept of its answers: of a run's `last`, all.

    That one is also smoothed, if it is to be, and measured with what each client keeps as its own.
    """
    assert federation.evaluation is not None
    task, known, spread = federation.task, federation.evaluation, federation.spread or federation.machine.spread
    hold(federation)
    task.model.eval()
    with federation.machine.autocast():
        read = known.transcribed(task, spread, last) if hasattr(known, "transcribed") else None
        quality, attack, answers = read or (known.quality(task, spread), known.attack(task, spread), [])
        if last and federation.smoothing is not None:
            rng = generator_for(federation.seed, federation.before + federation.round, "smoothing")
            more = smoothed(known, task, measured(federation), spread, federation.smoothing, rng)
            quality |= more[0]
            attack = {**attack, **more[1]} if attack is not None else None
        if last and kept_by_clients(federation):
            own = with_own(federation)
            quality, attack = {**quality, **own[0]}, {**attack, **own[1]} if attack is not None else None
    return quality, attack, answers
