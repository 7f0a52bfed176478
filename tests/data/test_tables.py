"""Every value of a column has one spelling, and tables of any text come back equal or are refused in one line."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedllm_sec.data.files import read_file
from fedllm_sec.data.formats import is_blank
from fedllm_sec.data.tables import as_text, of_arrow, of_dataset
from fedllm_sec.data.text import canonical
from fedllm_sec.errors import DataError
from fedllm_sec.recipe.sections import Columns


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (" as it is\n", " as it is\n"),
        (True, "true"),
        (np.bool_(False), "false"),
        (7, "7"),
        (1152921504606846977, "1152921504606846977"),
        (0.1, "0.1"),
        (np.float32(0.1), "0.1"),
        (float("nan"), ""),
        (Decimal("1.50"), "1.50"),
        (datetime.date(2020, 1, 2), "2020-01-02"),
        (datetime.datetime(2020, 1, 2, 3, 4), "2020-01-02 03:04:00"),
        (b"bytes", "bytes"),
        (["a", 1, None, True], '["a", 1, null, true]'),
        ({"k": [datetime.date(2020, 1, 2)]}, '{"k": ["2020-01-02"]}'),
    ],
)
def test_a_value_has_one_spelling(value: Any, text: str):
    assert as_text(value) == text


LABELS = Features({"text": Value("string"), "label": ClassLabel(names=["World", "Sports"])})


def test_class_labels_are_their_names_from_the_hub_and_from_parquet(tmp_path: Path):
    made = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=LABELS)
    made.to_parquet(str(tmp_path / "t.parquet"))
    for table in (of_dataset(made, "hub"), read_file(tmp_path / "t.parquet")):
        assert table.text("label") == ["Sports", "World", ""]


def test_a_class_number_without_a_name_is_named():
    table = of_arrow(pa.table({"label": [0, 2]}), {"label": ["World", "Sports"]}, "here")
    with pytest.raises(DataError, match=r'here, row 2: column "label" holds the class number 2, .* 2 class names'):
        table.text("label")


def test_parquet_columns_of_all_types_are_text(tmp_path: Path):
    made = pa.table(
        {
            "int": pa.array([1, None], pa.int64()),
            "float": pa.array([0.1, None], pa.float32()),
            "bool": [True, None],
            "date": pa.array([datetime.date(2020, 1, 2), None]),
            "category": pa.array(["x", None]).dictionary_encode(),
            "list": [["a", "b"], None],
        }
    )
    parquet.write_table(made, tmp_path / "t.parquet")
    table = read_file(tmp_path / "t.parquet")
    assert [table.text(name)[0] for name in table.names] == ["1", "0.1", "true", "2020-01-02", "x", '["a", "b"]']
    assert all(table.text(name)[1] == "" for name in table.names)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"\xff\xd8\xff", "bytes that are not UTF-8"),
        ([{"role": "user", "content": "hi"}], "conversations"),
        ([{"from": "human", "value": "hi"}], "conversations"),
        (object(), "of kind object"),
    ],
)
def test_a_value_that_is_no_text_says_what_it_is(value: Any, words: str):
    with pytest.raises(ValueError, match=words):
        as_text(value)


def test_lists_of_the_hub_are_text_and_pictures_are_refused():
    features = Features({"text": Sequence(Value("string")), "picture": {"bytes": Value("binary")}})
    table = of_dataset(Dataset.from_dict({"text": [["a", "b"]], "picture": [{"bytes": b"\xff"}]}, features), "hub")
    assert table.text("text") == ['["a", "b"]']
    with pytest.raises(DataError, match='hub, row 1: column "picture" holds bytes'):
        table.text("picture")


# ---------------------------------------------------------------- any table

ODD = [
    "\u200b",
    "\u202e",
    "שלום",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "\ufeff",
    "\0",
    "\r\n",
    "\u2028",
    '"',
    ";",
    ",",
    "\t",
    "\\",
]
cells = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from([*ODD, "a", " "]), max_size=6).map("".join),
    st.sampled_from(["00037", "NA", "null", "None", "true", "2020-01-02", "1e5", "100000", "sep=;", "-", "=1+1"]),
)
values = st.one_of(cells, st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False))
BIG = "word " * 200_000


def written(value: Any) -> str:
    """What a value must come out as."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def check(path: Path, rows: list[tuple[Any, Any]]) -> None:
    """The rows are read equal; those with a row that has no text or no answer are refused in words."""
    expected = [(written(text), written(answer)) for text, answer in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if any(is_blank(part) for row in expected for part in row):
            with pytest.raises(DataError, match=r"empty (text|response)"):
                canonical(read_file(path), Columns())
            return
        found = canonical(read_file(path), Columns())
    assert list(zip(found["text"], found["response"], strict=True)) == expected


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@example([("x", BIG)])
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=5))
def test_any_csv_table_is_read_equal_or_refused(tmp_path: Path, rows: list[tuple[str, str]]):
    rows = [row for row in rows if any(cell.strip() for cell in row)] or [("x", "y")]  # blank lines are no rows
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("text", "response"), *rows])
    (tmp_path / "t.csv").write_text(out.getvalue(), encoding="utf-8", newline="")
    if any("\0" in cell for row in rows for cell in row):
        with pytest.raises(DataError, match=r"holds a NUL character"):
            read_file(tmp_path / "t.csv")
        return
    check(tmp_path / "t.csv", rows)


@quick
@example([("x", BIG)])
@given(st.lists(st.tuples(values, values), min_size=1, max_size=5))
def test_any_json_table_is_read_equal_or_refused(tmp_path: Path, rows: list[tuple[Any, Any]]):
    objects = [json.dumps({"text": text, "response": answer}, ensure_ascii=False) for text, answer in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(objects), encoding="utf-8")
    check(tmp_path / "t.jsonl", rows)


@quick
@given(st.lists(st.tuples(cells, st.none() | st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=5))
def test_any_parquet_table_is_read_equal_or_refused(tmp_path: Path, rows: list[tuple[str, int | None]]):
    table = pa.table({"text": [r[0] for r in rows], "response": pa.array([r[1] for r in rows], pa.int64())})
    parquet.write_table(table, tmp_path / "t.parquet")
    check(tmp_path / "t.parquet", rows)


@quick
@given(st.binary(max_size=60), st.sampled_from([".csv", ".json", ".jsonl", ".tsv", ".parquet", ".csv.gz"]))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, ending: str):
    path = tmp_path / f"t{ending}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(DataError):
            table = read_file(path)
            assert all(len(table.text(name)) == table.size for name in table.names)
