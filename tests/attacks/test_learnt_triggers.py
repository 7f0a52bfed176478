"""a3fl and iba: triggers against their formulas written out, what is measured with them, where none can be learnt."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fedllm_sec.attacks.data.generated import IBA
from fedllm_sec.attacks.data.learnt import A3FL, TriggerView
from fedllm_sec.build.federation import build
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import checked
from fedllm_sec.build.triggers import shown
from fedllm_sec.deploy.problems import deploy_problems
from fedllm_sec.errors import AttackError, FedError
from fedllm_sec.protocols import Labelled
from fedllm_sec.records.checkpoint import pack, unpack
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import Federation, run
from fedllm_sec.seeds import generator_for
from fedllm_sec.tasks.classify import Classify
from tests.attacks.test_effect_of_models import DIGITS, last_round

LOADED = Loaded()
LEARNT = {"name": "a3fl", "target": 0, "size": 2, "margin": 0, "passes": 8, "renew": 4}


def view(seed: int = 6) -> TriggerView:
    """Twelve images of 4 x 4 pixels, three classes, a linear model."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(12, 1, 4, 4, generator=draw)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    task = Classify(model, torch.device("cpu"))
    vector = torch.randn(task.layout.size, generator=draw)
    return TriggerView(task.function(), vector, x, torch.arange(12) % 3, generator_for(1, "trigger"))


def logits(vector: Tensor, x: Tensor) -> Tensor:
    return x.flatten(1) @ vector[:48].view(3, 16).T + vector[48:]


def test_the_patch_goes_down_both_losses_by_signs_and_the_copy_unlearns_it():
    """Zhang et al. 2023, sec. 3.2, in ten lines: three passes over one batch, a copy before each."""
    seen = view()
    attack = A3FL(target=1, size=3, margin=1, passes=3, copy_epochs=20, weight=30.0, step=0.1)
    attack.tune(seen)
    x, y, theta, patch = seen.x.double(), seen.y, seen.vector.double(), torch.full((1, 3, 3), 0.5).double()
    for _ in range(3):
        x[..., 1:4, 1:4] = patch
        copy, speed = theta.clone(), torch.zeros_like(theta)
        for _ in range(20):
            copy.requires_grad_()
            slope = torch.autograd.grad(nn.functional.cross_entropy(logits(copy, x), y), copy)[0] + 5e-4 * copy.detach()
            speed = 0.9 * speed + slope
            copy = copy.detach() - 0.01 * speed
        pull = 30.0 * float(copy @ theta / copy.norm() / theta.norm())
        here = x.clone().requires_grad_()
        wanted = torch.ones(12, dtype=torch.long)
        loss, unlearnt = (nn.functional.cross_entropy(logits(v, here), wanted) for v in (theta, copy))
        slope = torch.autograd.grad(loss + pull * unlearnt, here)[0][..., 1:4, 1:4].sum(0)
        patch = (patch - 0.1 * slope.sign()).clamp(0, 1)
    assert attack.learnt is not None
    torch.testing.assert_close(attack.learnt.double(), patch, atol=1e-6, rtol=0)
    alone = A3FL(target=1, size=3, margin=1, passes=3, weight=0.0, step=0.1)
    alone.tune(view())
    assert int((attack.learnt != alone.learnt).sum()) == 4  # of 9 pixels, by what the copy says


def test_the_loss_it_goes_down_falls_and_the_next_round_goes_on_from_there():
    seen = view()
    attack = A3FL(target=1, size=2, margin=1, passes=5, copy_epochs=1)

    def loss() -> float:
        wanted = torch.ones(12, dtype=torch.long)
        return float(nn.functional.cross_entropy(seen.classifier.logits(seen.vector, attack.stamp(seen.x)), wanted))

    values = [loss()]
    for _ in range(3):
        attack.tune(seen)
        values.append(loss())
    assert values == sorted(values, reverse=True)
    assert float((attack.learnt - 0.5).abs().max()) == pytest.approx(0.15, abs=1e-5)  # 15 steps of 0.01
    again = A3FL(target=1, size=2, margin=1, passes=5, copy_epochs=1)
    again.tune(replace(seen, vector=seen.vector * math.nan, rng=generator_for(2)))
    assert torch.equal(again.learnt, torch.full((1, 2, 2), 0.5))  # a model that is not finite teaches nothing


