"""Triggers over the whole image, against their formulas written out, and what is counted of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedllm_sec.attacks.data.overlays import Blended, Sinusoidal, Warped
from fedllm_sec.errors import AttackError
from fedllm_sec.models.logistic import logistic
from fedllm_sec.protocols import Labelled
from fedllm_sec.seeds import generator_for
from fedllm_sec.tasks.classify import Classify


def shard(n: int = 40, height: int = 10, width: int = 14) -> Labelled:
    x = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))
    return Labelled(x, torch.arange(n) % 4, 4, torch.zeros(n, dtype=torch.bool))


def rng():
    return generator_for(1, "test")


def test_blending_is_a_mean_with_one_key_for_all_attackers():
    rows, attack = shard(), Blended(target=1, rate=0.5, alpha=0.3)
    made, other = attack.poison(rows, rng()), Blended(target=1, rate=0.5, alpha=0.3).poison(rows, generator_for(9))
    at = made.poisoned
    assert int(at.sum()) == 20
    assert set(made.y[at].tolist()) == {1}
    assert torch.equal(made.x[~at], rows.x[~at])
    key = (made.x[at] - 0.7 * rows.x[at]) / 0.3
    torch.testing.assert_close(key, key[:1].expand_as(key), atol=1e-5, rtol=0)
    both = at & other.poisoned
    torch.testing.assert_close(made.x[both], other.x[both])
    assert 0.4 < float(key.mean()) < 0.6
    assert not torch.equal(Blended(target=1, seed=2).stamp(rows.x), Blended(target=1).stamp(rows.x))


def test_the_wave_is_the_papers_and_labels_stay():
    rows, attack = shard(), Sinusoidal(target=1, rate=0.5, delta=0.2, frequency=3)
    made = attack.poison(rows, rng())
    at = made.poisoned.nonzero().flatten().tolist()
    assert (len(at), torch.equal(made.y, rows.y)) == (5, True)  # half of the 10 rows of class 1
    for i in at:
        for j in range(14):
            expected = (rows.x[i, :, :, j].double() + 0.2 * math.sin(2 * math.pi * j * 3 / 14)).clamp(0, 1)
            torch.testing.assert_close(made.x[i, :, :, j].double(), expected, atol=1e-6, rtol=0)
    dirty = Sinusoidal(target=1, rate=0.5, delta=0.2, frequency=3, clean_label=False).poison(rows, rng())
    assert (int(dirty.poisoned.sum()), set(dirty.y[dirty.poisoned].tolist())) == (20, {1})
    nobody = Labelled(rows.x[:1], torch.tensor([0]), 4, torch.zeros(1, dtype=torch.bool))
    assert not attack.poison(nobody, rng()).poisoned.any()


def warped_by_hand(image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Bilinear samples at (x, y) in [-1, 1], corners being pixel centres: (channels, h, w)."""
    _, height, width = image.shape
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            x, y = (np.clip(places[row, column], -1, 1) + 1) / 2 * (np.array([width, height]) - 1)
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            a, b = x - left, y - top
            square = image[:, top : top + 2, left : left + 2]
            out[:, row, column] = (
                (1 - b) * ((1 - a) * square[:, 0, 0] + a * square[:, 0, 1])
                + b * ((1 - a) * square[:, 1, 0] + a * square[:, 1, 1])
            )  # fmt: skip
    return out


def test_the_warp_takes_every_pixel_from_where_one_smooth_field_says():
    rows, attack = shard(), Warped(target=1, rate=0.25, strength=2.0, noise=1.0)
    made = attack.poison(rows, rng())
    places = attack.places(10, 14).double().numpy()
    still = np.stack(np.meshgrid(np.linspace(-1, 1, 14), np.linspace(-1, 1, 10)), -1)
    moved = (places - still) * [14, 10] / 2.0  # the field itself, whose control points have mean absolute value 1
    assert 0.3 < np.abs(moved).mean() < 1.5
    assert np.abs(np.diff(moved, axis=0)).max() < 1.5  # smooth
    other = made.poisoned & (made.y == rows.y) & (rows.y != 1)
    forced = made.poisoned & (made.y != rows.y)
    assert (int(forced.sum()), int(made.poisoned.sum())) == (10, 20)
    for i in forced.nonzero().flatten().tolist()[:3]:
        expected = warped_by_hand(rows.x[i].double().numpy(), places)
        np.testing.assert_allclose(made.x[i].numpy(), expected, atol=1e-4)
    assert other.any()
    for i in other.nonzero().flatten().tolist():  # the noise mode: another warp, the own label
        assert not torch.allclose(made.x[i], attack.stamp(rows.x[i : i + 1])[0], atol=1e-2)
        assert not torch.allclose(made.x[i], rows.x[i], atol=1e-2)


ATTACKS = [Blended(target=1), Sinusoidal(target=1, frequency=3), Warped(target=1, strength=2.0)]


@pytest.mark.parametrize("attack", ATTACKS, ids=["blended", "sinusoidal", "warped"])
def test_augmentation_leaves_the_trigger_as_it_was_stamped(attack):
    made = attack.poison(shard(), rng())
    rows = made.poisoned.nonzero().flatten()
    task = Classify(logistic((3, 10, 14), 4), torch.device("cpu"), flip=True, crop=3)
    torch.manual_seed(0)
    assert torch.equal(task.images(made, rows), made.x[rows])


@pytest.mark.parametrize("attack", ATTACKS, ids=["blended", "sinusoidal", "warped"])
def test_the_probe_is_every_other_class_where_the_trigger_can_be_seen(attack):
    rows = shard(8)
    rows.x[2] = 0.5  # of one shade: a warp leaves it as it is
    probe = attack.probe(rows)
    assert len(probe.y) == (5 if isinstance(attack, Warped) else 6)
    assert set(probe.y.tolist()) == {1}
    assert attack.success(1, None)
    assert not attack.success(0, None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Blended(target=1, alpha=0.0), r"blended\.alpha: 0\.0"),
        (lambda: Blended(target=1, rate=0.0), r"blended\.rate"),
        (lambda: Sinusoidal(target=1, delta=0.0), "needs 0 < delta"),
        (lambda: Sinusoidal(target=1, frequency=7).stamp(shard().x), r"frequency: 7: 14 columns show fewer"),
        (lambda: Warped(target=1, grid=1), "grid >= 2"),
        (lambda: Warped(target=9).poison(shard(), rng()), "classes go from 0 to 3"),
    ],
)
def test_settings_that_could_not_act_are_refused(make, words):
    with pytest.raises(AttackError, match=words):
        make()
