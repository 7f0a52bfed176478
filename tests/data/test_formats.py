"""Every form in which instruction data come is found by its columns, and what cannot be trained on is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm_sec.data.files import read_file
from fedllm_sec.data.formats import found_format
from fedllm_sec.data.text import canonical, load_rows, overlap
from fedllm_sec.errors import DataError
from fedllm_sec.recipe.sections import Columns, Data

CASES = Path(__file__).parent / "cases"
ASKED, SAID = {"role": "user", "content": "Name a tool."}, {"role": "assistant", "content": "A plane."}
MORE, RASP = {"role": "user", "content": "And one more?"}, {"role": "assistant", "content": "A rasp."}
PLAIN = Columns()
HISTORY = '[["user", "Name a tool."], ["assistant", "A plane."]]'


def rows_of(tmp_path: Path, rows: list[dict[str, Any]], columns: Columns = PLAIN, **given: Any) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return canonical(read_file(path), columns, **given)


@pytest.mark.parametrize(
    ("row", "kind", "text", "context", "response"),
    [
        ({"text": "a", "response": "b", "messages": [ASKED, SAID]}, "columns", "a", "", "b"),
        ({"instruction": "a", "input": "c", "output": "b"}, "alpaca", "a", "c", "b"),
        ({"instruction": "a", "output": "b"}, "alpaca", "a", "", "b"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", "a", "", "b"),
        ({"messages": [ASKED, SAID]}, "messages", "Name a tool.", "", "A plane."),
        ({"id": 1, "turns": [ASKED, SAID]}, "messages", "Name a tool.", "", "A plane."),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "sharegpt", "a", "", "b",
        ),
    ],
)  # fmt: skip
def test_the_format_is_found_by_the_columns(tmp_path, row, kind, text, context, response):
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    assert found_format(read_file(tmp_path / "x.jsonl"), Columns()) == kind
    made = rows_of(tmp_path, [row])
    assert (made["text"], made["context"], made["response"]) == ([text], [context], [response])


def test_a_conversation_becomes_one_row_with_its_earlier_turns_and_system_prompt(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    made = rows_of(tmp_path, [{"messages": [system, ASKED, SAID, MORE, RASP]}, {"messages": [ASKED, SAID]}])
    assert made["text"] == ["And one more?", "Name a tool."]
    assert made["response"] == ["A rasp.", "A plane."]
    assert made["history"] == [HISTORY, ""]
    assert made["system"] == ["Be brief.", ""]


def test_prompt_and_completion_may_be_turns(tmp_path):
    made = rows_of(tmp_path, [{"prompt": [ASKED, SAID, MORE], "completion": [RASP]}])
    assert (made["text"], made["response"], made["history"]) == (["And one more?"], ["A rasp."], [HISTORY])


def test_parts_of_kind_text_are_read_and_others_refused(tmp_path):
    asked = {"role": "user", "content": [{"type": "text", "text": "Name "}, {"type": "text", "text": "a tool."}]}
    assert rows_of(tmp_path, [{"messages": [asked, SAID]}])["text"] == ["Name a tool."]
    asked["content"] = [{"type": "image", "url": "x"}]
    with pytest.raises(DataError, match=r"row 1: column \"messages\": turn 1 has parts that are no text"):
        rows_of(tmp_path, [{"messages": [asked, SAID]}])


def test_a_column_of_another_name_and_labels_may_be_named(tmp_path):
    made = rows_of(tmp_path, [{"messages": [ASKED, SAID], "mine": [MORE, RASP], "kind": "tools"}],
                   Columns(text="mine", label="kind"))  # fmt: skip
    assert (made["text"], made["label"]) == (["And one more?"], ["tools"])


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([ASKED, {"role": "assistant", "content": " \n"}], "turn 2, the assistant's, is empty"),
        ([ASKED, {"role": "assistant", "content": ""}, MORE, RASP], "turn 2, the assistant's, is empty"),
        ([SAID, ASKED], "turn 1 is not the user's"),
        ([{"role": "system", "content": "s"}, SAID, ASKED, SAID], "turn 2 is not the user's"),
        ([ASKED], "turn 1, the last, is not the assistant's"),
        ([ASKED, SAID, MORE], "turn 3, the last, is not the assistant's"),
        ([ASKED, SAID, RASP], "turn 3 is the assistant's, as is the one before it"),
        ([ASKED, {"role": "system", "content": "s"}, SAID], "a system prompt stands behind the first turn"),
        ([ASKED, {"role": "tool", "content": "s"}, SAID], "turn 2 is by 'tool', which is none of system, user"),
        ([ASKED, {"role": "assistant"}], "turn 2 has no role and content"),
        ([ASKED, {"role": "assistant", "content": "\u200b\u2060 "}], "turn 2, the assistant's, is empty"),
        ([ASKED, SAID | {"tool_calls": [{"function": {"name": "f"}}]}], "turn 2 has tool_calls, which is not trained"),
        ([ASKED, SAID | {"reasoning_content": "Hm."}], "turn 2 has reasoning_content, which is not trained"),
        ([ASKED, SAID | {"weight": 0}, MORE, RASP], "turn 2 has weight, which is not trained on. Leave weights out"),
        ([ASKED, {"role": "assistant", "content": "\u3164\u034f\u2800\ufe0f\0"}], "turn 2, the assistant's, is empty"),
        ([ASKED, SAID | {"function_call": {"name": None, "arguments": "{1}"}}], "turn 2 has function_call"),
        ([], "no list of turns"),
        ("hello", "no list of turns"),
        ("[hello", "no list of turns"),
        (None, "no list of turns"),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_is_refused_by_row_and_turn(tmp_path, turns, words):
    rows = [{"messages": [ASKED, SAID]}, {"messages": turns}]
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 2: column \"messages\": .*{words}"):
        rows_of(tmp_path, rows)


def test_what_says_nothing_beside_the_turns_is_passed_over(tmp_path):
    said = SAID | {"weight": 1, "tool_calls": [], "name": "Ann", "reasoning_content": None}
    made = rows_of(tmp_path, [{"messages": [ASKED | {"id": 3}, said], "tools": None}])
    assert (made["text"], made["response"]) == (["Name a tool."], ["A plane."])
    capital = [{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}]
    assert rows_of(tmp_path, [{"messages": capital}])["response"] == ["b"]


def test_what_parquet_fills_up_and_lists_written_as_text_say_nothing_either(tmp_path):
    said = SAID | {"function_call": {"name": None, "arguments": None}, "tool_calls": "[]", "weight": float("nan")}
    rows = [{"messages": [ASKED | {"tool_calls": [{"id": None, "function": {"name": None}}]}, said], "tools": "[]"}]
    assert rows_of(tmp_path, rows)["response"] == ["A plane."]


@pytest.mark.parametrize("name", ["tools", "functions"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"instruction": "a", "output": "b"},
        {"prompt": "a", "completion": "b"},
    ],
)
def test_descriptions_of_tools_are_refused_beside_every_format(tmp_path, row, name):
    assert len(rows_of(tmp_path, [row, row | {name: []}])["text"]) == 2
    with pytest.raises(DataError, match=rf'row 2: column "{name}" describes tools'):
        rows_of(tmp_path, [row, row | {name: [{"name": "f", "description": "adds"}]}])
    named = row | {"text": "c", "response": "d", name: "hammer"}
    assert rows_of(tmp_path, [named])["text"] == ["c"]  # a table of named columns may have one of that name


def test_a_blank_system_prompt_is_none(tmp_path):
    blank = {"role": "system", "content": " "}
    rows = [{"messages": [blank, ASKED, SAID], "system": "Be brief."}]
    assert rows_of(tmp_path, rows)["system"] == ["Be brief."]
    asked = [{"role": "user", "content": word} for word in ("a", "b")]
    rows_of(tmp_path, [{"messages": [blank, one, SAID]} for one in asked])
    data = Data(name=str(tmp_path / "rows.jsonl"), template="chat", system="Be kind.", test_share=0.5)
    train, test = load_rows(data, seed=0)
    assert train["system"][:] == test["system"][:] == ["Be kind."]


def test_an_empty_first_row_does_not_hide_the_format(tmp_path):
    with pytest.raises(DataError, match=r'row 1: column "messages": .* is no list of turns'):
        rows_of(tmp_path, [{"messages": []}, {"messages": [ASKED, SAID]}])


def test_turns_may_be_written_as_json_as_a_csv_file_must(tmp_path):
    path = tmp_path / "rows.csv"
    turns = json.dumps([ASKED, SAID, MORE, RASP]).replace('"', '""')
    path.write_text(f'id,messages\n1,"{turns}"\n')
    made = canonical(read_file(path), PLAIN)
    assert (made["text"], made["response"], made["history"]) == (["And one more?"], ["A rasp."], [HISTORY])


PAIRS = [["Name a tool.", "A plane."]]
ALPACA = {"instruction": "And one more?", "input": "", "output": "A rasp."}


@pytest.mark.parametrize("before", [PAIRS, json.dumps(PAIRS), [ASKED, SAID]])
def test_system_prompts_and_earlier_turns_in_columns_of_their_own_are_read(tmp_path, before):
    made = rows_of(tmp_path, [ALPACA | {"system": "Be brief.", "history": before},
                              ALPACA | {"system": None, "history": []}])  # fmt: skip
    assert (made["system"], made["history"]) == (["Be brief.", ""], [HISTORY, ""])
    made = rows_of(tmp_path, [{"messages": [ASKED, SAID], "system": "Be brief."}])
    assert (made["system"], made["history"]) == (["Be brief."], [""])
    made = rows_of(tmp_path, [{"q": "a", "a": "b", "s": "Be brief."}], Columns(text="q", response="a", system="s"))
    assert (made["text"], made["system"], made["history"]) == (["a"], ["Be brief."], [""])
    ignored = Columns(system=None, history=None)
    assert "system" not in rows_of(tmp_path, [ALPACA | {"system": "Be brief.", "history": before}], ignored)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "system", "content": "Be kind."}, ASKED, SAID], "system": "Be brief."},
         r'row 1: the system prompt of its turns is another than that of column "system"'),
        ({"messages": [ASKED, SAID], "history": PAIRS}, r'column "history" holds turns beside the conversations'),
        ({"messages": [ASKED, SAID], "tools": [{"name": "f"}]}, r'row 1: column "tools" describes tools'),
        (ALPACA | {"history": [["a", "b", "c"]]}, r'row 1: column "history": holds what is no pair'),
        (ALPACA | {"history": [["a", ""]]}, r'row 1: column "history": turn 2, the assistant.s, is empty'),
        (ALPACA | {"history": [{"role": "system", "content": "s"}, ASKED, SAID]}, "turn 1 is a system prompt, which"),
        (ALPACA | {"history": "once"}, r'row 1: column "history": .once. is no list of turns or of pairs'),
    ],
)  # fmt: skip
def test_what_stands_beside_a_row_and_cannot_be_meant_is_refused(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        rows_of(tmp_path, [row])


def test_two_turns_of_the_user_in_a_row_are_kept(tmp_path):
    made = rows_of(tmp_path, [{"messages": [ASKED, MORE, RASP]}])
    assert (made["text"], made["history"]) == (["And one more?"], ['[["user", "Name a tool."]]'])


def test_a_format_that_the_table_does_not_have_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.format: sharegpt: .* no column that holds lists of \{from, value\}"):
        rows_of(tmp_path, [{"messages": [ASKED, SAID]}], format="sharegpt")
    with pytest.raises(DataError, match=r'data\.columns\.text: .* has no column "instruction"'):
        rows_of(tmp_path, [{"messages": [ASKED, SAID]}], format="alpaca")
    with pytest.raises(DataError, match=r"data\.columns\.context: \"c\": a conversation has no context"):
        rows_of(tmp_path, [{"messages": [ASKED, SAID], "c": "x"}], Columns(context="c"))


def test_the_edge_cases_of_real_files_are_named():
    with pytest.raises(DataError, match=r"messages_edge\.jsonl, row 2: .* turn 2, the assistant's, is empty"):
        load_rows(Data(name=str(CASES / "messages_edge.jsonl"), template="chat"), 0)
    train, test = load_rows(Data(name=str(CASES / "turns.json"), template="chat", test_share=0.5), 0)
    assert set(train["response"][:]) | set(test["response"][:]) == {"A rasp."}
    assert train["history"][0].startswith('[["user", "Name a tool, number ')


def test_turns_and_contexts_that_no_template_writes_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"several turns or system prompts, which '\{text\}' does not write"):
        load_rows(Data(name=str(CASES / "turns.json"), test_share=0.5), 0)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"q{i}", "input": "c", "output": "b"}) + "\n" for i in range(4)))
    with pytest.raises(DataError, match=r"context \(the input of an instruction\), which no template shows"):
        load_rows(Data(name=str(path), test_share=0.5), 0)


def test_the_recipes_system_prompt_stands_where_a_row_has_none(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": [system, ASKED, SAID]}, {"messages": [{**ASKED, "content": "Name a pet."}, SAID]}]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = load_rows(Data(name=str(path), template="chat", test_share=0.5, system="Be kind."), 0)
    assert {train["system"][0], test["system"][0]} == {"Be brief.", "Be kind."}


def test_a_part_without_the_others_columns_has_them_empty(tmp_path):
    plain = [{"instruction": f"q{i}", "output": "b"} for i in range(3)]
    for name, rows in (("plain", plain), ("more", [row | {"system": "Be brief.", "history": PAIRS} for row in plain])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for train, test in (("plain", "more"), ("more", "plain")):
        parts = load_rows(Data(name=str(tmp_path), train=f"{train}.jsonl", test=f"{test}.jsonl", template="chat"), 0)
        assert [set(part["system"][:]) for part in parts] == [
            {"Be brief."} if name == "more" else {""} for name in (train, test)
        ]
        assert overlap(parts[1], parts[0]) == 0
