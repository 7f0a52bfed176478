"""The forms in which instruction data and conversations come: named columns, Alpaca, prompt and completion, turns.

A conversation becomes one row. `text` is the last thing the user says, `response` what the assistant says to it,
`history` the turns before as JSON, [[role, content], ...], and `system` the system prompt; "" where there is none.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from fedllm_sec.data.tables import Table, as_text, is_conversation
from fedllm_sec.errors import DataError

if TYPE_CHECKING:
    from fedllm_sec.recipe.sections import Columns

Format = Literal["columns", "alpaca", "prompt_completion", "messages", "sharegpt"]

# turns as the two common forms write them: who speaks, what is said
KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
PAIR = ("user", "assistant")  # who says the two of a pair
USUAL = ("messages", "conversations", "conversation")  # names of columns that hold them
BESIDE = ("system", "history")  # columns that belong to a row where a format is found or named, and text besides
# drawn as nothing: letters and marks of Unicode's Default_Ignorable_Code_Point, and the empty cell of Braille
FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0") | {
    *map(chr, range(0xFE00, 0xFE10)),
    *map(chr, range(0xE0100, 0xE01F0)),
}
# what a turn may hold beside its words that no row here can say, and what to do with it
THOUGHTS = " Write it into the content as the model's template does, or leave it out."
TOOLS = ("tools", "functions")  # columns of a format's rows that describe what may be called
FULL_WEIGHT = ("", "1", "1.0", "true")
UNSAID = {
    "tool_calls": "",
    "function_call": "",
    "reasoning_content": THOUGHTS,
    "reasoning": THOUGHTS,
    "thinking": THOUGHTS,
    "weight": " Leave weights out: data.loss_on says which answers are scored.",
}
ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip


class Turn(NamedTuple):
    role: str
    content: str


class Spoken(NamedTuple):
    """One conversation as the columns of a row."""

    text: str
    response: str
    history: str
    system: str


def found_format(table: Table, columns: Columns) -> Format:
    """The format that the columns of a table show; `columns` where they show none, which then says what is missing."""
    if columns.model_fields_set & {"text", "response"}:
        return _turns_of(table, columns.text) or "columns"
    names = set(table.names)
    if {"text", "response"} <= names:
        return "columns"
    if {"prompt", "completion"} <= names:
        return "prompt_completion"
    if {"instruction", "output"} <= names:
        return "alpaca"
    for name in (*USUAL, *table.names):
        if name in names and (kind := _turns_of(table, name)):
            return kind
    return "columns"


def _turns_of(table: Table, name: str) -> Literal["messages", "sharegpt"] | None:
    """How the column's turns are written; None where it holds none. Rows without any turn do not say."""
    if name not in table.names or table.size == 0:
        return None
    first = next((value for value in map(_unpacked, table.column(name)) if value is not None and len(value)), None)
    if first is None or not is_conversation(first):
        return None
    return "sharegpt" if set(KEYS["sharegpt"]) <= set(first[0]) else "messages"


def _unpacked(value: Any) -> Any:
    """A list, also one that is written as JSON, as a CSV file must; None for what is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, (list, tuple, np.ndarray)) else None


def is_blank(text: str) -> bool:
    """Whether there is nothing to be seen in it: blanks, control characters, and others that are drawn as nothing."""
    return all(c.isspace() or c in FILLERS or unicodedata.category(c) in ("Cf", "Cc") for c in text)


def says_nothing(value: Any) -> bool:
    """Whether a value is missing or empty, also as JSON text and in all its parts, as Parquet fills up structures."""
    if isinstance(value, str):
        return value.strip() in ("", "null", "[]", "{}")
    if isinstance(value, Mapping):
        return all(map(says_nothing, value.values()))
    if isinstance(value, (list, tuple, np.ndarray)):
        return all(map(says_nothing, value))
    return value is None or value != value


def conversation_column(table: Table, columns: Columns, kind: str) -> str:
    """The column that holds the conversations."""
    if "text" in columns.model_fields_set:
        return columns.text
    of_kind = [name for name in (*USUAL, *table.names) if _turns_of(table, name) == kind]
    if not of_kind:
        who, what = KEYS[kind]
        raise DataError(
            f"data.format: {kind}: {table.place} has no column that holds lists of {{{who}, {what}}}. Its columns are "
            f"{', '.join(table.names)}. Name the column in data.columns.text, or choose another format."
        )
    return of_kind[0]


def columns_of(table: Table, columns: Columns, kind: Format) -> Columns:
    """Which columns play which part; beside a format's own, those of the names of BESIDE that are not given."""
    names: dict[str, str | None] = {}
    if kind == "alpaca":
        names = {"text": "instruction", "response": "output", "context": "input" if "input" in table.names else None}
    elif kind == "prompt_completion":
        names = {"text": "prompt", "response": "completion", "context": None}
    if kind != "columns":
        names |= {role: role for role in BESIDE if role in table.names}
    return columns.model_copy(update={k: v for k, v in names.items() if k not in columns.model_fields_set})