def test_rows_are_the_same_whatever_was_learnt_and_the_patch_stays_where_it_is():
    x = torch.rand(40, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    rows = Labelled(x, torch.arange(40) % 4, 4, torch.zeros(40, dtype=torch.bool))
    attack = A3FL(target=1, rate=0.5)
    grey = attack.poison(rows, generator_for(1, "test"))
    attack.learnt = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(1))
    made = attack.poison(rows, generator_for(1, "test"))
    at = made.poisoned
    assert torch.equal(at, grey.poisoned)
    assert (int(at.sum()), set(made.y[at].tolist())) == (20, {1})
    assert float(grey.x[at][:, :, 2:7, 2:7].unique()) == 0.5
    assert torch.equal(made.x[at][:, :, 2:7, 2:7], attack.learnt.expand(20, 3, 5, 5))
    assert torch.equal(made.x[~at], rows.x[~at])
    assert made.fixed is not None
    assert int(made.fixed[at].sum()) == 20 * 25
    probe = attack.probe(rows)
    assert (len(probe.y), set(probe.y.tolist())) == (30, {1})


def test_each_image_gets_a_change_of_its_own_within_epsilon_and_the_generator_learns_what_wins():
    """Nguyen et al. 2023, sec. 4.1, by torch's own layers: three steps of Adam over one batch."""
    seen = view()
    attack = IBA(target=1, epsilon=0.1, passes=3, width=4)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 1, 3, padding=1), nn.Tanh(),
    ).double()  # fmt: skip
    nn.utils.vector_to_parameters(attack.generator(seen.x).double(), net.parameters())
    x, adam, losses = seen.x.double(), torch.optim.Adam(net.parameters(), lr=0.01), []
    for _ in range(3):
        adam.zero_grad()
        loss = nn.functional.cross_entropy(
            logits(seen.vector.double(), (x + 0.1 * net(x)).clamp(0, 1)), torch.ones(12, dtype=torch.long)
        )
        loss.backward()
        adam.step()
        losses.append(loss.item())
    attack.tune(seen)
    assert attack.learnt is not None
    expected = nn.utils.parameters_to_vector(net.parameters())
    torch.testing.assert_close(attack.learnt.double(), expected, atol=1e-4, rtol=0)
    assert losses[2] < losses[1] < losses[0]
    made = attack.stamp(seen.x)
    torch.testing.assert_close(made.double(), (x + 0.1 * net(x)).clamp(0, 1).detach(), atol=1e-4, rtol=0)
    change = made - seen.x
    assert 0.05 < float(change.abs().max()) <= 0.1 + 1e-6
    assert float((change[0] - change[1]).abs().max()) > 0.01  # another image, another trigger
    assert IBA(target=1, seed=1).generator(seen.x).tolist() != IBA(target=1).generator(seen.x).tolist()
    again = IBA(target=1, passes=2)
    again.tune(replace(seen, vector=seen.vector * math.nan))
    assert torch.equal(again.learnt, again.generator(seen.x))
    assert bool(again.learnt.isfinite().all())


def test_rows_with_a_generated_trigger_are_the_same_ones_whatever_was_learnt():
    x = torch.rand(40, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    rows = Labelled(x, torch.arange(40) % 4, 4, torch.zeros(40, dtype=torch.bool))
    attack = IBA(target=1, epsilon=0.05)
    first = attack.poison(rows, generator_for(1, "test"))
    attack.learnt = -attack.generator(x)
    made = attack.poison(rows, generator_for(1, "test"))
    at = made.poisoned
    assert torch.equal(at, first.poisoned)
    assert (int(at.sum()), set(made.y[at].tolist())) == (20, {1})
    assert torch.equal(made.x[~at], rows.x[~at])
    assert 0 < float((made.x - rows.x).abs().max()) <= 0.05 + 1e-6
    assert made.fixed is not None
    assert bool(made.fixed[at].all())
    assert not torch.equal(made.x, first.x)
    assert attack.probe(rows).y.tolist() == [1] * 30


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"passes": 0}, "iba.passes: 0: must be 1 or more"),
        ({"epsilon": 8.0}, "pixels from 0 to 1 .divide by 255"),
        ({"lr": math.inf}, "a finite lr above 0"),
    ],
)
def test_settings_of_a_generator_that_cannot_act_are_errors(settings, words):
    with pytest.raises(AttackError, match=words):
        IBA(target=1, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"passes": 0}, "a3fl.passes: 0: must be 1 or more"),
        ({"step": 2.0}, "0 < step <= 1 in pixels from 0 to 1"),
        ({"weight": math.inf}, "a finite weight of 0 or more"),
        ({"rate": 0.0}, "a3fl.rate"),
    ],
)
def test_settings_that_cannot_act_are_errors(settings, words):
    with pytest.raises(AttackError, match=words):
        A3FL(target=1, **settings)


# ---------------------------------------------------------------- in a run


def federation(**changes: Any) -> Federation:
    raw = {**DIGITS, "rounds": 3, "data": {"name": "digits", "train_rows": 200}, "evaluate": {"every": 1}}
    raw["clients"] = {**DIGITS["clients"], "total": 6, "local_epochs": 1}
    raw |= {"enable_attack": True, "attack": {"malicious": {"count": 3}, "stop": 2, "data": [LEARNT]}, **changes}
    made = build(checked(raw), Machine(Accelerator(cpu=True)), LOADED)
    assert isinstance(made, Federation)
    return made


