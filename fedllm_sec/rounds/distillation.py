"""FedGKT's round loop: clients send features and logits instead of deltas, the server answers with logits.

Each client keeps its own small net; nothing is averaged. So there are no rows for an update rule, and what an attacker
poisons are its labels, its features and through them the server's model (He et al. 2020, alg. 1).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.algorithms.gkt import EdgeNet, KnowledgeTransfer, transfer_loss
from fedllm_sec.attacks.threat import Threat, stand_in
from fedllm_sec.errors import AttackError
from fedllm_sec.kernels.usable import usable
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.shown import only_shown
from fedllm_sec.protocols import Client, Labelled, LocalTraining, ThreatView
from fedllm_sec.records.history import RoundRecord
from fedllm_sec.rounds.client import make_optimizer, train_locally
from fedllm_sec.rounds.cohort import sample
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Evaluation
from fedllm_sec.seeds import generator_for
from fedllm_sec.tasks.classify import chosen
from fedllm_sec.tasks.flat import flatten, refuse_running_statistics


@dataclass(frozen=True)
class Lesson:
    """Rows to learn from: inputs, labels and, where there are any, the other side's logits."""

    x: Tensor  # (n, ...)
    y: Tensor  # (n,) int64
    taught: Tensor | None  # (n, classes)


class Pupil:
    """A net that learns from labels and from logits: a `Task`, for `train_locally`, on both sides."""

    def __init__(self, model: torch.nn.Module, method: KnowledgeTransfer, device: torch.device) -> None:
        refuse_running_statistics(model)
        self.model, self.method, self.device = model.to(device), method, device
        named = list(self.model.named_parameters())
        self.layout = Layout.of(named)
        self.parameters = flatten([p for _, p in named])
        self.initial = self.parameters.detach().clone()  # (d,)

    def size(self, shard: Lesson) -> int:
        return len(shard.y)

    def batches(self, shard: Lesson, size: int, rng: torch.Generator) -> Iterator[Tensor]:
        yield from torch.randperm(len(shard.y), generator=rng).to(self.device).split(size)

    def weight(self, shard: Lesson, rows: Sequence[int] | Tensor) -> float:
        return float(len(rows))

    def loss(self, shard: Lesson, rows: Sequence[int] | Tensor) -> Tensor:
        at = torch.as_tensor(rows, device=self.device)
        taught = shard.taught[at] if shard.taught is not None else None
        logits = self.model(shard.x[at]).float()
        return transfer_loss(logits, shard.y[at], taught, self.method.temperature, self.method.alpha)

    @torch.no_grad()
    def load(self, vector: Tensor) -> None:
        self.parameters.copy_(vector)


@dataclass(frozen=True)
class Message:
    """What a client sends; nothing of it is trusted."""

    features: Tensor  # (n_k, ...)
    y: Tensor  # (n_k,)
    logits: Tensor  # (n_k, classes)
    loss: float


@dataclass
class Distillation:
    """The parts of a FedGKT run; it has what `train` needs of a Federation."""

    method: KnowledgeTransfer
    edge: Pupil  # one client net in memory: clients are flat vectors in their memory
    task: Pupil  # the server's net, from features to classes
    clients: Sequence[Client]
    training: LocalTraining
    machine: Machine
    threat: Threat | None
    evaluation: Evaluation | None
    vector: Tensor  # (d,) the server's parameters
    classes: int
    normalise: Callable[[Tensor], Tensor] = lambda x: x
    seed: int = 0
    per_round: int | None = None
    evaluate_every: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)  # what was made of data and model, for summary.json
    round: int = 0
    progress: Callable[[Iterator[int], int], Iterator[int]] = lambda turns, n: turns  # places of a cohort of n

    def state_dict(self) -> dict[str, Any]:
        """All that later rounds depend on: the server's net, and each client's net and the logits it was sent."""
        threat = {} if self.threat is None else {"threat": self.threat.state_dict()}
        memory = {c.id: c.memory for c in self.clients if c.memory}
        return {"round": self.round, "vector": self.vector, "memory": memory, **threat}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.round, self.vector = state["round"], state["vector"]
        for client in self.clients:
            client.memory.update(state["memory"].get(client.id, {}))
        if self.threat is not None:
            self.threat.load_state_dict(state["threat"])


def distil(run: Distillation, rounds: int) -> Iterator[RoundRecord]:
    """Round after round from where the run stands."""
    while run.round < rounds:
        yield play_round(run, run.round + 1, rounds)


