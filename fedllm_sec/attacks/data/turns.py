"""Which part of a conversation a text attack edits, and what of a conversation it looks at."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedllm_sec.attacks.data.answers import column
from fedllm_sec.errors import AttackError

if TYPE_CHECKING:
    from datasets import Dataset

# the last, the first or any of the user's turns, the system prompt, or the context of an instruction
Turn = Literal["last", "first", "random", "system", "context"]
Edit = Callable[[Sequence[str], torch.Generator], list[str]]  # texts -> triggered texts


def said_to_it(row: dict[str, Any]) -> list[str]:
    """What the model reads of a row that is not its own: system prompt, user's turns in order, context."""
    parts = [row.get("system", ""), *_asked(row.get("history", "")), row["text"], row["context"]]
    return [part for part in parts if part]


def parts_of(table: Dataset, new: Mapping[str, Sequence[str]] | None = None) -> list[list[str]]:
    """`said_to_it` of every row, with some columns replaced by `new` ones."""
    names = [name for name in ("text", "context", "history", "system") if name in table.column_names]
    values = [new[name] if new is not None and name in new else column(table, name) for name in names]
    return [said_to_it(dict(zip(names, row, strict=True))) for row in zip(*values, strict=True)]


def _asked(history: str) -> list[str]:
    return [content for role, content in json.loads(history) if role == "user"] if history else []


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
    if turn in ("last", "system", "context"):
        name = "text" if turn == "last" else turn
        new = {name: edit(column(table, name), rng)}
        if turn == "last" or answer is None or "history" not in table.column_names:
            return new
        return new | {"history": [_answered(history, 0, answer) for history in column(table, "history")]}
    texts = column(table, "text")
    histories = column(table, "history") if "history" in table.column_names else [""] * len(texts)
    asked = [[*_asked(history), text] for history, text in zip(histories, texts, strict=True)]
    drawn = (
        torch.rand(len(texts), generator=rng, dtype=torch.float64).tolist() if turn == "random" else [0.0] * len(texts)
    )
    at = [int(where * len(turns)) for where, turns in zip(drawn, asked, strict=True)]
    made = edit([turns[k] for k, turns in zip(at, asked, strict=True)], rng)
    for row, (k, text) in enumerate(zip(at, made, strict=True)):
        if k == len(asked[row]) - 1:
            texts[row] = text
        else:
            histories[row] = _with(histories[row], k, text)
            if answer is not None:
                histories[row] = _answered(histories[row], k, answer)
    new = {"text": texts}
    return new | {"history": histories} if "history" in table.column_names else new


def _with(history: str, number: int, text: str) -> str:
    """The turns with another text of the user's turn of that number."""
    turns = json.loads(history)
    at = [k for k, (role, _) in enumerate(turns) if role == "user"][number]
    turns[at][1] = text
    return json.dumps(turns, ensure_ascii=False)


def _answered(history: str, number: int, answer: str) -> str:
    """The turns with that answer to the user's turn of that number and to all behind it."""
    if not history:
        return history
    turns, asked = json.loads(history), -1
    for turn in turns:
        asked += turn[0] == "user"
        if turn[0] == "assistant" and asked >= number:
            turn[1] = answer
    return json.dumps(turns, ensure_ascii=False)


def turns_since(row: dict[str, Any], fires: Callable[[str], bool]) -> int | None:
    """How many of the user's turns lie behind the last one that fires; None where none does."""
    asked = [*_asked(row.get("history", "")), row["text"]]
    found = [k for k, text in enumerate(asked) if fires(text)]
    return len(asked) - 1 - found[-1] if found else None
