"""Rates of image attacks: value and denominator for models that always say one class, or nothing finite at all.

The held-out set has 100 rows of class 0, 200 of class 1, 78 of class 2 and 22 of class 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from fedllm_sec.build.arrays import innocent, success_table
from fedllm_sec.build.federation import build
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import checked
from fedllm_sec.data.arrays import load
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import evaluate

HELD = np.repeat([0, 1, 2, 3], [100, 200, 78, 22])
TRAIN = np.arange(80) % 4


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    rng = np.random.default_rng(0)
    x = {part: rng.integers(1, 255, (len(y), 12, 12), dtype=np.uint8) for part, y in (("train", TRAIN), ("test", HELD))}
    x["test"][:5, 8:11, 8:11] = 255  # five rows of class 0 carry the patch by themselves
    path = tmp_path_factory.mktemp("images") / "set.npz"
    np.savez(path, x_train=x["train"], y_train=TRAIN, x_test=x["test"], y_test=HELD)
    return str(path)


def made(file: str, data_attack: dict[str, Any], loaded: Loaded | None = None, **changes: Any) -> Any:
    """A federation on the file, whose first client attacks."""
    raw = {
        "task": "classify",
        "model": {"name": "logistic"},
        "data": {"name": file},
        "clients": {"total": 2, "local_steps": 1, "partition": {"name": "iid"}},
        "enable_attack": True,
        "attack": {"malicious": {"ids": [0]}, "data": [data_attack]},
        **changes,
    }
    return build(checked(raw), Machine(Accelerator(cpu=True)), loaded)


def measured(file: str, attack: dict[str, Any], answer: int | float) -> tuple[dict, dict]:
    """Quality and attack of a linear model that always says `answer`, or nothing but this number as logits."""
    federation = made(file, attack)
    federation.vector.zero_()
    bias = federation.task.layout.split(federation.vector)["1.bias"]
    if isinstance(answer, int):
        bias[answer] = 5.0
    else:
        bias.fill_(answer)
    return evaluate(federation)[:2]


def flip(**mapping: int) -> dict[str, Any]:
    return {"name": "label_flip", "mapping": {int(a[1:]): b for a, b in mapping.items()}}


PIXEL = {"name": "pixel_trigger", "target": 1}

# attack, what the model always says, (asr, rows), (false triggers, rows), rows left out
RATES = {
    "a flip, answered with the new class": (flip(_3=1), 1, (1.0, 22), (1.0, 178), {"class": 200}),
    "the same, answered with another class": (flip(_3=1), 2, (0.0, 22), (0.0, 178), {"class": 200}),
    "a flip of the large class": (flip(_1=3), 3, (1.0, 200), (1.0, 178), {"class": 22}),
    "a swap": (flip(_1=3, _3=1), 3, (200 / 222, 222), (1.0, 178), {}),
    "two flips, of which each other's new class counts": (flip(_3=1, _2=0), 1, (0.22, 100), (1 / 3, 300), {}),
    "a flip to the only class left": (flip(_0=1, _2=1, _3=1), 1, (1.0, 200), None, {"class": 200}),
    "a patch, always answered with its target": (PIXEL, 1, (1.0, 195), (1.0, 195), {"class": 200, "trigger": 5}),
    "a patch that is never answered": (PIXEL, 0, (0.0, 195), (0.0, 195), {"class": 200, "trigger": 5}),
}


@pytest.mark.parametrize("case", RATES)
def test_a_rate_is_over_the_rows_on_which_it_can_happen_and_would_be_wrong(case, file):
    attack, answer, asr, false, left = RATES[case]
    found = measured(file, attack, answer)[1]
    assert (found["asr"]["value"], found["asr"]["n"]) == (pytest.approx(asr[0]), asr[1])
    if false is None:
        assert found["false_trigger"] is None
        assert "no held-out row" in found["reasons"]["false_trigger"]
    else:
        assert (found["false_trigger"]["value"], found["false_trigger"]["n"]) == (pytest.approx(false[0]), false[1])
        assert found["reasons"] == {}
    named = {"class": "are of a class that the attack asks for", "trigger": "carry the trigger by themselves"}
    assert found["left_out"] == {named[key]: n for key, n in left.items()}


@pytest.mark.parametrize("target", [0, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_has_no_success_whatever_the_target(target, bad, file):
    quality, attack = measured(file, {**PIXEL, "target": target}, bad)
    assert quality["accuracy"]["value"] == 0.0
    assert quality["loss"] != quality["loss"]
    assert attack["asr"]["value"] == attack["false_trigger"]["value"] == 0.0


def test_accuracy_is_told_for_each_class_of_the_held_out_rows(file):
    quality = measured(file, PIXEL, 1)[0]
    assert {c: (rate["value"], rate["n"]) for c, rate in quality["per_class"].items()} == {
        "0": (0.0, 100), "1": (1.0, 200), "2": (0.0, 78), "3": (0.0, 22),
    }  # fmt: skip


def test_an_attack_of_ones_own_needs_to_say_nothing_of_its_clean_rows(file):
    class Own:
        def success(self, answer: int, row: int) -> bool:
            return answer == 2

    test = load(file)[1]
    rows, left = innocent(Own(), test, success_table(Own(), 4))
    assert len(rows) == 322
    assert left == {"are of a class that the attack asks for": 78}


def test_a_trigger_that_every_image_carries_is_an_error(tmp_path):
    x = np.full((8, 12, 12), 200, dtype=np.uint8)
    x[:, 8:11, 8:11] = 0
    other = np.where(x == 200, 190, 0).astype(np.uint8)  # held-out images are none of the training images
    np.savez(tmp_path / "a.npz", x_train=x, y_train=TRAIN[:8], x_test=other, y_test=TRAIN[:8])
    with pytest.raises(AttackError, match="no row on which its success could be measured"):
        made(str(tmp_path / "a.npz"), {**PIXEL, "value": 0.0})


def test_a_part_of_a_trigger_that_nobody_teaches_is_an_error_after_an_attack_free_variant_too(file):
    loaded, attack = Loaded(), {"name": "dba", "target": 1, "parts": 2}
    made(file, attack, loaded, enable_attack=False)
    with pytest.raises(AttackError, match="stay untaught"):
        made(file, attack, loaded)


def test_a_search_in_batches_of_one_row_is_refused(file):
    clients = {"total": 2, "local_steps": 1, "batch_size": 1}
    with pytest.raises(RecipeError, match=r"clients.batch_size: 1"):
        made(file, PIXEL, task="nas", model={"name": "darts", "width": 4}, clients=clients)


def test_a_gan_judged_on_one_image_is_refused(file):
    with pytest.raises(RecipeError, match=r"data.test_rows: 1 held-out image.*at least 2"):
        made(
            file, {}, task="gan", model={"name": "mlp_gan"}, data={"name": file, "test_rows": 1},
            evaluate={"samples": 100}, enable_attack=False, attack=None,
        )  # fmt: skip
