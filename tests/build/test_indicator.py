"""The rows of backdoor_indicator: where they come from, and what is refused before anything is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from fedllm_sec.build.federation import assemble
from fedllm_sec.build.indicator import indicator_rows
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.defenses.indicator import BackdoorIndicator
from fedllm_sec.errors import RecipeError
from fedllm_sec.protocols import Labelled
from fedllm_sec.rounds.compute import Machine

COLOURS = Labelled(torch.rand(4, 3, 6, 5), torch.tensor([0, 1, 2, 3]), 4, torch.zeros(4, dtype=torch.bool))
RECIPE: dict[str, Any] = {
    "task": "classify", "rounds": 1, "model": {"name": "logistic"},
    "data": {"name": "digits", "train_rows": 60, "test_rows": 20},
    "clients": {"total": 3, "local_steps": 1, "batch_size": 8, "lr": 0.1},
}  # fmt: skip


def recipe(rule: dict[str, Any], **changes: Any) -> Any:
    block = {"rule": {"name": "backdoor_indicator", **rule}}
    return checked({**RECIPE, "enable_defense": True, "defense": block, **changes})


@pytest.fixture
def grey(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", x_train=x[:20], y_train=np.arange(20) % 2, x_test=x[20:], y_test=np.arange(10) % 2)
    return str(tmp_path / "grey.npz")


def test_noise_fills_the_pixels_and_labels_are_balanced_in_an_order_of_the_seed():
    rule = BackdoorIndicator(source="noise", rows=10)
    made, again, other = (indicator_rows(rule, COLOURS, seed) for seed in (1, 1, 2))
    assert made.x.shape == (10, 3, 6, 5)
    assert 0 <= float(made.x.min()) < 0.1 < 0.9 < float(made.x.max()) <= 1
    assert sorted(made.y.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert torch.equal(made.x, again.x)
    assert torch.equal(made.y, again.y)
    assert made.y.tolist() != other.y.tolist()


def test_images_of_another_set_are_brought_to_the_shape_of_the_task_s(grey):
    made = indicator_rows(BackdoorIndicator(source=grey, rows=12), COLOURS, 1)
    assert made.x.shape == (12, 3, 6, 5)
    assert torch.equal(made.x[:, 0], made.x[:, 2])
    assert len({row.tobytes() for row in made.x.numpy()}) == 12


def test_images_in_colour_become_grey_where_the_task_s_are(tmp_path):
    x = np.random.default_rng(0).random((6, 4, 4, 3), dtype=np.float32)
    np.savez(tmp_path / "c.npz", x_train=x[:4], y_train=[0, 1, 0, 1], x_test=x[4:], y_test=[0, 1])
    like = Labelled(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), 2, torch.zeros(2, dtype=torch.bool))
    made = indicator_rows(BackdoorIndicator(source=str(tmp_path / "c.npz"), rows=4), like, 1)
    torch.testing.assert_close(made.x[:, 0], torch.from_numpy(x[:4]).mean(3))


@pytest.mark.parametrize(
    ("rule", "changes", "words"),
    [
        ({"source": "digits"}, {}, "source: digits: is data.name itself, rows of the task"),
        ({"source": "noise", "threshold": 0.0}, {}, "needs 0 < threshold <= 1"),
        ({"source": "noise"}, {"task": "nas", "model": {"name": "darts"}}, "needs a model of images into which"),
        ({"source": "noise"}, {"task": "gan", "model": {"name": "mlp_gan"}}, "needs a model of images into which"),
        ({}, {}, "source"),
    ],
)
def test_what_cannot_act_is_said_by_check(rule, changes, words):
    with pytest.raises(RecipeError, match=words):
        planned(recipe(rule, **changes))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"source": "noise", "rows": 9}, "rows: 9 for 10 labels: each needs one. Raise it"),
        ({"source": "GREY", "rows": 21}, "has 20 images for rows: 21. Lower rows, or name a larger set"),
        ({"source": "./nowhere.npz"}, r"backdoor_indicator: source: ./nowhere.npz: data"),
    ],
)
def test_what_the_rows_lack_is_said_before_training(rule, words, grey):
    rule = rule | {"source": rule["source"].replace("GREY", grey)}
    with pytest.raises(RecipeError, match=words):
        assemble(planned(recipe(rule)), Machine(Accelerator(cpu=True)))
