"""Instruction data: any table of text becomes rows of `TEXT_COLUMNS`, clean by construction, held-out rows apart."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm_sec.data.formats import (
    BESIDE,
    Format,
    columns_of,
    found_format,
    in_turns,
    is_blank,
    refuse_tools,
    said_beside,
)
from fedllm_sec.data.sources import file_of, load_table
from fedllm_sec.data.tables import Table
from fedllm_sec.errors import DataError
from fedllm_sec.protocols import TEXT_COLUMNS
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.seeds import seed_for

if TYPE_CHECKING:
    from datasets import Dataset

    from fedllm_sec.recipe.sections import Columns, Data

SHARE = 0.1  # of the texts of a table that is training and test set at once
FEW = 20  # values that a message lists
READ = ("text", "context", "history", "system")  # what the model reads of a row, as far as rows have it

Rows = dict[str, list[str]]  # text, context, response, label; of conversations history and system too


# ---------------------------------------------------------------- tables -> rows


def where(table: Table, wanted: Mapping[str, str], place: str) -> np.ndarray:
    """Numbers, from 0, of the rows whose columns have the wanted values as text."""
    keep = np.ones(table.size, dtype=bool)
    for column, value in wanted.items():
        if column not in table.names:
            raise DataError(f'{place}: there is no column "{column}".{did_you_mean(column, table.names)}')
        there = table.text(column)
        found = np.array([text == value for text in there], dtype=bool)
        if not found.any():
            raise DataError(f'{place}: no row has {column} = "{value}".{_known(value, there)}')
        keep &= found
    if not keep.any():
        raise DataError(f"{place}: no row has all of {dict(wanted)}. Ask for less.")
    return np.flatnonzero(keep)


def _known(value: str, values: Collection[str]) -> str:
    """A hint at what there is, where that is few and short."""
    there = {value for value in values if value.strip()}
    return did_you_mean(value, there) if len(there) <= FEW and all(len(v) <= 60 for v in there) else ""


def canonical(
    table: Table,
    columns: Columns,
    *,
    format: Format | None = None,
    wanted: Mapping[str, str] | None = None,
    text_chars: int | None = None,
    part: str = "train",
) -> Rows:
    """The wanted rows as text, mapped and cut to `text_chars`; rows without text or answer are an error."""
    if table.size == 0:
        raise DataError(f"data: {table.place} has zero rows. Give a table with some.")
    kind = format or found_format(table, columns)
    keep = where(table, wanted or {}, f"data.{part}_where")
    turns = in_turns(table, columns, kind, keep)
    refuse_tools(table, kind, keep)
    columns = columns_of(table, columns, kind)
    roles = ("text", "context", "response", "label", *BESIDE)
    named: dict[str, str] = {role: column for role in roles if (column := getattr(columns, role)) is not None}
    if turns is not None:
        named = {role: named[role] for role in ("label", *BESIDE) if role in named}
    absent = [
        f'data.columns.{role}: {table.place} has no column "{column}".{did_you_mean(column, table.names)}'
        for role, column in named.items()
        if column not in table.names and role in type(columns).model_fields
    ]
    if absent:
        raise DataError(" ".join(absent))

    def column(role: str) -> list[str]:
        if turns is not None and role in turns:
            return turns[role]
        if role not in named:
            return [""] * len(keep)
        values = table.text(named[role])
        return [values[i] for i in keep]

    rows = {role: column(role) for role in ("text", "context", "response", "label", *(turns or {}))}
    beside = said_beside(table, columns, turns, keep)
    if beside:
        rows |= {role: rows.get(role, [""] * len(keep)) for role in BESIDE} | beside
    rows["text"] = [value[:text_chars] for value in rows["text"]]
    for role in ("text", "response"):
        blank = [int(keep[i]) + 1 for i, value in enumerate(rows[role]) if is_blank(value)]
        if blank:
            said = role if role in type(columns).model_fields else "label"  # a classifier answers with the class
            raise DataError(
                f'data: {table.place}, row {blank[0]}: empty {said} (column "{named[role]}"), as in {len(blank)} rows '
                f"of {len(keep)}. Remove them, or choose rows with data.{part}_where."
            )
    return rows


def renamed(parts: Sequence[Rows], names: Mapping[str, str]) -> list[Rows]:
    """The parts with answers and labels written differently; a name that stands nowhere is an error."""
    there = {value for rows in parts for role in ("response", "label") for value in rows[role]}
    for old, new in names.items():
        if not new.strip():
            raise DataError(f'data.rename.{old}: "{new}": rows without an answer cannot be trained on. Give a text.')
        if old not in there:
            raise DataError(
                f'data.rename: no answer and no label is "{old}", so there is nothing to rename.{_known(old, there)}'
            )
    return [
        {
            role: [names.get(value, value) for value in values] if role in ("response", "label") else values
            for role, values in rows.items()
        }
        for rows in parts
    ]


def as_dataset(rows: Rows) -> Dataset:
    """Rows of `TEXT_COLUMNS`, none of them poisoned."""
    from datasets import Dataset, Features, Value

    names = [*rows, "poisoned"] if set(rows) - set(TEXT_COLUMNS) else TEXT_COLUMNS
    kinds = Features({name: Value("bool" if name == "poisoned" else "string") for name in names})
    return Dataset.from_dict(rows | {"poisoned": [False] * len(rows["text"])}, features=kinds)


# ---------------------------------------------------------------- training and held-out rows


def one_table(data: Data) -> bool:
    """Whether training and test rows come from one table."""

    def source(split: str) -> Any:
        file = file_of(data.name, split)
        return (data.name, split) if file is None else file.resolve()

    return bool(source(data.train) == source(data.test))


def split_at_random(data: Data) -> bool:
    """Whether test rows are drawn from the one table there is; settings that could not act are an error."""
    for part in ("train", "test"):
        if os.path.isfile(data.name) and (given := getattr(data, part)) != part:
            raise DataError(
                f'data.{part}: "{given}" names a file of a folder or a split of a hub set, but data.name is the file '
                f"{data.name}. Name the folder in data.name, or remove data.{part}."
            )
    same, chosen = one_table(data), (bool(data.train_where), bool(data.test_where))
    if same and not any(chosen):
        return True
    if data.test_share is not None:
        why = "train_where and test_where choose the rows" if same else "training and test rows are two tables"
        raise DataError(f"data.test_share: {data.test_share}: {why}, so nothing is drawn. Remove it.")
    if same and not all(chosen):
        raise DataError(
            "data: training and test rows are in one table, and only one part is chosen from it. Give both "
            "data.train_where and data.test_where; or neither, and data.test_share of its texts are drawn."
        )
    return False


def load_rows(data: Data, seed: int) -> tuple[Dataset, Dataset]:
    """Clean training and test rows, renamed; a text and its context are in one of them only where they are drawn."""
    drawn = split_at_random(data)

    def rows(part: str, table: Table) -> Rows:
        wanted = getattr(data, f"{part}_where")
        made = canonical(table, data.columns, format=data.format, wanted=wanted, text_chars=data.text_chars, part=part)
        if data.system:
            made["system"] = [
                data.system if is_blank(said) else said for said in made.get("system", [""] * len(made["text"]))
            ]
        _need_shown(data, made, table.place)
        return made

    def table(split: str) -> Table:
        return load_table(data.name, data.config, split, seed, data.encoding)

    train_table = table(data.train)
    if not drawn:
        test_table = train_table if one_table(data) else table(data.test)
        train, test = renamed(_alike(rows("train", train_table), rows("test", test_table)), data.rename)
        return as_dataset(train), as_dataset(test)
    both = renamed([rows("train", train_table)], data.rename)[0]
    held = held_out(prompts(both), data.test_share or SHARE, seed, train_table.place)
    if data.test_share is None:
        warnings.warn(
            f"data: {train_table.place} is training and test set: {SHARE:.0%} of its texts, drawn by the seed, are "
            "held out. Set data.test_share to choose.",
            stacklevel=2,
        )
    made = as_dataset(both)
    return made.select(np.flatnonzero(~held)), made.select(np.flatnonzero(held))


def _alike(*parts: Rows) -> list[Rows]:
    """The parts with the columns that one of them has: "" where another has none."""
    names = dict.fromkeys(name for rows in parts for name in rows)
    return [{name: rows.get(name, [""] * len(rows["text"])) for name in names} for rows in parts]


def _need_shown(data: Data, rows: Rows, place: str) -> None:
    """What rows say beside text and answer must be written by the template, else nobody would read it."""
    if data.template == "chat":
        return
    shown = f"{data.template}{data.template_with_context or ''}"
    if any(rows["context"]) and "{context}" not in shown:
        raise DataError(
            f"data.template: {place}: the rows have a context (the input of an instruction), which no template shows. "
            'Write {context} in data.template_with_context, as "{text}\\n{context}\\n"; or set data.template: chat.'
        )
    if any(rows.get("history", ())) or any(rows.get("system", ())):
        raise DataError(
            f"data.template: {place}: the rows have several turns or system prompts, which {data.template!r} does not "
            "write. Set data.template: chat; or leave columns of theirs out with data.columns.system: null and "
            "data.columns.history: null."
        )


def format_of(data: Data, seed: int) -> Format:
    """The format of the training rows."""
    if data.format is not None:
        return data.format
    return found_format(load_table(data.name, data.config, data.train, seed, data.encoding), data.columns)


def prompts(rows: Rows) -> list[tuple[str, ...]]:
    """What the model reads of each row."""
    return list(zip(*(rows[name] for name in READ if name in rows), strict=True))


def held_out(texts: Sequence[tuple[str, ...]], share: float, seed: int, place: str) -> np.ndarray:
    """Which rows are held out: those of a share of the distinct texts, at least one and not all, drawn by the seed."""
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 2:
        raise DataError(f"data: {place}: all {len(texts)} rows have one text, so none can be held out. Give more.")
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    drawn = np.random.default_rng(seed_for(seed, "rows", "held out")).permutation(len(distinct))[:count]
    chosen = {distinct[i] for i in drawn}
    return np.array([text in chosen for text in texts])


def overlap(rows: Dataset, others: Dataset) -> int:
    """How many rows are, with all that is read and the answer, one of the others."""

    names = [name for name in (*READ, "response") if name in rows.column_names]

    def whole(rows: Dataset) -> list[tuple[str, ...]]:
        return list(zip(*(rows[name][:] for name in names), strict=True))

    known = set(whole(others))
    return sum(row in known for row in whole(rows))


def drawn(size: int, limit: int | None, rng: np.random.Generator) -> np.ndarray:
    """Numbers of at most `limit` of `size` rows, drawn without replacement, in order; nothing is drawn for all."""
    if limit is None or limit >= size:
        return np.arange(size)
    return np.sort(rng.permutation(size)[:limit])


def sample(rows: Dataset, limit: int | None, rng: np.random.Generator) -> Dataset:
    """At most `limit` rows, drawn without replacement."""
    return rows.select(drawn(len(rows), limit, rng))


def numbers(values: Sequence[str]) -> np.ndarray:
    """Each value as the number of its kind, in sorted order of the kinds: (rows,)."""
    number = {value: i for i, value in enumerate(sorted(set(values)))}
    return np.array([number[value] for value in values], dtype=np.int64)
