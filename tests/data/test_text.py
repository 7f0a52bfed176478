"""Any table becomes clean rows; what is missing, broken, renamed in vain or short of a column is named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fedllm_sec.data import text
from fedllm_sec.data.tables import Table, of_dataset
from fedllm_sec.data.text import canonical, load_rows, load_table, numbers, renamed
from fedllm_sec.errors import DataError
from fedllm_sec.recipe.classifier import LabelColumns
from fedllm_sec.recipe.sections import Columns, Data

CASES = Path(__file__).parent / "cases"
ROWS = [{"q": "what is up?", "a": "the sky", "c": "x"}, {"q": "and down?", "a": "the sea", "c": "y"}]
COLUMNS = Columns(text="q", response="a", label="c")


def table(rows: list[dict[str, Any]], place: str = "here") -> Table:
    return of_dataset(Dataset.from_list(rows), place)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_local_files_of_four_kinds_give_the_same_rows(tmp_path: Path, kind: str):
    path = tmp_path / f"train.{kind}"
    made = Dataset.from_list(ROWS)
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        made.to_csv(str(path))
    else:
        made.to_parquet(str(path))
    for name, split in ((str(tmp_path), "train"), (str(tmp_path), path.name), (str(path), "train")):
        found = load_table(name, None, split, 0)
        assert [{n: found.text(n)[i] for n in found.names} for i in range(found.size)] == ROWS


def test_columns_are_mapped_renamed_and_cut():
    rows = renamed([canonical(table(ROWS), COLUMNS, text_chars=4)], {"x": "up", "the sea": "sea"})[0]
    assert text.as_dataset(rows)[0] == {
        "text": "what", "context": "", "response": "the sky", "label": "up", "poisoned": False
    }  # fmt: skip
    assert rows["response"] == ["the sky", "sea"]


def test_integer_labels_are_text_and_are_renamed_in_answers_and_labels_alike():
    both = {"response": "label", "label": "label"}
    train, test = quietly(Data(name=str(CASES / "int_labels.csv"), columns=both, rename={0: "World", 1: "Sports"}))
    assert set(train["label"]) == {"World", "Sports", "2"}
    assert train["label"][:] == train["response"][:]
    assert test["label"][:] == test["response"][:]


def test_truth_values_are_spelled_as_in_the_file_and_can_be_asked_for():
    name = str(CASES / "bool_answers.jsonl")
    train, test = load_rows(Data(name=name, train_where={"response": True}, test_where={"response": False}), 0)
    assert set(train["response"]) == {"true"}
    assert set(test["response"]) == {"false"}


def test_codes_keep_their_zeros():
    train, _ = quietly(Data(name=str(CASES / "padded_codes.csv")))
    assert train["response"][:2] == ["00000", "00037"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rename": {"Nope": "X"}}, 'data.rename: no answer and no label is "Nope".* Known: false, true'),
        ({"rename": {"Is 0 even?": "X"}}, "nothing to rename"),
        ({"config": "en"}, "data.config: en: names a part of a hub set"),
        ({"columns": {"text": "txt"}}, 'data.columns.text: .* has no column "txt". Did you mean "text"'),
        ({"train_where": {"response": "maybe"}, "test_where": {"response": True}}, 'no row has response = "maybe"'),
    ],
)
def test_a_data_setting_that_cannot_act_is_an_error(changes: dict[str, Any], words: str):
    with pytest.raises(DataError, match=words):
        load_rows(Data(name=str(CASES / "bool_answers.jsonl"), **changes), 0)


def test_an_encoding_is_for_text_files():
    for name in ("builtin:topic", "some/set"):
        with pytest.raises(DataError, match=r"data\.encoding: latin-1: is for text files"):
            load_table(name, None, "train", 0, "latin-1")


def load_bad(tmp_path: Path, name: str, content: str | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    canonical(load_table(str(path), None, "train", 0), COLUMNS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "no such"),
        ("bad.jsonl", '{"q": "x"\n{"', "cannot be read"),
        ("odd.txt", "x", 'the ending ".txt"; can read'),
        ("short.jsonl", '{"q": "x", "c": "1"}', 'no column "a"'),
        (
            "blank.jsonl",
            '{"q": "x", "a": "y"}\n{"q": "x", "a": " ", "c": "1"}',
            r"row 2: empty response \(column \"a\"\)",
        ),
        ("zero.jsonl", "", "zero rows"),
        ("none.json", "[]", "zero rows"),
        ("head.csv", "q,a,c\n", "zero rows"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | None, words: str):
    if name == "blank.jsonl":
        content = content.replace('"y"}', '"y", "c": "1"}') if content else None
    with pytest.raises(DataError, match=words):
        load_bad(tmp_path, name, content)


def test_a_classifiers_row_without_a_class_is_said_to_have_an_empty_label():
    with pytest.raises(DataError, match=r'here, row 2: empty label \(column "c"\), as in 1 rows of 2'):
        canonical(table([*ROWS[:1], {**ROWS[1], "c": " "}]), LabelColumns(text="q", label="c"))


def test_a_folder_without_the_split_lists_what_is_there(tmp_path: Path):
    (tmp_path / "training.jsonl").write_text(json.dumps(ROWS[0]))
    for split in ("train", "train.jsonl"):
        with pytest.raises(DataError, match=r"training\.jsonl"):
            load_table(str(tmp_path), None, split, 0)


def test_a_column_typo_gets_a_suggestion():
    made = table([{"instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match='Did you mean "instruction"'):
        canonical(made, Columns(text="instrution", response="output"))


def test_the_numbers_of_kinds_are_in_their_order():
    assert numbers(["b", "a", "b\0", "b"]).tolist() == [1, 0, 2, 1]


# ---------------------------------------------------------------- training and held-out rows


def quietly(data: Data, seed: int = 0) -> tuple[Dataset, Dataset]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_rows(data, seed)


def a_file(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": t, "response": "r"}) + "\n" for t in texts))
    return str(path)


def test_one_file_is_split_by_the_seed_into_rows_that_are_apart(tmp_path: Path):
    name = a_file(tmp_path / "t.jsonl", [f"t{i}" for i in range(100)])
    with pytest.warns(
        UserWarning, match=r"is training and test set: 10% of its texts, drawn by the seed, are held out"
    ):
        train, test = load_rows(Data(name=name), 0)
    assert (len(train), len(test)) == (90, 10)
    assert set(train["text"]).isdisjoint(test["text"])
    assert quietly(Data(name=name))[1]["text"][:] == test["text"][:]
    assert quietly(Data(name=name), seed=1)[1]["text"][:] != test["text"][:]


def test_a_share_that_is_asked_for_is_held_out_without_a_word(tmp_path: Path):
    name = a_file(tmp_path / "t.jsonl", [f"t{i}" for i in range(100)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, test = load_rows(Data(name=name, test_share=0.25), 0)
    assert (len(train), len(test)) == (75, 25)


def test_a_text_that_stands_twice_is_on_one_side_only(tmp_path: Path):
    train, test = quietly(Data(name=a_file(tmp_path / "t.jsonl", ["a", "b", "c"] * 30), test_share=0.3))
    assert (len(train), len(test)) == (60, 30)
    assert set(train["text"]).isdisjoint(test["text"])


def test_the_same_file_named_in_two_ways_is_one_table(tmp_path: Path):
    a_file(tmp_path / "t.jsonl", ["a", "b"])
    train, test = quietly(Data(name=str(tmp_path), train="t", test="./t.jsonl"))
    assert {*train["text"], *test["text"]} == {"a", "b"}
    assert len(train) == len(test) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_where": {"text": "a"}}, "only one part is chosen from it. Give both"),
        ({"test_where": {"text": "a"}, "test_share": 0.5}, "data.test_share: 0.5: .* nothing is drawn"),
        ({"test": "other.jsonl"}, 'data.test: "other.jsonl" names a file of a folder .* but data.name is the file'),
        ({"test_where": {"text": "a"}, "train_where": {"text": "b"}, "test_share": 0.5}, "choose the rows"),
    ],
)
def test_settings_of_the_split_that_cannot_act_are_errors(tmp_path: Path, changes: dict[str, Any], words: str):
    with pytest.raises(DataError, match=words):
        load_rows(Data(name=a_file(tmp_path / "t.jsonl", ["a", "b"]), **changes), 0)


def test_a_share_of_two_tables_cannot_be_drawn(tmp_path: Path):
    for part in ("train", "test"):
        a_file(tmp_path / f"{part}.jsonl", [part])
    with pytest.raises(DataError, match="training and test rows are two tables, so nothing is drawn"):
        load_rows(Data(name=str(tmp_path), test_share=0.5), 0)


def test_a_table_of_one_text_cannot_be_split(tmp_path: Path):
    with pytest.raises(DataError, match="all 3 rows have one text"):
        quietly(Data(name=a_file(tmp_path / "t.jsonl", ["a", "a", "a"])))
