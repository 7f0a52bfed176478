"""What attackers who know the defense try out is what the server decides: ids, counts, order, stages and step."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.algorithms import fedavg, fednova, fedopt
from fedllm_sec.attacks import MENU as ATTACKS
from fedllm_sec.attacks import received
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.defenses import MENU
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.defenses.subject import EXAMPLES, LAYOUT, PLANTED, StandIn
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Algorithm, Client, Decision, LocalTraining, ThreatView
from fedllm_sec.recipe.resolve import resolve, settings_of
from fedllm_sec.rounds import deciding, server
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run
from fedllm_sec.seeds import generator_for
from tests.toy import Quadratic

BAD = ("c01", "c04", "c07")
SETTINGS = {
    "slsgd": {"f": 1}, "robust_learning_rate": {"theta": 4}, "crfl": {"rho": 0.5}, "trimmed_mean": {"f": 1},
    "backdoor_indicator": {"source": "noise"},
}  # fmt: skip
ONE_STEP = LocalTraining(batch_size=100, steps=1, optimizer="sgd", lr=0.5, max_grad_norm=None)


@dataclass
class Seen:
    """What was rehearsed for the rows that were sent, and what came of them."""

    rehearsed: list[Decision] = field(default_factory=list)
    expected: list[torch.Tensor] = field(default_factory=list)  # how the model would move
    decided: list[Decision] = field(default_factory=list)
    steps: list[torch.Tensor] = field(default_factory=list)
    honest: list[torch.Tensor] = field(default_factory=list)  # means


@pytest.fixture
def seen(monkeypatch) -> Seen:
    """Both sides of each round; a rehearsal draws what the rule draws, so that only its knowledge can differ."""
    both, step = Seen(), server.ServerRound.step

    def watched(self: Any, decision: Decision, rows: Any, rule: Any, defense: Any, purpose: str) -> Any:
        vector, took = step(self, decision, rows, rule, defense, purpose)
        if purpose == "defense":
            both.decided.append(decision)
            both.steps.append(vector - self.start)
        return vector, took

    monkeypatch.setattr(server.ServerRound, "step", watched)
    known = {"root_rows": EXAMPLES, "classifier": StandIn(), "indicator": PLANTED}
    monkeypatch.setattr(deciding, "at_hand", lambda made: known)
    monkeypatch.setattr(server, "generator_for", lambda seed, round, purpose: generator_for(seed, round, "defense"))
    return both


def trying(seen: Seen, attack: Any):
    """The attack, whose rows are tried once more before they are sent."""

    def act(view: ThreatView) -> torch.Tensor:
        rows = attack(view)
        decision = view.defense(received(view, rows))
        seen.rehearsed.append(decision)
        seen.expected.append(decision.step(decision.update))
        seen.honest.append(view.others.mean(0))
        return rows

    return act


def louder(view: ThreatView) -> torch.Tensor:
    """Longer in each round, and other rows for each attacker."""
    return view.own * torch.tensor([-1.0, 0.5, 2.0])[: len(view.own), None] * view.round


def federation(
    defense: Pipeline, attack: Any, algorithm: Algorithm | None = None, training: LocalTraining = ONE_STEP
) -> Federation:
    """12 clients of 10 to 43 rows, 9 in a round; attackers stand among the others."""
    task = Quadratic(LAYOUT.size)
    task.layout = LAYOUT
    goal = torch.randn(LAYOUT.size, generator=generator_for(0, "goal"))
    shards = [goal + torch.randn(10 + 3 * i, LAYOUT.size, generator=generator_for(0, "rows", i)) for i in range(12)]
    return Federation(
        task=task,
        clients=[Client(f"c{i:02d}", shard) for i, shard in enumerate(shards)],
        training=training,
        machine=Machine(Accelerator(cpu=True)),
        algorithm=algorithm or fedavg(),
        defense=defense,
        threat=Threat(malicious=frozenset(BAD), seed=0, knowledge="cohort+defense", update=[attack]),
        evaluation=None,
        vector=torch.zeros(LAYOUT.size),
        per_round=9,
        root=Client("server", shards[0]),
    )


def made(name: str) -> Pipeline:
    settings = dict(SETTINGS.get(name, {}))
    known = settings_of(MENU[name].make).get("f")
    if known is not None and known.default is inspect.Parameter.empty:
        settings["f"] = 1
    part, kind = resolve(name, settings, MENU, "defense"), MENU[name].kind
    mean = resolve("mean", {}, MENU, "defense.rule")
    return {
        "before": Pipeline([part], mean), "rule": Pipeline([], part), "after": Pipeline([], mean, [part])
    }[kind]  # fmt: skip


def same(one: Decision, other: Decision) -> None:
    for name in ("update", "weights", "kept", "scores"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
    assert dict(one.notes) == dict(other.notes)


@pytest.mark.parametrize("name", MENU)
def test_the_rehearsed_decision_is_the_decision_in_every_round(name, seen):
    list(run(federation(made(name), trying(seen, louder)), 5))
    assert len(seen.decided) == len(seen.rehearsed) == 5
    for rehearsed, decided in zip(seen.rehearsed, seen.decided, strict=True):
        same(rehearsed, decided)
    assert torch.equal(torch.stack(seen.expected), torch.stack(seen.steps))


@pytest.mark.parametrize(
    ("algorithm", "training"),
    [
        (fedavg(server_lr=0.5, server_momentum=0.9), ONE_STEP),
        (fedopt(), ONE_STEP),
        (fednova(), LocalTraining(batch_size=10, epochs=1, optimizer="sgd", lr=0.3, max_grad_norm=None)),
    ],
    ids=["momentum", "adam", "fednova"],
)
def test_the_rehearsed_step_is_the_servers_with_its_memory_and_the_factors_of_the_rows(algorithm, training, seen):
    defense = Pipeline([made("norm_clipping").before[0]], made("mean").rule, made("crfl").after)
    list(run(federation(defense, trying(seen, louder), algorithm, training), 4))
    assert len(seen.decided) == 4
    for rehearsed, decided in zip(seen.rehearsed, seen.decided, strict=True):
        same(rehearsed, decided)
    assert torch.equal(torch.stack(seen.expected), torch.stack(seen.steps))


def test_a_client_that_is_set_aside_is_not_in_the_rehearsal_either(seen):
    fed = replace(federation(made("fldetector"), trying(seen, louder)), per_round=None)
    fed.clients[2].shard[0, 0] = float("nan")
    records = list(run(fed, 5))
    assert all(list(record.quarantined) == ["c02"] for record in records)
    for rehearsed, decided in zip(seen.rehearsed, seen.decided, strict=True):
        torch.testing.assert_close(rehearsed.update, decided.update, rtol=1e-6, atol=1e-7)
        assert torch.equal(rehearsed.kept, decided.kept)


@pytest.mark.parametrize(("name", "round"), [("fldetector", 4), ("fldetector", 5), ("mean", 1), ("cross_round", 2)])
def test_the_damage_a_search_believes_in_is_the_damage_done(name, round, seen):
    tailored = ATTACKS["tailored"].make
    list(run(federation(made(name), trying(seen, tailored)), round))
    at = round - 1
    believed = float((seen.rehearsed[at].update - seen.honest[at]).norm())
    real = float((seen.steps[at] - seen.honest[at]).norm())
    assert believed == pytest.approx(real, rel=1e-5)
    assert real > 0.1


def test_a_try_with_rows_of_nobody_says_how_to_make_them():
    def careless(view: ThreatView) -> torch.Tensor:
        view.defense(UpdateMatrix.of(torch.cat([view.others, view.own])))
        return view.own

    with pytest.raises(AttackError, match=r"rows of 0, 1, 2, 3, 4, who are not in this round.*received"):
        list(run(federation(made("mean"), careless), 1))
