"""Classification: batches by index, shifts and mirrors that can be checked by hand, gradients in the flat vector."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedllm_sec.errors import DataError
from fedllm_sec.models.lenet import lenet
from fedllm_sec.models.logistic import logistic
from fedllm_sec.protocols import Labelled
from fedllm_sec.tasks.classify import Classify

CPU = torch.device("cpu")


def images(n=7, shape=(1, 4, 4), classes=3) -> Labelled:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(n, *shape, generator=rng)
    return Labelled(x, torch.arange(n) % classes, classes, torch.zeros(n, dtype=torch.bool))


def test_an_epoch_takes_every_row_once_as_tensors():
    task, shard = Classify(logistic((1, 4, 4), 3), CPU), images()
    batches = list(task.batches(shard, 3, torch.Generator().manual_seed(1)))
    assert [len(b) for b in batches] == [3, 3, 1]
    assert all(isinstance(b, torch.Tensor) for b in batches)
    assert sorted(torch.cat(batches).tolist()) == list(range(7))
    again = list(task.batches(shard, 3, torch.Generator().manual_seed(1)))
    assert torch.equal(torch.cat(batches), torch.cat(again))


@pytest.mark.parametrize("fewer", [lambda logits: logits[:, :2], lambda logits: logits[:2]], ids=["classes", "rows"])
def test_a_model_that_gives_fewer_logits_later_on_is_told(fewer):
    task, shard = Classify(logistic((1, 4, 4), 3), CPU), images()
    task.loss(shard, torch.arange(4))
    task.model.register_forward_hook(lambda model, given, logits: fewer(logits))
    with pytest.raises(DataError, match=r"model\.name: gives \((4, 2|2, 3)\) for 4 rows, where it gave 3 logits a row"):
        task.loss(shard, torch.arange(4))


def test_loss_and_gradient_equal_those_of_a_plain_model():
    shard = images()
    task = Classify(lenet((1, 4, 4), 3), CPU, mean=torch.tensor([0.5]), std=torch.tensor([0.25]))
    plain = lenet((1, 4, 4), 3)
    plain.load_state_dict(task.model.state_dict())
    task.loss(shard, torch.tensor([0, 2, 5])).backward()
    at = [0, 2, 5]
    expected = torch.nn.functional.cross_entropy(plain((shard.x[at] - 0.5) / 0.25), shard.y[at])
    expected.backward()
    flat = torch.cat([p.grad.flatten() for p in plain.parameters()])
    torch.testing.assert_close(task.parameters.grad, flat)
    assert task.layout.size == flat.numel()


def test_writing_the_flat_vector_changes_the_model():
    task = Classify(logistic((1, 4, 4), 3), CPU)
    with torch.no_grad():
        task.parameters.zero_()
    assert task.loss(images(), [0, 1]).item() == pytest.approx(torch.tensor(3.0).log().item())


def test_score_gives_loss_and_choice_of_each_row():
    task, shard = Classify(logistic((1, 4, 4), 3), CPU), images()
    found = task.score(shard, torch.arange(7))
    logits = task.model(shard.x)
    assert found[:, 1].tolist() == logits.argmax(1).tolist()
    expected = torch.nn.functional.cross_entropy(logits, shard.y).item()
    assert found[:, 0].mean().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_whose_logits_are_not_finite_is_answered_with_no_class(bad):
    task, shard = Classify(logistic((1, 4, 4), 3), CPU), images()
    with torch.no_grad():
        task.model[1].bias[0] = bad
    found = task.score(shard, torch.arange(7))
    assert found[:, 1].tolist() == [-1.0] * 7
    assert not found[:, 0].isfinite().any()


def test_fixed_pixels_stay_where_they_are_while_the_image_moves_under_them():
    task, shard = Classify(logistic((1, 4, 4), 3), CPU, flip=True, crop=2), images(60)
    fixed = torch.zeros(60, 4, 4, dtype=torch.bool)
    fixed[::2, 3, 3] = True
    shard = replace(shard, fixed=fixed)
    torch.manual_seed(0)
    seen = task.images(shard, torch.arange(60))
    kept = (seen[:, 0, 3, 3] == shard.x[:, 0, 3, 3]).tolist()
    assert all(kept[::2])
    assert sum(kept[1::2]) < 15
    torch.manual_seed(0)
    moved = task.images(replace(shard, fixed=None), torch.arange(60))
    assert torch.equal(seen.where(~fixed[:, None], 0), moved.where(~fixed[:, None], 0))


def test_a_shift_moves_each_image_as_a_whole():
    task = Classify(logistic((1, 4, 4), 3), CPU, crop=1)
    x = images(64).x + 1  # no zeros of its own
    torch.manual_seed(0)
    moved = task.augment(x, *task.numbers(64))
    assert moved.shape == x.shape
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    places = [(i, j) for i in range(3) for j in range(3)]
    seen = set()
    for before, after in zip(padded, moved, strict=True):
        fits = [p for p in places if torch.equal(before[:, p[0] : p[0] + 4, p[1] : p[1] + 4], after)]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 9


def test_a_mirrored_image_is_mirrored_left_to_right():
    task = Classify(logistic((1, 4, 4), 3), CPU, flip=True)
    x = images(40).x
    torch.manual_seed(0)
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(x, task.augment(x, *task.numbers(40)), strict=True)]
    same = [torch.equal(a, b) for a, b in zip(x, task.augment(x, *task.numbers(40)), strict=True)]
    assert 8 < sum(flipped) < 32
    assert 8 < sum(same) < 32


def test_what_is_drawn_for_a_batch_depends_on_torchs_seed_alone():
    task = Classify(logistic((1, 4, 4), 3), CPU, flip=True, crop=1)
    shard, drawn = images(), []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(task.images(shard, [0, 1, 2]))
    assert torch.equal(*drawn)


def test_a_shift_larger_than_the_image_is_refused():
    with pytest.raises(DataError, match=r"data.crop: 4"):
        Classify(logistic((1, 4, 4), 3), CPU, crop=4).loss(images(), [0])
