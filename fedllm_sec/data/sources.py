"""Where a table lies: a file or folder of this disk, a built-in family, or a set of the hub."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from fedllm_sec.data.files import ENDINGS, PACKED, ending, read_file
from fedllm_sec.data.tables import Table, of_dataset
from fedllm_sec.errors import DataError
from fedllm_sec.recipe import places
from fedllm_sec.recipe.resolve import did_you_mean

SAVED = "state.json"  # in a folder that `Dataset.save_to_disk` wrote


def file_of(name: str, split: str) -> Path | None:
    """The file that holds a split; None where the name is not one of this disk."""
    if name.startswith("builtin:"):
        return None
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike Path's, also False for what no path can be
        return _in_folder(path, split)
    if os.path.isfile(path):
        return path
    if os.path.exists(path):  # reading a pipe would wait for ever
        raise DataError(f"data.name: {name}: is a pipe or a device. Save what comes out of it as a file.")
    if os.path.islink(path):
        raise DataError(f"data.name: {name}: is a link to {os.readlink(path)}, where nothing is. Mend the link.")
    if places.is_local(name) or ending(path) is not None:
        where = "" if path.is_absolute() else f" in {places.here()}"
        raise DataError(f"data.name: {name}: no such folder or file{where}. Give one that exists.")
    return None


def _in_folder(folder: Path, split: str) -> Path:
    """`split` as a file of the folder: a full file name, or a stem with a known ending; or as `datasets` saves it."""
    if (folder / SAVED).is_file():
        return folder
    if (folder / split / SAVED).is_file():
        return folder / split
    if ending(Path(split)) is not None:
        if (folder / split).is_dir():
            raise DataError(f"data: {folder / split} is a folder. Name it as data.name, or write one file.")
        if not (folder / split).is_file():
            raise DataError(f"data: {folder / split}: no such file.{did_you_mean(split, _tables(folder))}")
        return folder / split
    kinds = (*ENDINGS, *(f"{kind}{PACKED}" for kind in ENDINGS))
    found = [path for kind in kinds if (path := folder / f"{split}{kind}").is_file()]
    parts = f"{glob.escape(split)}-00000-of-*.parquet"
    found += [first[0] for part in (folder, folder / "data") if (first := sorted(part.glob(parts)))]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise DataError(f'data: {folder} has {names} for split "{split}". Name the file, as data.train or data.test.')
    if found:
        return found[0]
    if inner := next((path for path in sorted(folder.iterdir()) if path.is_dir() and any(path.glob(parts))), None):
        raise DataError(f'data: {folder} has no file for split "{split}", its folder {inner.name} has. Name that.')
    raise DataError(
        f'data: {folder} has no file for split "{split}".{did_you_mean(split, _tables(folder))} Name a file as '
        f"data.train or data.test, or save the split as {split}.parquet, {split}.jsonl or {split}.csv."
    )


def _tables(folder: Path) -> list[str]:
    """What could be a split: files, and the folders of a saved DatasetDict."""
    saved = [path.parent.name for path in folder.glob(f"*/{SAVED}")]
    files = [path.name for path in folder.iterdir() if ending(path) is not None and path.name != "dataset_dict.json"]
    return sorted(saved + files)


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
