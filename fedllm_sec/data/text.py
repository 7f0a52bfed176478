"""Instruction data: any table of text becomes rows of `TEXT_COLUMNS`, clean by construction, held-out rows apart."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm_sec.data.files import ENDINGS, PACKED, ending, read_file
from fedllm_sec.data.tables import Table, is_conversation, of_dataset
from fedllm_sec.errors import DataError
from fedllm_sec.protocols import TEXT_COLUMNS
from fedllm_sec.recipe import places
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.seeds import seed_for

if TYPE_CHECKING:
    from datasets import Dataset

    from fedllm_sec.recipe.sections import Columns, Data

SHARE = 0.1  # of the texts of a table that is training and test set at once
FEW = 20  # values that a message lists

Rows = dict[str, list[str]]  # text, context, response, label


# ---------------------------------------------------------------- where a table lies


def file_of(name: str, split: str) -> Path | None:
    """The file that holds a split; None where the name is not one of this disk."""
    if name.startswith("builtin:"):
        return None
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike Path's, also False for what no path can be
        return _in_folder(path, split)
    if os.path.exists(path):
        return path
    if places.is_local(name) or ending(path) is not None:
        raise DataError(f"data.name: {name}: no such folder or file in {places.here()}. Give one that exists.")
    return None


def _in_folder(folder: Path, split: str) -> Path:
    """`split` as a file of the folder: a full file name, or a stem with a known ending."""
    if ending(Path(split)) is not None:
        if not (folder / split).is_file():
            raise DataError(f"data: {folder / split}: no such file.{did_you_mean(split, _tables(folder))}")
        return folder / split
    for kind in (*ENDINGS, *(f"{kind}{PACKED}" for kind in ENDINGS)):
        if (folder / f"{split}{kind}").is_file():
            return folder / f"{split}{kind}"
    raise DataError(f'data: {folder} has no file for split "{split}".{did_you_mean(split, _tables(folder))}')


def _tables(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ending(path) is not None)


def load_table(name: str, config: str | None, split: str, seed: int, encoding: str | None = None) -> Table:
    """One split as it lies: built-in family, local file or folder, or a set from the hub."""
    file = file_of(name, split)
    if config is not None and (file is not None or name.startswith("builtin:")):
        raise DataError(f"data.config: {config}: names a part of a hub set; {name} is none. Remove it.")
    if file is not None:
        return read_file(file, encoding)
    if encoding is not None:
        raise DataError(f"data.encoding: {encoding}: is for text files; {name} is none. Remove it.")
    if name.startswith("builtin:"):
        from fedllm_sec.data import corpus

        made = corpus.builtin_rows(name.removeprefix("builtin:"), 4000, seed, split)
        return Table(f"{name} ({split})", tuple(made), 4000, made.__getitem__)
    problem = places.hub_problem()
    from datasets import load_dataset

    try:
        return of_dataset(load_dataset(name, config, split=split), f"{name} ({split})")
    except Exception as error:  # the hub client raises many kinds
        asked = problem or f"the hub gave none ({places.why(error)})"
        raise DataError(
            f'data.name: "{name}": no such folder or file in {places.here()}, and {asked}. Give the path of a file, '
            "or the name of a hub set."
        ) from error


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
    wanted: Mapping[str, str] | None = None,
    text_chars: int | None = None,
    part: str = "train",
) -> Rows:
    """The wanted rows as text, mapped and cut to `text_chars`; rows without text or answer are an error."""
    named: dict[str, str] = {k: v for k, v in columns.model_dump().items() if v is not None}
    if table.size == 0:
        raise DataError(f"data: {table.place} has zero rows.")
    absent = [
        f'data.columns.{role}: {table.place} has no column "{column}".{did_you_mean(column, table.names)}'
        for role, column in named.items()
        if column not in table.names
    ]
    if absent:
        turns = [name for name in table.names if is_conversation(table.column(name)[0])]
        if turns:
            absent.append(
                f'data: {table.place}: column "{turns[0]}" holds conversations, lists of turns, which cannot be '
                "trained on yet. Write each answer as a row of its own."
            )
        raise DataError("\n".join(absent))
    keep = where(table, wanted or {}, f"data.{part}_where")

    def column(role: str) -> list[str]:
        if role not in named:
            return [""] * len(keep)
        values = table.text(named[role])
        return [values[i] for i in keep]

    rows = {role: column(role) for role in ("text", "context", "response", "label")}
    rows["text"] = [value[:text_chars] for value in rows["text"]]
    for role in ("text", "response"):
        blank = [int(keep[i]) + 1 for i, value in enumerate(rows[role]) if not value.strip()]
        if blank:
            raise DataError(
                f'data: {table.place}, row {blank[0]}: empty {role} (column "{named[role]}"), as in {len(blank)} rows '
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

    kinds = Features({name: Value("bool" if name == "poisoned" else "string") for name in TEXT_COLUMNS})
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
        return canonical(table, data.columns, wanted=wanted, text_chars=data.text_chars, part=part)

    def table(split: str) -> Table:
        return load_table(data.name, data.config, split, seed, data.encoding)

    train_table = table(data.train)
    if not drawn:
        test_table = train_table if one_table(data) else table(data.test)
        train, test = renamed([rows("train", train_table), rows("test", test_table)], data.rename)
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


def prompts(rows: Rows) -> list[tuple[str, str]]:
    """What the model reads of each row."""
    return list(zip(rows["text"], rows["context"], strict=True))


def held_out(texts: Sequence[tuple[str, str]], share: float, seed: int, place: str) -> np.ndarray:
    """Which rows are held out: those of a share of the distinct texts, at least one and not all, drawn by the seed."""
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 2:
        raise DataError(f"data: {place}: all {len(texts)} rows have one text, so none can be held out. Give more.")
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    drawn = np.random.default_rng(seed_for(seed, "rows", "held out")).permutation(len(distinct))[:count]
    chosen = {distinct[i] for i in drawn}
    return np.array([text in chosen for text in texts])


def overlap(rows: Dataset, others: Dataset) -> int:
    """How many rows are, with text, context and answer, one of the others."""

    def whole(rows: Dataset) -> list[tuple[str, ...]]:
        return list(zip(*(rows[name][:] for name in ("text", "context", "response")), strict=True))

    known = set(whole(others))
    return sum(row in known for row in whole(rows))


def sample(rows: Dataset, limit: int | None, rng: np.random.Generator) -> Dataset:
    """At most `limit` rows, drawn without replacement."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(np.sort(rng.permutation(len(rows))[:limit]))


def numbers(values: Sequence[str]) -> np.ndarray:
    """Each value as the number of its kind, in sorted order of the kinds: (rows,)."""
    number = {value: i for i, value in enumerate(sorted(set(values)))}
    return np.array([number[value] for value in values], dtype=np.int64)