def in_turns(table: Table, columns: Columns, kind: Format, keep: Sequence[int]) -> dict[str, list[str]] | None:
    """The rows with these numbers as text, response, history and system; None where the format has plain columns.

    Prompt and completion may be turns too, as TRL takes them.
    """
    if kind in KEYS:
        names = [conversation_column(table, columns, kind)]
        if names[0] not in table.names:
            return None  # said as any column that is not there
    elif kind == "prompt_completion" and _turns_of(table, "prompt"):
        names = ["prompt", "completion"]
    else:
        return None
    values = [table.column(name) for name in names]
    made = [_row(table.place, int(i) + 1, names, [column[i] for column in values], kind) for i in keep]
    rows = {role: [getattr(row, role) for row in made] for role in Spoken._fields}
    rows["context"] = [""] * len(made)
    if columns.context is not None:
        raise DataError(
            f'data.columns.context: "{columns.context}": a conversation has no context beside its turns. Remove it.'
        )
    return rows


def said_beside(
    table: Table, columns: Columns, turns: Mapping[str, Sequence[str]] | None, keep: Sequence[int]
) -> dict[str, list[str]]:
    """System prompts and earlier turns that columns of their own hold, with those of `turns`; {} where none does."""
    made: dict[str, list[str]] = {}
    if columns.system is not None:
        own, column = (turns or {}).get("system") or [""] * len(keep), table.text(columns.system)
        made["system"] = [column[i] for i in keep]
        for i, said, given in zip(keep, own, made["system"], strict=True):
            if said != given and not is_blank(said) and not is_blank(given):
                raise DataError(
                    f"data: {table.place}, row {i + 1}: the system prompt of its turns is another than that of column "
                    f'"{columns.system}". Remove one, or set data.columns.system: null.'
                )
        made["system"] = [said if is_blank(given) else given for said, given in zip(own, made["system"], strict=True)]
    if columns.history is not None:
        values = table.column(columns.history)
        before = [_before(table.place, int(i) + 1, columns.history, values[i]) for i in keep]
        if turns is None:
            made["history"] = before
        elif any(before):
            raise DataError(
                f'data: {table.place}: column "{columns.history}" holds turns beside the conversations. Remove one, or '
                "set data.columns.history: null."
            )
    return made


def refuse_tools(table: Table, kind: Format, keep: Sequence[int]) -> None:
    """An error where rows of a format describe tools; in a table of named columns other columns are nobody's."""
    for name in [name for name in TOOLS if name in table.names and kind != "columns"]:
        values = table.column(name)
        if lost := [i for i in keep if not says_nothing(values[i])]:
            raise DataError(
                f'data: {table.place}, row {lost[0] + 1}: column "{name}" describes tools, which no template writes '
                "here. Remove the column, or take such rows out."
            )


