"""What a run calls held out is not what it trains on: overlap is counted and said, and where it is total an error."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from fedllm_sec.build.federation import build
from fedllm_sec.build.names import checked
from fedllm_sec.build.text import load_rows, rows_in_words
from fedllm_sec.errors import DataError
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.recipe.sections import TextRecipe
from fedllm_sec.rounds.compute import Machine

CASES = Path(__file__).parents[1] / "data" / "cases"


def recipe(folder: Path, train: list[str], test: list[str], **data: object) -> TextRecipe:
    for part, texts in (("train", train), ("test", test)):
        lines = [json.dumps({"text": text, "response": "r"}) for text in texts]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    return TextRecipe.model_validate({"data": {"name": str(folder), **data}})


def test_rows_that_are_in_both_are_counted_and_said(tmp_path: Path):
    made = recipe(tmp_path, ["a", "b", "c", "c"], ["c", "d", "c"])
    with pytest.warns(UserWarning, match="2 of 3 test rows are training rows too"):
        load_rows(made)
    assert rows_in_words(made)[0][2:] == [
        "4 training rows, 3 held-out rows",
        f"data: {tmp_path}: 2 of 3 test rows are training rows too: what is measured on those is not held out.",
    ]


def test_a_test_set_that_is_all_training_rows_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="all 2 test rows are training rows too, so nothing is held out"):
        load_rows(recipe(tmp_path, ["a", "b", "c"], ["c", "a"]))


def test_tables_that_are_apart_say_nothing(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, test = load_rows(recipe(tmp_path, ["a", "b", "c"], ["d"], train_rows=2))
    assert (len(train), len(test)) == (2, 1)


def test_the_split_of_one_file_is_explained_in_words():
    made = TextRecipe.model_validate({"data": {"name": str(CASES / "bool_answers.jsonl"), "test_share": 0.25}})
    assert rows_in_words(made)[0] == [
        f"{CASES / 'bool_answers.jsonl'}: one table, of whose texts a share of 0.25, drawn by the seed, is held out",
        "format: columns, found by the columns",
        "30 training rows, 10 held-out rows",
    ]


def test_data_that_cannot_be_read_are_explained_as_such():
    made = TextRecipe.model_validate({"data": {"name": "/nowhere/t.csv"}})
    assert rows_in_words(made)[0][0].startswith("cannot be read: data.name: /nowhere/t.csv: no such folder or file")


def test_root_rows_that_clients_hold_as_well_are_counted(tmp_path: Path, small: dict[str, Any]):
    made = recipe(tmp_path, ["a", "b", "c", "d"] * 5, ["e", "f"])
    raw = recipes.merge(small, {"enable_attack": False, "defense": {"root_rows": 4, "rule": {"name": "fltrust"}}})
    raw["data"] = made.data.model_dump()
    with pytest.warns(UserWarning, match="defense.root_rows: 4 of 4 root rows are rows of clients too"):
        build(checked(raw), Machine(Accelerator(cpu=True)))
