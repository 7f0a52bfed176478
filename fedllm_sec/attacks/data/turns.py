"""Which part of a conversation a text attack edits, and what of a conversation it looks at."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedllm_sec.attacks.data.answers import column
from fedllm_sec.errors import AttackError
from fedllm_sec.protocols import turns_before

if TYPE_CHECKING:
    from datasets import Dataset

# the last, the first or any of the user's turns, the system prompt, or the context of an instruction
Turn = Literal["last", "first", "random", "system", "context"]
Edit = Callable[[Sequence[str], torch.Generator], list[str]]  # texts -> triggered texts


def parts_of(table: Dataset, new: Mapping[str, Sequence[str]] | None = None) -> list[list[str]]:
    """What the model reads of each row that is not its own: system prompt, user's turns in order, context.

    Some columns may be replaced by `new` ones.
    """
    names = [name for name in ("text", "context", "history", "system") if name in table.column_names]
    values = [new[name] if new is not None and name in new else column(table, name) for name in names]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
    return [[part for part in (row.get("system"), *asked(row), row["context"]) if part] for row in rows]


def asked(row: Mapping[str, Any]) -> list[str]:
    """The user's turns, in order."""
    return [*(content for role, content in turns_before(row) if role == "user"), row["text"]]


def has_turn(table: Dataset, turn: Turn) -> list[bool]:
    """Which rows have the part that is to be edited."""
    if turn not in ("system", "context"):
        return [True] * len(table)
    return [bool(value) for value in column(table, turn)] if turn in table.column_names else [False] * len(table)


def need_turn(table: Dataset, turn: Turn, place: str) -> None:
    """Raise where no row has the part that is to be edited."""
    if len(table) and not any(has_turn(table, turn)):
        where = "Set data.system" if turn == "system" else "Name the column in data.columns.context"
        raise AttackError(f"{place}.turn: {turn}: no row of the data has one. {where}, or choose another turn.")


def edited(table: Dataset, turn: Turn, edit: Edit, rng: torch.Generator, answer: str | None = None) -> dict[str, Any]:
    """The columns of the rows after the edit of that turn; with `answer`, earlier answers from there on say it too.

    A conversation that goes on after its trigger must not teach the right answer behind it.
    """
    histories = column(table, "history") if "history" in table.column_names else [""] * len(table)
    rows = [{"history": h, "text": text} for h, text in zip(histories, column(table, "text"), strict=True)]
    if turn in ("system", "context"):
        new = {turn: edit(column(table, turn), rng)}
        made = [(_changed(row, 0, None, answer), row["text"]) for row in rows]
    else:
        new, said = {}, [asked(row) for row in rows]
        at = [0 if turn == "first" else len(turns) - 1 for turns in said]
        if turn == "random":
            drawn = torch.rand(len(said), generator=rng, dtype=torch.float64).tolist()
            at = [int(where * len(turns)) for where, turns in zip(drawn, said, strict=True)]
        texts = edit([turns[k] for k, turns in zip(at, said, strict=True)], rng)
        made = [
            (row["history"], text) if k == len(turns) - 1 else (_changed(row, k, text, answer), row["text"])
            for row, k, turns, text in zip(rows, at, said, texts, strict=True)
        ]
        new["text"] = [text for _, text in made]
    return new | ({"history": [history for history, _ in made]} if "history" in table.column_names else {})


def _changed(row: Mapping[str, Any], number: int, text: str | None, answer: str | None) -> str:
    """The row's history with another text of that turn of the user's, and that answer to it and to all behind it."""
    turns, turn = turns_before(row), -1
    for said in turns:
        turn += said[0] == "user"
        if said[0] == "user" and turn == number and text is not None:
            said[1] = text
        elif said[0] == "assistant" and turn >= number and answer is not None:
            said[1] = answer
    return json.dumps(turns, ensure_ascii=False) if turns else ""


def turns_since(row: dict[str, Any], fires: Callable[[str], bool]) -> int | None:
    """How many of the user's turns lie behind the last one that fires; None where none does."""
    turns = asked(row)
    found = [k for k, text in enumerate(turns) if fires(text)]
    return len(turns) - 1 - found[-1] if found else None
