"""Tables in JSON: a list of objects, objects one after the other (JSON lines), or one object that holds a table.

Of one object these are tables: {column: {row: value}}, as pandas' `to_json` writes them, {row: {column: value}},
{columns, index, data} and {schema, data} (its orients), and {column: [value, ...]}. Where rows and columns cannot be
told apart, and where the rows stand in a list beside other keys, it is an error. Any other object is one row, as a file
of JSON lines with a single line has it: a conversation, or one plain value for each column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm_sec.data.tables import Number, Table, as_json, is_conversation, refuse_twice
from fedllm_sec.errors import DataError

NUMBERED = re.compile(r"-?\d+")  # how pandas calls rows that have no name
WAY_OUT = 'Save it as a list of rows, [{column: value, ...}, ...], as pandas does with orient="records".'


def read_json(text: str, place: str) -> Table:
    """The table of a JSON text in any of these forms."""
    values = _values(text, place)
    if len(values) == 1 and isinstance(values[0], dict) and (found := _of_object(values[0], place)) is not None:
        return found
    return _of_rows(values[0] if len(values) == 1 and isinstance(values[0], list) else values, place)


def _of_rows(rows: Sequence[Any], place: str) -> Table:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"data: {place}, row {number}: {as_json(row)[:40]}: must be an object, {{column: value, ...}}, as "
                'pandas writes with orient="records".'
            )
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return Table(place, names, len(rows), lambda name: [row.get(name) for row in rows])


def _values(text: str, place: str) -> list[Any]:
    """The JSON values that the text holds one after the other, numbers as they are written."""
    decoder = json.JSONDecoder(
        parse_int=Number,
        parse_float=Number,
        parse_constant=lambda name: None if name == "NaN" else Number(name),  # how missing numbers are written
        object_pairs_hook=_object,
    )
    blank = re.compile(r"[ \t\r\n]*")
    values: list[Any] = []
    at = blank.match(text, 0).end()  # type: ignore[union-attr]
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"data: {place} cannot be read as json (line {error.lineno}, column {error.colno}: {error.msg}). It "
                "must be a list of objects, or one object a line."
            ) from None
        except RecursionError:
            raise DataError(f"data: {place}, row {len(values) + 1}: is nested too deeply.") from None
        except ValueError as error:  # of _object
            raise DataError(f"data: {place}, row {len(values) + 1}: {error}") from None
        values.append(value)
        at = blank.match(text, end).end()  # type: ignore[union-attr]
    return values


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f'the key "{twice}" is given twice. Keep one.')
    return made


# ---------------------------------------------------------------- one object


def _of_object(one: Mapping[str, Any], place: str) -> Table | None:
    """The table that one object holds; None where it is a row."""
    parts = list(one.values())
    if {"columns", "data"} <= one.keys() and all(isinstance(one[key], list) for key in ("columns", "data")):
        return _of_split(one["columns"], one["data"], place)
    if {"schema", "data"} <= one.keys() and isinstance(one["data"], list):
        return _of_rows(one["data"], place)
    if parts and all(isinstance(part, dict) for part in parts):
        return _of_objects(one, place)
    if any(map(is_conversation, parts)):
        return None
    for name, part in one.items():
        if isinstance(part, list) and len(part) > 1 and all(isinstance(value, dict) for value in part):
            raise DataError(
                f'data: {place}: is one object, whose "{name}" holds a list of {len(part)} objects. If these are the '
                "rows, save that list as a file of its own."
            )
    return _of_lists(one, place) if parts and all(isinstance(part, list) for part in parts) else None


def _of_split(names: Sequence[Any], rows: Sequence[Any], place: str) -> Table:
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"data: {place}: the column name {as_json(name)[:40]} is no text. {WAY_OUT}")
    refuse_twice(names, place)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(names):
            raise DataError(
                f"data: {place}, row {number}: {as_json(row)[:40]}: must be a list of {len(names)} values, one for "
                'each of "columns". Correct it.'
            )
    at = {name: k for k, name in enumerate(names)}
    return Table(place, tuple(at), len(rows), lambda name: [row[at[name]] for row in rows])


def _of_objects(one: Mapping[str, Mapping[str, Any]], place: str) -> Table:
    """By columns or by rows: rows are those that are called by numbers."""
    inner = next(iter(one.values()))
    outside, inside = (all(map(NUMBERED.fullmatch, keys)) for keys in (one, inner))
    if outside == inside or any(part.keys() != inner.keys() for part in one.values()):
        raise DataError(
            f"data: {place}: is one object of objects, in which nobody can tell rows from columns. {WAY_OUT}"
        )
    if outside:
        return _of_rows(list(one.values()), place)
    return Table(place, tuple(one), len(inner), lambda name: [one[name][row] for row in inner])


def _of_lists(one: Mapping[str, Sequence[Any]], place: str) -> Table:
    sizes = {name: len(part) for name, part in one.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {size}" for name, size in list(sizes.items())[:5])
        raise DataError(f"data: {place}: is one object of lists of different lengths ({shown}). {WAY_OUT}")
    return Table(place, tuple(one), next(iter(sizes.values())), lambda name: one[name])