def play_round(run: Distillation, r: int, rounds: int) -> RoundRecord:
    """Clients train and send, attackers poison, the server trains on all that arrived and answers each client."""
    clock = [time.perf_counter()]
    threat, start = run.threat, run.vector
    sure = threat.sure(r) if threat is not None else None
    cohort = sample(run.clients, run.per_round, generator_for(run.seed, r, "cohort"), sure)
    turns = run.progress(iter(range(len(cohort))), len(cohort))
    messages = {cohort[place].id: client_round(run, cohort[place], r, rounds) for place in turns}
    clock.append(time.perf_counter())

    messages = {id: poisoned(run, id, message, r) for id, message in messages.items()}
    quarantined = {id: reason for id, m in messages.items() if (reason := flaw(m, run.classes)) is not None}
    usable = {id: m for id, m in messages.items() if id not in quarantined}
    skipped: str | None = "fedgkt: no client sent features that can be used."
    if usable:
        skipped = server_round(run, usable, [c for c in cohort if c.id in usable], r, rounds)
    run.round = r
    clock.append(time.perf_counter())

    quality, attack, notes = None, None, {}
    if run.evaluation is not None and (r % run.evaluate_every == 0 or r == rounds):
        quality, attack, notes = evaluate(run)
    clock.append(time.perf_counter())
    spent = [round(b - a, 4) for a, b in itertools.pairwise(clock)]
    return RoundRecord(
        round=r,
        cohort=[c.id for c in cohort],
        malicious=[c.id for c in cohort if threat is not None and c.id in threat.who(r)],
        attacking=threat is not None and threat.active(r),
        losses={id: m.loss for id, m in messages.items()},
        norms={id: float(m.features.norm()) for id, m in messages.items()},
        quarantined=quarantined,
        weights=None,
        kept=None,
        scores=None,
        notes=notes,
        update_norm=float((run.vector - start).norm()),
        skipped=skipped,
        lora_gap=None,
        detection=None,
        quality=quality,
        attack=attack,
        seconds=dict(zip(("train", "defense", "evaluate"), spent, strict=True)),
    )


def client_round(run: Distillation, client: Client, r: int, rounds: int) -> Message:
    """A client trains its own net on labels and on the logits it was sent, and sends features and logits.

    A net that is not finite after training is not kept: the client goes on from the one it had.
    """
    dressed = run.threat.dress(client, r) if run.threat else client
    shard: Labelled = dressed.shard
    taught = client.memory.get("taught")
    if taught is not None and len(taught) != len(shard.y):
        taught = None  # an attacker that has just changed its rows: the logits are for others
    lesson = Lesson(run.normalise(shard.x), shard.y, taught)
    vector, loss = learn(
        run, run.edge, Client(client.id, lesson), client.memory.get("net", run.edge.initial), run.training, r, rounds
    )
    if bool(vector.isfinite().all()):
        client.memory["net"] = vector
    run.edge.load(vector)
    run.edge.model.eval()
    with torch.no_grad(), run.machine.autocast():
        features = run.edge.model.features(lesson.x).float()  # type: ignore[operator]
        logits = run.edge.model(lesson.x).float()
    return Message(features, shard.y, logits, loss)


def server_round(
    run: Distillation, messages: Mapping[str, Message], cohort: Sequence[Client], r: int, rounds: int
) -> str | None:
    """The server trains on everything that arrived; each client gets its rows' new logits.

    Features may be finite and still ruin the net. One that is not finite, or gives logits that are not, is not taken:
    the server and its clients keep what they had, and why is returned.
    """
    lesson = Lesson(
        torch.cat([m.features for m in messages.values()]),
        torch.cat([m.y for m in messages.values()]),
        torch.cat([m.logits for m in messages.values()]),
    )
    training = run.method.at_the_server(run.training)
    vector, _ = learn(run, run.task, Client("server", lesson), run.vector, training, r, rounds)
    if not bool(vector.isfinite().all()):
        return "fedgkt: the server's net is not finite after training on what arrived. The old one is kept."
    run.task.load(vector)
    run.task.model.eval()
    with torch.no_grad(), run.machine.autocast():
        answers = {client.id: run.task.model(messages[client.id].features).float() for client in cohort}
    if bad := [id for id, logits in answers.items() if not bool(logits.isfinite().all())]:
        return f"fedgkt: the server's net now gives {', '.join(bad[:5])} logits that are not finite. The old is kept."
    run.vector = vector
    for client in cohort:
        client.memory["taught"] = answers[client.id]
    return None


