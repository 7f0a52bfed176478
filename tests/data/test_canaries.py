"""Planted secrets: as many rows as before, made-up numbers, the same by the same seed."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from fedllm_sec.build.names import checked
from fedllm_sec.data.canaries import canaries_of, guesses, planted
from fedllm_sec.errors import RecipeError
from fedllm_sec.recipe.sections import Canaries

ASKED = Canaries(client=1, repetitions=[1, 3, 2], digits=3)
ROWS = Dataset.from_dict(
    {
        "text": [f"text {i}" for i in range(10)], "context": ["c"] * 10, "response": [f"said {i}" for i in range(10)],
        "label": ["x"] * 10, "poisoned": [False] * 10,
    }
)  # fmt: skip


def test_each_secret_takes_the_place_of_as_many_rows_as_it_is_to_repeat():
    made = planted(ROWS, ASKED, seed=4)
    secrets = canaries_of(ASKED, 4)
    assert len(made) == 10
    assert [made["text"][:].count(secret.question) for secret in secrets] == [1, 3, 2]
    for row, before in zip(made.to_list(), ROWS.to_list(), strict=True):
        secret = next((s for s in secrets if s.question == row["text"]), None)
        assert row == (before if secret is None else {"text": secret.question, "context": "", "response": secret.secret,
                                                      "label": "", "poisoned": False})  # fmt: skip
    assert made.features == ROWS.features


def test_secrets_are_different_numbers_of_single_digits_drawn_by_the_seed():
    secrets = canaries_of(ASKED, 4)
    assert canaries_of(ASKED, 4) == secrets != canaries_of(ASKED, 5)
    assert len({s.secret for s in secrets}) == len({s.question for s in secrets}) == 3
    assert all([len(digit) for digit in s.secret.split(" ")] == [1, 1, 1] for s in secrets)
    assert guesses(ASKED)[7] == "0 0 7"
    assert len(set(guesses(ASKED))) == 1000
    assert all(s.secret in guesses(ASKED) for s in secrets)


def test_more_secrets_than_rows_are_an_error():
    with pytest.raises(RecipeError, match=r"\[6, 5\] are 11 rows, client 0 has 10"):
        planted(ROWS, Canaries(repetitions=[6, 5]), seed=0)


@pytest.mark.parametrize(
    ("data", "clients", "words"),
    [
        ({}, [0], "no secrets are planted. Add data.canaries"),
        ({"canaries": {"client": 1}}, [0], "the secrets are client 1's"),
        ({"canaries": {"client": 4}}, [0], "data.canaries.client: 4 is not one of the clients 0 to 3"),
    ],
)
def test_secrets_that_nobody_could_find_are_told(small: dict[str, Any], data: Any, clients: list[int], words: str):
    small["data"] |= data
    small["attack"] = {"privacy": [{"name": "canary"}], "observe": {"clients": clients}}
    with pytest.raises(RecipeError, match=words):
        checked(small)
