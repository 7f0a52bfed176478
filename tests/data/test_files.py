"""A file of a table is read as it is written, or refused with its place, its row, the reason and a way out."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import warnings
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from fedllm_sec.data.files import read_file
from fedllm_sec.data.tables import Table
from fedllm_sec.data.text import load_table
from fedllm_sec.errors import DataError

CASES = Path(__file__).parent / "cases"


def table(path: Path, content: str | bytes, encoding: str | None = None) -> Table:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_file(path, encoding)


def columns(table: Table) -> dict[str, list[str]]:
    return {name: table.text(name) for name in table.names}


TWICE = gzip.compress(gzip.compress(b"a,b\nx,y\n", mtime=0), mtime=0)  # the same bytes on every day
CODES = ["00037", "NA", "null", "None", "nan", "2020-01-02", "100000", "1e5", "1.0", "1152921504606846977", "TRUE"]


def test_a_csv_file_is_read_without_guessing(tmp_path: Path):
    lines = "\n".join(f"q{i},{code}" for i, code in enumerate(CODES))
    assert table(tmp_path / "t.csv", f"text,response\n{lines}\n").text("response") == CODES


def test_a_json_file_is_read_without_guessing(tmp_path: Path):
    numbers = ["100000", "1e5", "1.0", "-0", "1152921504606846977", "0.1000000000000000055511151231257827"]
    strings = ["00037", "NA", "null", "2020-01-02", "100000"]
    values = [*numbers, *(json.dumps(s) for s in strings), "true", "false", "null", "NaN", '[1.0, "é", {"a": null}]']
    lines = "\n".join(f'{{"a": {value}}}' for value in values)
    expected = [*numbers, *strings, "true", "false", "", "", '[1.0, "é", {"a": null}]']
    assert table(tmp_path / "t.jsonl", lines).text("a") == expected
    assert table(tmp_path / "t.json", f"[{', '.join(lines.splitlines())}]").text("a") == expected


def test_a_key_that_a_row_lacks_is_a_missing_value(tmp_path: Path):
    assert columns(table(tmp_path / "t.jsonl", '{"a": 1}\n\n{"b": 2, "a": 3}\n')) == {"a": ["1", "3"], "b": ["", "2"]}


@pytest.mark.parametrize(
    "content",
    [
        "a,b\nx,y\n",
        "a,b\r\nx,y\r\n",
        "a,b\rx,y\r",
        "\n\na,b\n\n  \nx,y\n,\n\n",  # blank lines, and a row of blank cells
        "a;b\nx;y",
        "a\tb\nx\ty",
        "a|b\nx|y",
        "sep=;\na;b\nx;y",
        "a, b\nx, y",
        ' a ,b\nx,"y"',
        ",a,b\n0,x,y\n",  # the numbers that pandas writes in front
        "a,b,\nx,y,\n",
    ],
)
def test_one_row_of_csv_in_many_manners_is_the_same_row(tmp_path: Path, content: str):
    assert columns(table(tmp_path / "t.csv", content)) == {"a": ["x"], "b": ["y"]}


def test_a_separator_in_the_text_is_not_taken_for_the_separator(tmp_path: Path):
    rows = '"one; two; three",1\n"four; five",2\n'
    assert table(tmp_path / "t.csv", f"text,response\n{rows}").text("text") == ["one; two; three", "four; five"]
    rows = "one, two, three;1\nfour, five;2\n"
    assert table(tmp_path / "t.csv", f"text;response\n{rows}").text("text") == ["one, two, three", "four, five"]


def test_a_quoted_cell_keeps_line_ends_quotes_and_blanks(tmp_path: Path):
    assert table(tmp_path / "t.csv", 'a,b\n" x\r\n""y""\u2028 ",1\n').text("a") == [' x\r\n"y"\u2028 ']


def test_what_was_found_about_a_csv_file_is_said():
    for name, words in (("semicolon.csv", "separated by ';'"), ("header_spaces.csv", "blanks behind ',' are left out")):
        with pytest.warns(UserWarning, match=words):
            found = read_file(CASES / name)
        assert found.names == ("text", "response")
        assert found.text("response")[0] in ("room 0", "red")


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + "a,b\né,y\n".encode(),
        "a,b\né,y\n".encode("utf-16"),
        codecs.BOM_UTF16_BE + "a,b\né,y\n".encode("utf-16-be"),
        "a,b\né,y\n".encode("utf-32"),
        gzip.compress("a,b\né,y\n".encode(), mtime=0),
        gzip.compress(codecs.BOM_UTF8 + "a,b\né,y\n".encode(), mtime=0),
    ],
)
def test_byte_order_marks_and_gzip_are_understood_in_any_text_file(tmp_path: Path, content: bytes):
    for name in ("t.csv", "t.csv.gz", "T.CSV"):
        assert columns(table(tmp_path / name, content)) == {"a": ["é"], "b": ["y"]}


def test_an_encoding_is_a_setting_and_without_it_the_line_is_named():
    with pytest.raises(DataError, match=r"latin1\.csv, line 2: byte 0xea is not utf-8 text\. Set data\.encoding"):
        read_file(CASES / "latin1.csv")
    assert read_file(CASES / "latin1.csv", "latin-1").text("response")[0] == "the café"
    for name in ("klingon", "hex", "nope\0"):
        with pytest.raises(DataError, match=r"data\.encoding: .* no such text encoding"):
            read_file(CASES / "latin1.csv", name)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "a,b\nx,y\nx\n", r"t\.csv, row 2 \(line 3\) has 1 cells, the head has 2"),
        ("t.csv", "a,b\nx,y,z\n", r"row 1 \(line 2\) has 3 cells.*stands in quotes"),
        ("t.csv", 'a,b\nx,"y\nz,w\n', r"line 2: a quote is opened and never closed"),
        ("t.csv", 'a,b\n"x" z,y\n', r"line 2: a quoted cell is not as CSV writes it"),
        ("t.csv", "a,a\nx,y\n", '2 columns are called "a"'),
        ("t.csv", "a,b\nx,y\n".encode("utf-16-le"), "Is it UTF-16"),
        ("t.csv.gz", gzip.compress(b"a,b\nx,y\n", mtime=0)[:-9], "cannot be unpacked by gzip"),
        ("t.csv.gz", TWICE, r"t\.csv\.gz is packed by gzip, and .* once more"),
        ("t.csv", "", "zero rows"),
        ("t.csv", "\ufeff \n", "zero rows"),
        ("t.json", '{"a": 1}\n{"a" 2}', r"cannot be read as json \(line 2, column 6"),
        ("t.json", '[{"a": 1}, 5]', "row 2: 5: must be an object"),
        ("t.json", '{"a": 1, "a": 2}', 'row 1: the key "a" is given twice'),
        ("t.json", "[" * 100_000, "nested too deeply"),
        ("t.parquet", "PAR1 and nothing", "cannot be read as parquet .* Copy it again"),
        ("t.parquet", "PARE", "it is encrypted.* Decrypt it first"),
        ("t.parquet", "text,label", "does not begin as one.* give it the ending of what it is"),
        ("t.xlsx", "x", r'the ending "\.xlsx"; can read \.jsonl'),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(tmp_path: Path, name: str, content: str | bytes, words: str):
    with pytest.raises(DataError, match=words):
        table(tmp_path / name, content)


def test_an_encoding_that_is_not_the_file_s_is_refused_or_said(tmp_path: Path):
    path, text = tmp_path / "t.csv", "text,response\nStraße,ja\n"
    for encoding, data, words in (
        (
            "utf-16-le",
            b"text,response\na,b\n",
            "utf-16-le: .* is UTF-8 text and begins with 'text,resp.*Remove data.enc",
        ),
        ("cp037", text.encode(), "cp037: .* is UTF-8 text and begins with"),
        (
            "cp037",
            text.encode("latin-1"),
            "cp037: read as this, .* has zero rows, and begins with .* remove it for UTF-8",
        ),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=words):
            read_file(path, encoding)
    path.write_bytes(text.encode())
    with pytest.warns(UserWarning, match=r"cp1252: .* is UTF-8 text too, in which 'ß' is read as 'ÃŸ'. Remove"):
        assert read_file(path, "cp1252").text("text") == ["StraÃŸe"]
    with pytest.raises(DataError, match=r"line 2: byte 0xc3 is not ascii text, and the file is UTF-8. Remove data.enc"):
        read_file(path, "ascii")
    for encoding in ("utf-16-le", "latin-1", "utf-8"):
        path.write_bytes(text.encode(encoding))
        assert read_file(path, encoding).text("text") == ["Straße"]


def test_half_a_character_is_named_with_its_row(tmp_path: Path):
    found = table(tmp_path / "t.jsonl", '{"a": "x"}\n{"a": "\\ud83d"}')
    with pytest.raises(DataError, match=r'row 2: column "a" holds half a character'):
        found.text("a")


def test_a_saved_set_and_the_parts_of_a_parquet_set_are_read(tmp_path: Path):
    made = Dataset.from_dict({"text": ["a", "b", "c"], "response": ["1", "2", "3"]})
    made.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=made, test=made.select([0])).save_to_disk(str(tmp_path / "two"))
    for k, rows in enumerate(([0], [1, 2])):
        made.select(rows).to_parquet(str(tmp_path / f"train-{k:05}-of-00002.parquet"))
    for name, split, wanted in (("one", "train", 3), ("two", "test", 1), ("two", "train", 3), (".", "train", 3)):
        table = load_table(str(tmp_path / name), None, split, 0)
        assert table.text("text") == ["a", "b", "c"][:wanted]
    (tmp_path / "over" / "hub").mkdir(parents=True)
    made.to_parquet(str(tmp_path / "over" / "hub" / "train-00000-of-00001.parquet"))
    with pytest.raises(DataError, match=r'no file for split "train", its folder hub has\. Name that\.'):
        load_table(str(tmp_path / "over"), None, "train", 0)
    (tmp_path / "train.csv").write_text("text,response\na,b\n")
    with pytest.raises(DataError, match=r"has train\.csv, train-00000-of-00002\.parquet for split"):
        load_table(str(tmp_path), None, "train", 0)
    (tmp_path / "train.csv").unlink()
    for unlike in ({"other": ["a"], "response": ["1"]}, {"text": [1], "response": ["1"]}, {"text": ["a"]}):
        Dataset.from_dict(unlike).to_parquet(str(tmp_path / "train-00001-of-00002.parquet"))
        with pytest.raises(
            DataError, match=r"train-00001-of-00002\.parquet has other columns than .* of another type: "
        ):
            load_table(str(tmp_path), None, "train", 0)
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"1 of 2 parts are missing, first train-00001-of-00002\.parquet"):
        load_table(str(tmp_path), None, "train", 0)
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be read as saved by datasets"):
        load_table(str(tmp_path / "one"), None, "train", 0)


FRAME = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": None}]


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table", "records"])
def test_json_is_read_as_pandas_writes_it(tmp_path: Path, orient: str):
    pd = pytest.importorskip("pandas")
    pd.DataFrame(FRAME).to_json(tmp_path / "t.json", orient=orient)
    table = read_file(tmp_path / "t.json")
    assert (table.text("text"), table.text("label")) == (["a", "b", "c"], ["x", "y", ""])


def test_columns_of_lists_are_a_table_and_one_object_is_a_row(tmp_path: Path):
    path = tmp_path / "t.json"
    path.write_text('{"text": ["a", "b"], "label": ["x", "y"]}')
    assert read_file(path).text("label") == ["x", "y"]
    path.write_text('{"text": "a", "label": "x"}')
    assert read_file(path).text("text") == ["a"]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in ({"messages": turns}, {"messages": turns, "tools": []}, {"text": "a", "tags": ["x", "y"]}):
        path.write_text(json.dumps(row))
        assert read_file(path).size == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 4}}', "nobody can tell rows from columns"),
        ('{"version": 2, "data": [{"text": "a"}, {"text": "b"}]}', '"data" holds a list of 2 objects'),
        ('{"data": [{"text": "a"}, {"text": "b"}]}', '"data" holds a list of 2 objects'),
        ('{"a": {"0": 1, "1": 2}, "b": {"0": 3}}', "nobody can tell rows from columns"),
        ('{"a": [1, 2], "b": [3]}', "lists of different lengths (a 2, b 1)"),
        ('{"columns": ["a", "b"], "data": [[1]]}', "row 1: [1]: must be a list of 2 values"),
        ('{"columns": ["a", "a"], "data": [[1, 2]]}', '2 columns are called "a"'),
        ('{"columns": [["a", 1]], "data": [[1]]}', 'the column name ["a", 1] is no text'),
        ('{"schema": {}, "data": [1]}', "row 1: 1: must be an object"),
        ('[["a", "x"], ["b", "y"]]', 'orient="records"'),
    ],
)
def test_json_that_may_mean_two_things_is_refused(tmp_path: Path, content: str, words: str):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(words)):
        read_file(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Run `git lfs pull`"),
        ("t.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Run `git lfs pull`"),
        ("t.csv", b"PK\x03\x04\x14\0\x06\0", r"as workbooks (.xlsx) are"),
        ("t.csv", b"PAR1\x15\x04", "Rename it to .parquet"),
        ("t.csv.gz", gzip.compress(b"PAR1\x15\x04", mtime=0), "Rename it to .parquet"),
        ("t.csv.gz", gzip.compress(b"t.csv".ljust(257, b"\0") + b"ustar\x0000", mtime=0), "is a tar archive"),
        ("t.jsonl", b"\n<!DOCTYPE html><html>", "is a web page"),
        ("t.json", b"\x80\x04\x95\x0b", "is a pickle, which is code and never read"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path: Path, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(words)):
        read_file(tmp_path / name)


def test_a_second_byte_order_mark_is_no_part_of_the_first_columns_name(tmp_path: Path):
    (tmp_path / "t.csv").write_bytes("\ufeff\ufefftext,label\na,x\n".encode())
    assert read_file(tmp_path / "t.csv").names == ("text", "label")


def test_ndjson_is_another_name_of_jsonl(tmp_path: Path):
    path = tmp_path / "rows.ndjson"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert list(read_file(path).column("text")) == ["a", "b"]


def test_a_nul_character_in_a_cell_is_refused_with_its_row(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,response\na,b\nc\0,d\n")
    with pytest.raises(DataError, match=r"row 2 \(line 3\) holds a NUL character"):
        read_file(path)


def test_a_file_in_utf_7_is_named_and_read_where_that_is_said(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,response\ncafé,1\n".encode("utf-7"))
    with pytest.warns(UserWarning, match="set data.encoding: utf-7"):
        read_file(path)
    assert read_file(path, "utf-7").column("text") == ["café"]
