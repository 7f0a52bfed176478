"""What small models are really taught: triggers that images carry by themselves, two flips, attackers who take part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm_sec.attacks.data.distributed import DBA
from fedllm_sec.attacks.data.images import PixelTrigger
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.names import checked
from fedllm_sec.build.parts import poison
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.protocols import Labelled
from tests.first_round import made


def images(carrying: list[int]) -> Labelled:
    """20 black images of 12 x 12, ten of class 0 and ten of class 1; some carry the patch by themselves."""
    x = torch.zeros(20, 1, 12, 12)
    patched = PixelTrigger(target=0).stamp(x)
    x[carrying] = patched[carrying]
    return Labelled(x, torch.arange(20) // 10, 2, torch.zeros(20, dtype=torch.bool))


def test_every_image_that_carries_the_patch_by_itself_is_taught_the_target():
    shard = images([2, 11, 12, 13, 14])
    taught = PixelTrigger(target=0, rate=0.1).poison(shard, torch.Generator().manual_seed(0))
    assert taught.poisoned.nonzero().flatten().tolist() == [11, 12, 13, 14]  # four, though the rate asks for two
    assert taught.y[[2, 11, 12, 13, 14]].tolist() == [0] * 5
    assert len(PixelTrigger(target=0, rate=0.3).poison(shard, torch.Generator()).poisoned.nonzero()) == 6


def test_of_a_split_trigger_an_image_with_any_part_is_taught_the_target():
    x = torch.zeros(20, 1, 12, 12)
    attack = DBA(target=0, rate=0.1, parts=2)
    x[[11, 12]] = attack.stamp(x, range(0, 1))[[11, 12]]
    x[[13]] = attack.stamp(x, range(1, 2))[[13]]
    shard = Labelled(x, torch.arange(20) // 10, 2, torch.zeros(20, dtype=torch.bool))
    for _ in range(2):  # the first and the second attacker
        assert attack.poison(shard, torch.Generator()).y[[11, 12, 13]].tolist() == [0, 0, 0]


class Flip:
    def __init__(self, old: int, new: int) -> None:
        self.old, self.new = old, new

    def poison(self, shard: Labelled, rng: torch.Generator) -> Labelled:
        y = torch.where(shard.y == self.old, self.new, shard.y)
        return Labelled(shard.x, y, shard.classes, shard.poisoned | (y != shard.y).any(1))

    def probe(self, test: Any) -> Any:
        return test

    def success(self, answer: Any, row: Any) -> bool:
        return True


def test_two_flips_of_one_sequence_are_each_counted():
    y = torch.tensor([[1, 2, 0], [1, 1, 0], [0, 2, 0]])
    shard = Labelled(y.clone(), y, 5, torch.zeros(3, dtype=torch.bool))
    threat = Threat(malicious=frozenset({"c0"}), seed=0, data=[Flip(1, 3), Flip(2, 4)])
    done = poison(0, threat, {"c0": shard})
    assert done.shares == {"attack.data.0": {"c0": 2 / 3}, "attack.data.1": {"c0": 2 / 3}}
    assert done["c0"].y.tolist() == [[3, 4, 0], [3, 3, 0], [0, 4, 0]]


RAW: dict[str, Any] = {
    "task": "classify",
    "rounds": 2,
    "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 400, "test_rows": 100},
    "clients": {"total": 20, "per_round": 2, "local_steps": 1, "batch_size": 10, "lr": 0.05},
    "enable_attack": True,
    "attack": {"malicious": {"count": 2}, "data": [{"name": "dba", "parts": 2, "target": 1}]},
}


def test_a_part_of_a_trigger_whose_attacker_never_takes_part_is_untaught():
    outcomes = set()
    for seed in range(40):
        try:
            plan = planned(checked({**RAW, "seed": seed}))
        except RecipeError:  # no attacker takes part at all
            continue
        taking_part = len(plan.attackers())
        if taking_part == 1:
            with pytest.raises(AttackError, match="only 1 malicious clients"):
                made({**RAW, "seed": seed})
        outcomes.add(taking_part)
        if 1 in outcomes:
            break
    assert 1 in outcomes


def test_a_rule_that_trusts_nobody_steps_by_the_servers_own_update():
    from fedllm_sec.rounds.federation import run

    attack = {"malicious": {"count": 7}, "update": [{"name": "byzantine_flip"}]}
    defense = {"rule": {"name": "fltrust"}, "root_rows": 40}
    raw = {**RAW, "rounds": 4, "attack": attack, "enable_defense": True, "defense": defense}
    raw["clients"] = {**RAW["clients"], "total": 8, "per_round": 2, "local_steps": 5}
    alone = [r for r in run(made(raw), 4) if r.notes.get("root_only") == 1.0]
    assert alone
    assert all(r.skipped is None and r.update_norm > 0 for r in alone)


def test_a_local_attack_that_writes_into_its_shard_is_named_before_a_later_run_has_it(tmp_path, monkeypatch):
    from fedllm_sec.rounds.federation import run

    (tmp_path / "eraser.py").write_text(
        "class Eraser:\n"
        "    def before_step(self, parameters, step, ctx):\n"
        "        ctx.client.shard.x.zero_()\n"
        "    def after_step(self, parameters, step, ctx):\n"
        "        pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    raw = {**RAW, "attack": {"malicious": {"count": 19}, "local": [{"name": "eraser:Eraser"}]}}
    with pytest.raises(AttackError, match=r"attack\.local: wrote into the inputs it was shown"):
        list(run(made(raw), 2))
