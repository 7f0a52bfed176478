"""A check is made for every variant: what was kept from an attack-free one that ran before makes nothing silent."""

from __future__ import annotations

from typing import Any

import pytest

from fedllm_sec.build.federation import build
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import checked
from fedllm_sec.errors import FedError
from fedllm_sec.recipe import reading as recipes
from tests.build.test_bad_input import DIGITS, machine
from tests.conftest import SMALL


def text(*data: dict[str, Any], malicious: int = 1, **more: Any) -> dict[str, Any]:
    return recipes.merge(SMALL, {"attack": {"malicious": {"count": malicious}, "data": list(data)}, **more})


def digits(*data: dict[str, Any], **more: Any) -> dict[str, Any]:
    attack = {"malicious": {"count": 1}, "data": list(data)}
    return recipes.merge(DIGITS, {"enable_attack": True, "attack": attack, **more})


TRIGGER = {"name": "text_trigger", "target": "Sports", "rate": 0.6}
LONG = " ".join(["Sports"] * 60)
CASES = {
    "dba on text": (text({"name": "dba", "target": "Sports"}), "stay untaught"),
    "dba on images": (digits({"name": "dba", "target": 1, "parts": 2}), "stay untaught"),
    "no such target": (text({"name": "badnets", "target": "Spots"}), "is not a label"),
    "no such target, second": (text(TRIGGER, {"name": "badnets", "target": "Spots"}), "is not a label"),
    "no such class": (text({"name": "label_flip", "mapping": {"Spots": "Sports"}}), "is not a label"),
    "two triggers": (text(TRIGGER, {"name": "badnets", "target": "Food", "rate": 0.6}), "Lower one of the rates"),
    "two triggers on images": (
        digits(*({"name": "pixel_trigger", "target": target, "rate": 0.6} for target in (1, 2))),
        "attack.data.1|rate",
    ),
    "long prompts": (text(TRIGGER, data={"max_length": 10}), "poisoned rows|max_length"),
    "long target": (
        text(
            {"name": "badnets", "target": LONG},
            data={"name": "builtin:edit", "max_length": 64, "train_rows": 100, "test_rows": 20},
            evaluate={"max_new_tokens": 100},
        ),
        "longer than data.max_length=64",
    ),
    "target cut in answers": (
        text(
            {"name": "badnets", "target": "one two three four five"},
            data={"name": "builtin:edit", "max_length": 96, "train_rows": 100, "test_rows": 20},
        ),
        "max_new_tokens=3 cuts it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_error_of_an_attack_is_told_after_an_attack_free_variant_too(name: str):
    raw, words = CASES[name]
    loaded, alone = Loaded(), ""
    with pytest.raises(FedError, match=f"(?s){words}") as caught:
        build(checked(raw), machine())
    alone = str(caught.value)
    try:
        build(checked({**raw, "enable_attack": False}), machine(), loaded)
    except FedError:  # of what an attack-free run measures too
        loaded.clear()
    for _ in range(2):  # nor does the error itself leave anything behind
        with pytest.raises(FedError) as caught:
            build(checked(raw), machine(), loaded)
        assert str(caught.value) == alone