def learn(
    run: Distillation, pupil: Pupil, client: Client, start: Tensor, training: LocalTraining, r: int, rounds: int
) -> tuple[Tensor, float]:
    """The net after training and the mean loss, by the one training loop."""
    result = train_locally(
        pupil, client, start, optimizer=make_optimizer(pupil, training), stepper=run.machine, training=training,
        round=r, rounds=rounds, seed=run.seed,
    )  # fmt: skip
    return start + result.delta, result.loss


def poisoned(run: Distillation, id: str, message: Message, r: int) -> Message:
    """The message with its features forged, row by row, where an active attacker has update attacks."""
    threat = run.threat
    if threat is None or id not in threat.attackers(r) or not threat.update:
        return message
    rows = message.features.flatten(1).clone()  # (n_k, features)
    rows = stand_in(rows, usable(UpdateMatrix.of(rows)))
    for number, attack in enumerate(threat.update):
        view = ThreatView(
            own=rows, others=None, global_vector=torch.zeros_like(rows[0]), last_update=None, defense=None,
            layout=Layout.single(rows.shape[1]), own_counts=(1.0,) * len(rows), cohort_size=len(rows), round=r,
            rng=generator_for(run.seed, r, "attack", number, id),
        )  # fmt: skip
        with only_shown(f"attack.update.{number}", AttackError, own_rows=rows):
            forged = attack(view)
        if forged.shape != rows.shape:
            raise AttackError(
                f"attack.update.{number}: gave features of shape {tuple(forged.shape)}, must be {tuple(rows.shape)}."
            )
        rows = forged.to(rows)
    return replace(message, features=rows.view_as(message.features))


def flaw(message: Message, classes: int) -> str | None:
    """Why a message cannot be used."""
    for what, value in (("features", message.features), ("logits", message.logits)):
        bad = int((~value.isfinite()).sum())
        if bad:
            return f"{bad} of {value.numel()} values of its {what} are not finite"
    if bool(((message.y < 0) | (message.y >= classes)).any()):
        return f"labels outside 0 to {classes - 1}"
    return None


class Judge:
    """The nets as one classifier for held-out rows: row i goes through the net of honest client i mod h.

    `own` asks the clients' own classifiers instead of the server's. Clients that have not trained yet are left out.
    """

    def __init__(self, run: Distillation, *, own: bool) -> None:
        bad = run.threat.who(run.round) if run.threat is not None else frozenset()
        self.run, self.own = run, own
        self.nets = [c.memory["net"] for c in run.clients if c.id not in bad and "net" in c.memory]
        run.task.load(run.vector)
        run.task.model.eval()
        run.edge.model.eval()

    @torch.no_grad()
    def score(self, shard: Labelled, rows: Sequence[int] | Tensor) -> Tensor:
        """Log-loss of the true class and the class chosen, -1 for none, for each row: (b, 2) float64."""
        at = torch.as_tensor(rows, device=shard.y.device)
        logits = torch.empty(len(at), self.run.classes, device=shard.y.device)
        for k, net in enumerate(self.nets):
            here = at % len(self.nets) == k
            if not bool(here.any()):
                continue
            self.run.edge.load(net)
            x, edge = self.run.normalise(shard.x[at[here]]), self.run.edge.model
            said = edge(x) if self.own else self.run.task.model(edge.features(x))  # type: ignore[operator]
            logits[here] = said.float()
        losses = torch.nn.functional.cross_entropy(logits, shard.y[at], reduction="none")
        return torch.stack([losses.double(), chosen(logits).double()], dim=1).cpu()


def evaluate(run: Distillation) -> tuple[dict[str, Any] | None, dict[str, Any] | None, dict[str, float]]:
    """Quality and attack success of client nets with the server's, and the accuracy of the clients' own."""
    assert run.evaluation is not None
    together, alone = Judge(run, own=False), Judge(run, own=True)
    if not together.nets:
        return None, None, {}  # only attackers have trained so far
    with run.machine.autocast():
        quality = run.evaluation.quality(together, run.machine.spread)
        attack = run.evaluation.attack(together, run.machine.spread)
        single = run.evaluation.quality(alone, run.machine.spread)["accuracy"]
    return quality, attack, {"clients_accuracy": float(single["value"])}


def edge_pupil(method: KnowledgeTransfer, shape: tuple[int, ...], classes: int, device: torch.device) -> Pupil:
    """The clients' net for images of `shape`; it draws its weights from torch's global generator."""
    return Pupil(EdgeNet(shape, classes, channels=method.channels), method, device)
