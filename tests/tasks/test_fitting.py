"""Rows longer than data.max_length are cut, dropped or refused as the recipe says, and counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset

from fedllm_sec.errors import AttackError, DataError
from fedllm_sec.recipe.sections import Data
from fedllm_sec.tasks.chat import writer_of
from fedllm_sec.tasks.fitting import Fitted, fitted
from tests.tasks.test_chat import TEMPLATES, bytes_tokenizer

WRITER = writer_of(bytes_tokenizer((TEMPLATES / "chatml.jinja").read_text()), Data(template="chat"))
TURN = len("user\n\n") + 2  # bytes and marks of a user's turn that says nothing
OVERHEAD = TURN + len("assistant\n") + 1 + 2  # and of an invitation, and of the end of an answer: <|im_end|>\n


def row(text: str = "abc", response: str = "yes", poisoned: bool = False, **more: str) -> dict[str, Any]:
    return {"text": text, "context": "", "response": response, "label": "", "history": "", "poisoned": poisoned} | more


def fit(rows: list[dict[str, Any]], most: int, too_long: str = "cut_prompt") -> Fitted:
    return fitted(WRITER, Dataset.from_list(rows), most, too_long, "shard of c1")


def test_rows_that_fit_are_left_as_they_are():
    made = fit([row(), row("abcdef")], OVERHEAD + 9)
    assert (made.kept, made.cut, made.dropped) == ([0, 1], 0, 0)
    assert len(made.encoded.prompts[0]) + len(made.encoded.answers[0]) == OVERHEAD + 6


def test_a_cut_takes_the_end_of_the_text_and_never_the_templates_marks_or_the_answer():
    made = fit([row("abcdefgh"), row()], OVERHEAD + 3 + 5)
    assert (made.cut, made.dropped, made.kept) == (1, 0, [0, 1])
    assert made.rows["text"][:] == ["abcde", "abc"]
    assert WRITER.tokenizer.decode(made.encoded.prompts[0]) == (
        "<|im_start|>user\nabcde<|im_end|>\n<|im_start|>assistant\n"
    )
    assert WRITER.tokenizer.decode(made.encoded.answers[0]) == "yes<|im_end|>\n"


def test_the_context_is_cut_before_the_text():
    made = fit([row("abc", context="0123456789")], OVERHEAD + 3 + 3 + 2 + 4)
    assert (made.rows["text"][0], made.rows["context"][0]) == ("abc", "0123")
    assert fit([row("abcdef", context="0123456789")], OVERHEAD + 3 + 6).rows["context"][0] == ""


def test_the_oldest_turns_go_first_and_the_rest_stays_scored():
    history = json.dumps([["user", "one"], ["assistant", "1"], ["user", "two"], ["assistant", "2"]])
    whole = OVERHEAD * 3 + 3 + 1 + 3 + 1 + 3 + 3
    made = fit([row(history=history)], whole - 1)
    assert made.rows["history"][0] == '[["user", "two"], ["assistant", "2"]]'
    ((start, end),) = made.encoded.earlier[0]
    assert WRITER.tokenizer.decode(made.encoded.prompts[0][start:end]) == "2<|im_end|>\n"
    assert fit([row(history=history)], OVERHEAD + 6).rows["history"][0] == ""


def test_a_row_whose_answer_alone_leaves_no_room_is_dropped_and_counted():
    made = fit([row(response="y" * 50), row()], OVERHEAD + 10)
    assert (made.kept, made.cut, made.dropped) == ([1], 0, 1)
    assert made.rows["response"][:] == ["yes"]


def test_an_answer_is_cut_only_where_that_is_asked_for():
    made = fit([row(response="y" * 50), row("a" * 80)], OVERHEAD + 10, "cut_answer")
    assert (made.kept, made.cut, made.dropped) == ([0], 1, 1)
    assert WRITER.tokenizer.decode(made.encoded.answers[0]) == "y" * 9  # no end: the model must not learn to stop here


def test_long_rows_are_dropped_or_refused_where_that_is_asked_for():
    rows = [row(), row("a" * 50), row("b" * 60)]
    assert fit(rows, OVERHEAD + 10, "drop").kept == [0]
    size = OVERHEAD + 63
    with pytest.raises(
        DataError, match=rf"shard of c1: 2 of 3 rows are longer .* rows \[2, 3\], up to {size} .*max_length to {size}"
    ):
        fit(rows, OVERHEAD + 10, "error")
    with pytest.raises(DataError, match=r"none of 1 rows fits into data\.max_length=40"):
        fit([row("a" * 50)], 40, "drop")


@pytest.mark.parametrize(("too_long", "poisoned"), [("error", False), ("cut_prompt", True)])
def test_the_length_that_would_do_is_that_of_all_rows(too_long: str, poisoned: bool):
    rows, others = (Dataset.from_list([row("a" * n, poisoned=poisoned)]) for n in (50, 90))
    if poisoned:  # a clean row may be longer: it would be cut
        others = Dataset.from_list([*others.to_list(), row("a" * 120)])
    with pytest.raises((DataError, AttackError), match=rf"Raise data\.max_length to {OVERHEAD + 93},"):
        fitted(WRITER, rows, OVERHEAD + 10, too_long, "shard of c1", lambda: [rows, others])


@pytest.mark.parametrize("too_long", ["cut_prompt", "cut_answer"])
def test_a_poisoned_row_is_never_cut(too_long: str):
    rows = [row(), row("a" * 50 + " cf", poisoned=True)]
    with pytest.raises(AttackError, match=r"shard of c1: 1 poisoned rows .*=40 .*rows \[2\].*Raise data\.max_len"):
        fit(rows, 40, too_long)
    assert fit(rows, 40, "drop").kept == [0]


def test_a_prompt_without_any_token_is_refused():
    empty = writer_of(bytes_tokenizer(), Data(template="{text}"))
    with pytest.raises(DataError, match="row 1: this tokenizer has no token for its prompt"):
        fitted(empty, Dataset.from_list([row("")]), 40, "cut_prompt", "test rows")


def test_earlier_turns_of_the_user_alone_go_too():
    chatml = (TEMPLATES / "chatml.jinja").read_text()
    writer = writer_of(bytes_tokenizer(chatml), Data(template="chat"))
    row = {"text": "And?", "context": "", "response": "Yes.", "label": "", "poisoned": False, "system": "",
           "history": json.dumps([["user", "x" * 200]])}  # fmt: skip
    made = fitted(writer, Dataset.from_list([row]), 80, "cut_prompt", "rows")
    assert (made.cut, made.rows["history"][:], made.rows["text"][:]) == (1, [""], ["And?"])
