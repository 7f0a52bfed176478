"""Instruction data: any table of text becomes rows of `TEXT_COLUMNS`, clean by construction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm_sec.errors import DataError
from fedllm_sec.protocols import TEXT_COLUMNS
from fedllm_sec.recipe.resolve import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def _file(path: Path) -> Dataset:
    from datasets import Dataset

    kind = FILE_KINDS.get(path.suffix)
    if kind is None:
        raise DataError(f'data: {path} has the ending "{path.suffix}"; can read {", ".join(FILE_KINDS)}.')
    if not path.is_file():
        raise DataError(f"data: {path}: no such file. Give data.name a folder or file that exists.")
    if path.stat().st_size == 0:
        raise DataError(f"data: {path} is empty: zero rows.")
    try:
        # keep_in_memory: shards are small, and an unseen cache would outlive the file it was made from
        reader = {"json": Dataset.from_json, "csv": Dataset.from_csv, "parquet": Dataset.from_parquet}[kind]
        return reader(str(path), keep_in_memory=True)
    except Exception as error:  # the readers raise what their parsers raise
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        if "corresponds to no data" in reason:  # a head without rows, or an empty list
            raise DataError(f"data: {path} has zero rows.") from error
        raise DataError(f"data: {path} cannot be read as {kind} ({reason}).") from error


def _in_folder(folder: Path, split: str) -> Path:
    """`split` as a file of the folder: a full file name, or a stem with a known ending."""
    if Path(split).suffix in FILE_KINDS:
        return folder / split
    for ending in FILE_KINDS:
        if (folder / f"{split}{ending}").is_file():
            return folder / f"{split}{ending}"
    there = sorted(p.name for p in folder.iterdir() if p.suffix in FILE_KINDS)
    raise DataError(f'data: {folder} has no file for split "{split}".{did_you_mean(split, there)}')


def load_table(name: str, config: str | None, split: str, seed: int) -> Dataset:
    """One split as it lies: built-in family, local file or folder, or a set from the hub."""
    from datasets import Dataset, load_dataset

    if name.startswith("builtin:"):
        from fedllm_sec.data import corpus

        return Dataset.from_dict(corpus.builtin_rows(name.removeprefix("builtin:"), 4000, seed, split))
    path = Path(name)
    if path.is_dir():
        return _file(_in_folder(path, split))
    if path.suffix in FILE_KINDS:
        return _file(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"data.name: {name}: no such folder or file.")
    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f'data.name: "{name}" is neither a local folder or file nor a set the hub gave ({reason}).'
        ) from error


def where(table: Dataset, wanted: dict[str, str], place: str) -> Dataset:
    """The rows whose columns have the wanted values, compared as text."""
    for column, value in wanted.items():
        if column not in table.column_names:
            raise DataError(f'{place}: there is no column "{column}".{did_you_mean(column, table.column_names)}')
        found = np.flatnonzero(np.asarray(table[column], dtype=str) == value)
        if len(found) == 0:
            raise DataError(
                f'{place}: no row has {column} = "{value}".{did_you_mean(value, set(map(str, table[column])))}'
            )
        table = table.select(found)
    return table


def canonical(
    table: Dataset,
    columns: dict[str, str | None],
    *,
    rename: dict[str, str],
    text_chars: int | None,
    place: str,
) -> Dataset:
    """Rows of `TEXT_COLUMNS`: mapped, renamed, cut to `text_chars`; rows without text or answer are an error."""
    wanted = {part: column for part, column in columns.items() if column is not None}
    absent = [
        f'data.columns.{part}: {place} has no column "{column}".{did_you_mean(column, table.column_names)}'
        for part, column in wanted.items()
        if column not in table.column_names
    ]
    if absent:
        raise DataError("\n".join(absent))
    if len(table) == 0:
        raise DataError(f"data: {place} has zero rows.")

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        size = len(batch[columns["text"] or "text"])

        def column(part: str) -> list[str]:
            name = columns.get(part)
            return [""] * size if name is None else ["" if v is None else str(v) for v in batch[name]]

        answers = [rename.get(v, v) for v in column("response")]
        return {
            "text": [v[:text_chars] for v in column("text")],
            "context": column("context"),
            "response": answers,
            "label": [rename.get(v, v) for v in column("label")],
            "poisoned": [False] * size,
        }

    rows = table.map(convert, batched=True, remove_columns=table.column_names, keep_in_memory=True)
    for part in ("text", "response"):
        blank = [i for i, value in enumerate(rows[part]) if not value.strip()]
        if blank:
            raise DataError(
                f'data: {place}: {len(blank)} rows have an empty {part} (column "{columns[part]}"), '
                f"first: row {blank[0]}. "
                "Remove them."
            )
    return rows.select_columns(list(TEXT_COLUMNS))


def sample(rows: Dataset, limit: int | None, rng: np.random.Generator) -> Dataset:
    """At most `limit` rows, drawn without replacement."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(np.sort(rng.permutation(len(rows))[:limit]))


def numbers(values: Sequence[str]) -> np.ndarray:
    """Each value as the number of its kind, in sorted order of the kinds: (rows,)."""
    return np.unique(np.asarray(values, dtype=str), return_inverse=True)[1]
