"""Whatever is handed to an attack, a defense or a local rule is a copy, or writing into it is an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fedllm_sec
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.parts import poison
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.errors import AttackError, DefenseError
from fedllm_sec.matrix import UpdateMatrix
from fedllm_sec.protocols import Client, Decision, Labelled, LocalContext, RoundContext, ThreatView
from fedllm_sec.rounds.federation import Federation, run
from fedllm_sec.testing import check_attack, check_defense
from tests.rounds.test_federation import federation

TARGETS = [[1.0, 0.0], [3.0, 1.0], [5.0, 3.0], [4.0, 2.0], [2.0, 2.0]]
WRITES = {
    "add_": lambda tensor: tensor.add_(100.0),
    "data": lambda tensor: tensor.data.add_(100.0),
    "numpy": lambda tensor: tensor.numpy().__iadd__(100.0),
}


def model_after(fed: Federation, rounds: int = 3) -> torch.Tensor:
    list(run(fed, rounds))
    return fed.vector


def threat(update: Any = (), **settings: Any) -> Threat:
    return Threat(malicious=frozenset({"c0"}), seed=0, update=update, **settings)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("what", ["global_vector", "last_update"])
def test_an_attacker_that_writes_into_the_model_it_sees_moves_nothing(what, write):
    def spoil(view: ThreatView) -> torch.Tensor:
        seen = getattr(view, what)
        if seen is not None:
            write(seen)
        return view.own.clone()

    clean = model_after(federation(TARGETS, "median"))
    assert torch.equal(model_after(federation(TARGETS, "median", threat((spoil,)))), clean)


@pytest.mark.parametrize("what", ["own", "others"])
def test_an_attack_that_writes_into_rows_is_named(what):
    def spoil(view: ThreatView) -> torch.Tensor:
        getattr(view, what).mul_(2.0)
        return -view.own

    told = r"attack\.update\.0: wrote into the (own|honest) rows it was shown"
    with pytest.raises(AttackError, match=told):
        model_after(federation(TARGETS, threat=threat((spoil,), knowledge="cohort")))
    with pytest.raises(AttackError, match="wrote into"):
        fedllm_sec.forge(torch.ones(3, 2), spoil, m=2, own=torch.ones(2, 2))


def test_an_attack_that_writes_into_what_a_rehearsal_gave_moves_nothing():
    def spoil(view: ThreatView) -> torch.Tensor:
        decision = view.defense(fedllm_sec.attacks.received(view, view.own))
        decision.step(decision.update).add_(100.0)
        decision.update.add_(100.0)
        return view.own.clone()

    fed = federation(TARGETS, "centered_clipping", threat((spoil,), knowledge="cohort+defense"))
    assert torch.equal(model_after(fed), model_after(federation(TARGETS, "centered_clipping")))


class Scribble:
    """A local rule that writes into what the server sent."""

    def __init__(self, write: Any) -> None:
        self.write = write

    def before_step(self, parameters: Any, step: int, ctx: LocalContext) -> None:
        self.write(ctx.start)
        if ctx.last_update is not None:
            self.write(ctx.last_update)

    def after_step(self, parameters: Any, step: int, ctx: LocalContext) -> None:
        return None


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_local_rule_that_writes_into_what_a_client_received_moves_nothing(write):
    clean = model_after(federation(TARGETS))
    assert torch.equal(model_after(federation(TARGETS, threat=threat(local=(Scribble(write),)))), clean)
    assert torch.equal(model_after(replace(federation(TARGETS), guards=(Scribble(write),))), clean)


def writing(what: str, write: Any) -> Any:
    def scribbling(updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        seen = updates.rows if what == "rows" else getattr(ctx, what)
        if seen is not None:
            write(seen)
        return Decision(torch.zeros(updates.d))

    return scribbling


@pytest.mark.parametrize("what", ["rows", "global_vector", "last_update", "root_update"])
def test_a_rule_that_writes_into_what_it_sees_is_named(what):
    fed = replace(federation(TARGETS), root=Client("server", torch.tensor([[1.0, 1.0]])))
    fed.defense = Pipeline([], writing(what, WRITES["add_"]))
    with pytest.raises(DefenseError, match=f"scribbling: wrote into the {what.replace('_', ' ')} it was shown"):
        model_after(fed)


@pytest.mark.parametrize("what", ["global_vector", "last_update", "root_update"])
def test_a_rule_that_writes_past_the_count_of_writes_writes_into_copies(what):
    fed = replace(federation(TARGETS), root=Client("server", torch.tensor([[1.0, 1.0]])))
    fed.defense = Pipeline([], writing(what, WRITES["numpy"]))
    assert model_after(fed).tolist() == [0.0, 0.0]
    assert fed.last_update.tolist() == [0.0, 0.0]


def test_a_stage_before_or_after_the_rule_is_named_too():
    def before(updates: UpdateMatrix, ctx: RoundContext) -> UpdateMatrix:
        for _, block in updates.blocks():
            block.clamp_(-1, 1)
        return updates

    def after(vector: torch.Tensor, ctx: RoundContext) -> torch.Tensor:
        return vector.mul_(0.5)

    mean = federation(TARGETS).defense.rule
    for stages, name in ((([before], mean, []), "before"), (([], mean, [after]), "after")):
        fed = federation(TARGETS)
        fed.defense = Pipeline(*stages)
        with pytest.raises(DefenseError, match=f"{name}: wrote into the"):
            model_after(fed)


def test_a_data_attack_that_writes_into_its_clean_shard_is_named():
    class Spoils:
        def poison(self, shard: Labelled, rng: torch.Generator) -> Labelled:
            shard.x.fill_(0.5)
            return replace(shard, poisoned=torch.ones(6, dtype=torch.bool))

    shard = Labelled(torch.rand(6, 1, 4, 4), torch.arange(6), 6, torch.zeros(6, dtype=torch.bool))
    with pytest.raises(AttackError, match=r"attack\.data\.0: wrote into the inputs it was shown"):
        poison(0, Threat(malicious=frozenset({"c0"}), seed=0, data=[Spoils()]), {"c0": shard})


def test_the_kit_finds_outside_code_that_writes_also_past_the_count():
    def rule(updates: UpdateMatrix, ctx: RoundContext) -> Decision:
        WRITES["numpy"](ctx.last_update)
        return Decision(torch.zeros(updates.d))

    def attack(view: ThreatView) -> torch.Tensor:
        if view.last_update is not None:  # in the first round there is none
            WRITES["numpy"](view.last_update)
        return view.own * 2

    def careless(view: ThreatView) -> torch.Tensor:
        view.defense(UpdateMatrix.of(torch.cat([view.others, view.own])))
        return view.own * 2

    class Local(Scribble):
        def __init__(self) -> None:
            super().__init__(lambda tensor: None)

        def before_step(self, parameters: Any, step: int, ctx: LocalContext) -> None:
            WRITES["data"](ctx.control)

    with pytest.raises(AssertionError, match="last update was written to"):
        check_defense(rule)
    with pytest.raises(AssertionError, match="the attack wrote into the last global step"):
        check_attack(attack, kind="update")
    with pytest.raises(AssertionError, match=r"other ids, counts or another order.*received"):
        check_attack(careless, kind="update")
    with pytest.raises(AssertionError, match="wrote into the second vector"):
        check_attack(Local, kind="local")