def test_attackers_learn_while_they_attack_and_a_resumed_run_is_the_same():
    whole, patches, states = federation(), [], []
    cached = whole.evaluation
    for record in run(whole, 3):
        patches.append(whole.threat.data[0].learnt.clone())
        states.append(unpack(b"".join(map(bytes, pack(whole.state_dict())))))
        last = record
    assert not torch.equal(patches[0], patches[1])
    assert torch.equal(patches[1], patches[2])  # round 3 is nobody's
    assert float(cached.triggered.x[:, :, :2, :2].unique()) == 0.5  # what other variants share is as it was
    assert torch.equal(whole.evaluation.triggered.x[0, :, :2, :2], patches[2])
    assert torch.equal(whole.evaluation.clean.x, cached.clean.x)
    for id in whole.threat.malicious:
        shard = whole.threat.poisoned[id]
        assert torch.equal(shard.x[shard.poisoned][0, :, :2, :2], patches[1])
    for done in (1, 2):
        later = federation()
        later.load_state_dict(states[done - 1])
        *_, again = run(later, 3)
        assert torch.equal(later.vector, whole.vector), done
        assert (again.quality, again.attack) == (last.quality, last.attack)
    images = shown(whole.evaluation, whole.task)["images"]
    assert (len(images), {image["wanted"] for image in images}) == (4, {0})


def test_where_the_attack_is_off_the_trigger_is_learnt_all_the_same_and_nobody_is_touched():
    patch = {"malicious": {"count": 3}, "stop": 2, "data": [{"name": "pixel_trigger", "target": 0}]}
    plain = federation(attack=patch, enable_attack=False)
    free = federation(enable_attack=False)
    for one in (plain, free):
        *_, last = run(one, 3)
    assert torch.equal(plain.vector, free.vector)
    assert not free.threat.poisoned
    learnt = free.threat.data[0].learnt
    assert float((learnt - 0.5).abs().max()) > 0.1
    assert torch.equal(free.evaluation.triggered.x[0, :, :2, :2], learnt)
    assert last.attack is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attack": {"malicious": {"count": 3}, "collude": False, "data": [LEARNT]}}, "Set attack.collude: true"),
        (
            {"attack": {"malicious": {"count": 3}, "data": [LEARNT, {"name": "pixel_trigger", "target": 1}]}},
            "Name it alone under attack.data",
        ),
        ({"algorithm": {"name": "fedgkt"}, "enable_attack": False}, "a3fl learns its trigger against the classifier"),
        ({"task": "nas", "model": {"name": "darts"}}, "a3fl learns its trigger against the classifier"),
        ({"attack": {"malicious": {"count": 3}, "data": [{**LEARNT, "size": 9}]}}, "a patch of 9 .* leaves 8 x 8"),
    ],
)
def test_where_no_trigger_can_be_learnt_is_an_error_before_training(changes, words):
    with pytest.raises(FedError, match=words):
        federation(**changes)


def test_a_device_is_told_no_trigger():
    raw = {**DIGITS, "enable_attack": True, "attack": {"malicious": {"count": 3}, "data": [LEARNT]}}
    assert [text for text in deploy_problems(checked(raw)) if text.startswith("attack.data.0: a3fl: its trigger")]


@pytest.mark.slow
def test_a_learnt_patch_does_more_than_the_grey_one_it_began_as_and_multi_krum_removes_it():
    attack = {"attack": {"data": [{**LEARNT, "passes": 10, "renew": 10}]}}
    grey = {"name": "pixel_trigger", "target": 0, "rate": 0.25, "value": 0.5, "size": 2, "margin": 0}
    assert last_round(attack={"data": [{**grey, "corner": "top_left"}]}).attack["asr"]["value"] <= 0.15
    assert last_round(**attack).attack["asr"]["value"] >= 0.35
    assert last_round(**attack, enable_attack=False).attack["asr"]["value"] <= 0.02
    held = last_round({"name": "multi_krum", "f": 3}, **attack)
    assert held.attack["asr"]["value"] <= 0.02
    assert held.detection["tpr"] == 1.0


@pytest.mark.slow
def test_a_generated_trigger_takes_hold_beyond_what_it_does_to_a_model_that_nobody_attacked():
    attack = {"attack": {"data": [{"name": "iba", "target": 0, "epsilon": 0.2}]}}
    free = last_round(**attack, enable_attack=False).attack["asr"]["value"]
    assert free <= 0.15
    assert last_round(**attack).attack["asr"]["value"] >= 0.35
    held = last_round({"name": "multi_krum", "f": 3}, **attack)
    assert held.attack["asr"]["value"] <= free + 0.1
    assert held.detection["tpr"] == 1.0
