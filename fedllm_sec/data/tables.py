"""Tables as they lie, in a file or on the hub, and their columns as text.

Nothing is guessed: 00037, NA, null and 2020-01-02 come out as they were written, and numbers keep all their digits.
What has no spelling of its own gets one, once and here: true and false, class names for class numbers, "" for a missing
value, ISO dates, lists and structures as JSON.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm_sec.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# turns of a conversation, as the two common forms write them
TURNS = ({"role", "content"}, {"from", "value"})


@dataclass(frozen=True)
class Table:
    """A table whose columns become text when they are asked for; rows count from 1, the head is not one."""

    place: str  # what messages call it
    names: tuple[str, ...]
    size: int
    column: Callable[[str], Sequence[Any]]  # the values of a column as they were read
    _texts: dict[str, list[str]] = field(default_factory=dict)

    def text(self, name: str) -> list[str]:
        """A column as text; "" where a value is missing."""
        if name not in self._texts:
            made: list[str] = []
            try:
                for value in self.column(name):
                    made.append(as_text(value))
            except DataError:  # which names the row itself
                raise
            except (ValueError, RecursionError) as error:
                reason = "is nested too deeply." if isinstance(error, RecursionError) else str(error)
                raise DataError(f'data: {self.place}, row {len(made) + 1}: column "{name}" {reason}') from None
            self._texts[name] = made
        return self._texts[name]


def as_text(value: Any) -> str:
    """One value as text; a ValueError says why it has none."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = value[error.start]
                raise ValueError(f"holds half a character ({half!r}). Remove it.") from None
        return str(value)
    if isinstance(value, (list, tuple, dict, np.ndarray)):
        if is_conversation(value):
            raise ValueError(
                "holds conversations, lists of turns. Name another column; or, with task: causal_lm, set data.format "
                "to messages or sharegpt, or leave it out."
            )
        return as_json(value)
    plain = _plain(value)
    return "" if plain is None else plain


def is_conversation(value: Any) -> bool:
    """Whether it is a list of turns, such as {role, content}."""
    return (
        isinstance(value, (list, np.ndarray))
        and len(value) > 0
        and isinstance(value[0], dict)
        and any(turn <= value[0].keys() for turn in TURNS)
    )


def _plain(value: Any) -> str | None:
    """A single value as text, None where it is missing."""
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return str(value) if value == value else None
    if isinstance(value, (int, np.integer, Decimal, datetime.timedelta)):
        return str(value)
    if isinstance(value, datetime.datetime):
        return value.isoformat(sep=" ")
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError("holds bytes that are not UTF-8 text. Name another column.") from None
    raise ValueError(f"holds a value of kind {type(value).__name__}, which is no text. Name another column.")


class Number(str):
    """A number of a JSON file as its characters."""


def as_json(value: Any) -> str:
    """Lists and structures as JSON, the numbers in them as they were written."""
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{json.dumps(str(k), ensure_ascii=False)}: {as_json(v)}" for k, v in value.items()) + "}"
        )
    if isinstance(value, (list, tuple, np.ndarray)):
        return "[" + ", ".join(map(as_json, value)) + "]"
    if isinstance(value, str):
        return value if isinstance(value, Number) else json.dumps(as_text(value), ensure_ascii=False)
    plain = _plain(value)
    if plain is None:
        return "null"
    numeric = isinstance(value, (bool, int, float, np.number, np.bool_, Decimal))
    return plain if numeric else json.dumps(plain, ensure_ascii=False)


def of_dataset(dataset: Dataset, place: str) -> Table:
    """A table of the `datasets` library."""
    classes = {name: f.names for name, f in dataset.features.items() if type(f).__name__ == "ClassLabel"}
    return of_arrow(dataset.with_format("arrow")[:], classes, place)


def of_arrow(table: pa.Table, classes: Mapping[str, Sequence[str]], place: str) -> Table:
    """An Arrow table; `classes` are the names behind the numbers of some columns."""
    import pyarrow as pa

    refuse_twice(table.column_names, place)
    for name in table.column_names:
        try:
            table.column(name).validate(full=True)  # Arrow trusts what a file says of its own lengths
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f'data: {place}: column "{name}" is damaged, or no UTF-8 text ({reason}). Copy or write it again.'
            ) from None

    def column(name: str) -> Sequence[Any]:
        found = table.column(name)
        try:
            values = found.to_pylist()
        except Exception as error:  # dates out of range, text that is not UTF-8: Arrow raises many kinds
            reason = str(error).splitlines()[0]
            if "zoneinfo" in reason:  # what it tries where it does not know a name
                reason = f"its time zone, {found.type.tz!r}, is not known"
            raise DataError(f'data: {place}: column "{name}" cannot be read ({reason}). Name another column.') from None
        if name in classes:
            return [
                _class(value, classes[name], f'{place}, row {i}: column "{name}"') for i, value in enumerate(values, 1)
            ]
        if pa.types.is_float32(found.type) or pa.types.is_float16(found.type):  # 0.1, not 0.10000000149011612
            return [None if value is None else np.float32(value) for value in values]
        return values

    return Table(place, tuple(table.column_names), table.num_rows, column)


def _class(value: Any, names: Sequence[str], where: str) -> str | None:
    if value is None or value == -1:  # -1: not labelled
        return None
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise DataError(
            f"data: {where} holds the class number {value}, but there are {len(names)} class names, from number 0 on. "
            "Correct it, or save the column as text."
        )
    return names[value]


def refuse_twice(names: Sequence[str], place: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f'data: {place}: {count} columns are called "{name}". Rename all but one.')