def _before(place: str, number: int, column: str, value: Any) -> str:
    """Earlier turns as JSON: of turns, or of pairs [asked, said]; "" where there are none."""
    found = _unpacked(value)
    if value is None or value == "" or (found is not None and len(found) == 0):
        return ""
    try:
        if found is None:
            raise ValueError(f"{str(value)[:40]!r} is no list of turns or of pairs.")
        if is_conversation(found):
            keys = KEYS["sharegpt" if set(KEYS["sharegpt"]) <= set(found[0]) else "messages"]
            made = turns_of(found, keys)
        else:
            if any(not isinstance(pair, (list, tuple, np.ndarray)) or len(pair) != 2 for pair in found):
                raise ValueError("holds what is no pair of asked and said.")
            made = [Turn(role, as_text(said)) for pair in found for role, said in zip(PAIR, pair, strict=True)]
        if made[0].role == "system":
            raise ValueError("turn 1 is a system prompt, which belongs into a column of its own (data.columns.system).")
        return spoken([*made, Turn("user", "?"), Turn("assistant", "?")]).history
    except ValueError as error:
        raise DataError(
            f'data: {place}, row {number}: column "{column}": {error} Mend the row, or set data.columns.history: null.'
        ) from None


def _row(place: str, number: int, names: Sequence[str], values: Sequence[Any], kind: str) -> Spoken:
    try:
        turns = [turn for value in values for turn in turns_of(value, KEYS.get(kind, KEYS["messages"]))]
        return spoken(turns)
    except ValueError as error:
        raise DataError(
            f'data: {place}, row {number}: column "{names[0]}": {error} Mend the row or take it out.'
        ) from None


def turns_of(value: Any, keys: tuple[str, str]) -> list[Turn]:
    """A list of turns; a ValueError says which is none."""
    turns = _unpacked(value)
    if turns is None or len(turns) == 0:
        raise ValueError(f"{str(value)[:40]!r} is no list of turns.")
    who, what = keys
    found = []
    for k, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or who not in turn or what not in turn:
            raise ValueError(f"turn {k} has no {who} and {what}.")
        for key, way_out in UNSAID.items():
            value = turn.get(key)
            if not says_nothing(value) and not (key == "weight" and as_text(value) in FULL_WEIGHT):
                raise ValueError(f"turn {k} has {key}, which is not trained on.{way_out}")
        role = ROLES.get(str(turn[who]).strip().lower())
        if role is None:
            raise ValueError(f"turn {k} is by {str(turn[who])[:40]!r}, which is none of {', '.join(ROLES)}.")
        found.append(Turn(role, _said(turn[what], k)))
    return found


def _said(content: Any, number: int) -> str:
    """What a turn says: text, or a list of parts of kind text."""
    if isinstance(content, (list, tuple, np.ndarray)):
        if not all(isinstance(part, Mapping) and part.get("type", "text") == "text" for part in content):
            raise ValueError(f"turn {number} has parts that are no text.")
        content = "".join(as_text(part.get("text")) for part in content)
    return as_text(content)


def spoken(turns: Sequence[Turn]) -> Spoken:
    """The columns of one conversation; a ValueError says why it cannot be trained on."""
    system = turns[0].content if turns[0].role == "system" else ""
    rest = list(turns[turns[0].role == "system" :])
    first = len(turns) - len(rest) + 1
    if any(turn.role == "system" for turn in rest):
        raise ValueError("a system prompt stands behind the first turn.")
    if not rest or rest[0].role != "user":
        raise ValueError(f"turn {first} is not the user's, who must begin.")
    if rest[-1].role != "assistant":
        raise ValueError(f"turn {len(turns)}, the last, is not the assistant's: there is nothing to learn from it.")
    for k, turn in enumerate(rest):
        if is_blank(turn.content):
            raise ValueError(f"turn {first + k}, the {turn.role}'s, is empty.")
        if turn.role == "assistant" == rest[k - 1].role and k:
            raise ValueError(f"turn {first + k} is the assistant's, as is the one before it.")
    history = json.dumps([list(turn) for turn in rest[:-2]], ensure_ascii=False) if len(rest) > 2 else ""
    return Spoken(rest[-2].content, rest[-1].content, history, system)
