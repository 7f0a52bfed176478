"""Image attacks: settings that are out of range, what augmentation does to a trigger, rows that are taken already."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedllm_sec.attacks.data.distributed import DBA
from fedllm_sec.attacks.data.images import EdgeCase, PixelTrigger, Semantic, area
from fedllm_sec.attacks.data.labels import LabelFlip
from fedllm_sec.errors import AttackError
from fedllm_sec.models.logistic import logistic
from fedllm_sec.protocols import Labelled
from fedllm_sec.seeds import generator_for
from fedllm_sec.tasks.classify import Classify


def shard(n: int = 40, side: int = 12) -> Labelled:
    x = 0.1 + 0.8 * torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    return Labelled(x, torch.arange(n) % 4, 4, torch.zeros(n, dtype=torch.bool))


def rng():
    return generator_for(1, "test")


@pytest.mark.parametrize("value", [255, -3, 1.01, float("nan"), float("inf")])
def test_a_patch_is_as_bright_as_a_pixel_can_be(value):
    with pytest.raises(AttackError, match=r"pixel_trigger.value.*from 0 \(black\) to 1 \(white\)"):
        PixelTrigger(target=1, value=value)


def test_other_settings_out_of_range_are_errors():
    with pytest.raises(AttackError, match=r"semantic.above: nan"):
        Semantic(target=1, above=float("nan"))
    with pytest.raises(AttackError, match=r"edge_case.source: 9: classes go from 0 to 3"):
        EdgeCase(target=1, source=9).poison(shard(), rng())
    for make in (lambda r: PixelTrigger(target=1, rate=r), lambda r: DBA(target=1, rate=r)):
        with pytest.raises(AttackError, match="rate"):
            make(float("nan"))


def test_a_stamp_fixes_the_pixels_that_it_sets_in_the_rows_that_it_marks():
    attack = PixelTrigger(target=1, rate=0.5, size=2, margin=1)
    poisoned = attack.poison(shard(), rng())
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[9:11, 9:11] = True
    assert torch.equal(area(attack.stamp, poisoned.x), expected)
    assert torch.equal(poisoned.fixed.any(2).any(1), poisoned.poisoned)
    assert all(torch.equal(mask, expected) for mask in poisoned.fixed[poisoned.poisoned])
    assert LabelFlip(mapping={0: 1}).poison(shard(), rng()).fixed is None


@pytest.mark.parametrize("attack", [PixelTrigger(target=1, rate=0.5), DBA(target=1, rate=0.5, parts=2)])
def test_the_trigger_stands_in_training_where_it_stands_at_the_test(attack):
    """The attacker stamps after augmentation: flip and crop move the image and leave the trigger alone."""
    poisoned = attack.poison(shard(), rng())
    rows = poisoned.poisoned.nonzero().flatten()
    task = Classify(logistic((3, 12, 12), 4), torch.device("cpu"), flip=True, crop=4)
    torch.manual_seed(0)
    seen = task.images(poisoned, rows)
    stamped = poisoned.fixed[rows][:, None].expand_as(seen)
    assert bool((seen[stamped] == 1.0).all())
    moved = [not torch.equal(a, b) for a, b in zip(seen, poisoned.x[rows], strict=True)]
    assert sum(moved) > 15


def test_a_later_attack_leaves_the_rows_of_an_earlier_one():
    first = PixelTrigger(target=1, rate=0.5).poison(shard(), rng())
    both = LabelFlip(mapping={1: 2}).poison(first, rng())
    assert torch.equal(both.y[first.poisoned], first.y[first.poisoned])
    assert torch.equal(both.fixed, first.fixed)
    corner = PixelTrigger(target=2, rate=0.25, corner="top_left").poison(first, rng())
    assert int(corner.poisoned.sum()) == 30
    assert torch.equal(corner.y[first.poisoned], first.y[first.poisoned])
    with pytest.raises(AttackError, match=r"wants 30 of a client's 40 rows, and earlier attacks have left 20"):
        PixelTrigger(target=2, rate=0.75).poison(first, rng())
    everything = replace(first, poisoned=torch.ones(40, dtype=torch.bool))
    for attack in (EdgeCase(target=2), Semantic(target=2), LabelFlip(mapping={1: 2})):
        assert torch.equal(attack.poison(everything, rng()).y, first.y)


def test_images_that_carry_a_trigger_by_themselves_are_no_probe():
    test = shard()
    for attack in (PixelTrigger(target=1), DBA(target=1, parts=2)):
        x = test.x.clone()
        part = {"parts": range(1)} if isinstance(attack, DBA) else {}
        x[:6] = attack.stamp(x[:6], **part)
        marked = replace(test, x=x)
        assert attack.carries(marked).tolist() == [True] * 6 + [False] * 34
        assert len(attack.probe(marked).y) == 30 - 4  # of the first six rows, 1 and 5 are of the target's class
