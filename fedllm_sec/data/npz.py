"""Images and labels in a .npz file of numpy: read without unpickling, or refused with the reason and a way out."""

from __future__ import annotations

from pathlib import Path
from zipfile import is_zipfile

import numpy as np

from fedllm_sec.data.signs import BEGIN, refuse_stand_ins
from fedllm_sec.errors import DataError
from fedllm_sec.recipe import places
from fedllm_sec.recipe.resolve import did_you_mean

KEYS = ("x_train", "y_train", "x_test", "y_test")
ONE = ("x", "y")  # of a file in one part


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name: those of KEYS, or x and y."""
    if not path.expanduser().is_file():
        raise DataError(f"data.name: {path}: no such file in {places.here()}. Give one that exists.")
    if not is_zipfile(path.expanduser()):
        with path.expanduser().open("rb") as begun:
            refuse_stand_ins(begun.read(BEGIN), str(path))
        raise DataError(f"data: {path} cannot be read as .npz (it is no archive). Write it with numpy.savez.")
    try:
        with np.load(path.expanduser(), allow_pickle=False) as file:
            keys = KEYS if any(key in file.files for key in KEYS) or not {*ONE} <= {*file.files} else ONE
            if missing := [key for key in keys if key not in file.files]:
                others = sorted({*file.files} - {*KEYS})
                hint = did_you_mean(missing[0], others) if others else f" It has {', '.join(file.files) or 'none'}."
                raise DataError(f"data: {path} lacks {', '.join(missing)}.{hint}")
            found = {key: file[key] for key in keys}
    except DataError:
        raise
    except Exception as error:  # anybody may have written it: numpy and zipfile raise kinds of every sort
        reason, way_out = (str(error).splitlines() or [type(error).__name__])[0].rstrip("."), "Copy it again."
        if "allow_pickle" in reason:
            reason, way_out = "it holds Python objects; reading those is running code", "Save numbers, or text."
        elif "malformed node" in reason:
            reason = "the head of an array is damaged"
        raise DataError(f"data: {path} cannot be read as .npz ({reason}). {way_out}") from error
    for key, values in found.items():
        if not isinstance(values, np.ndarray):
            raise DataError(f"data: {path}: {key} is no array. Write the file with numpy.savez.")
        if values.dtype.kind == "S":  # text as C and h5py have it
            try:
                found[key] = np.char.decode(values, "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"data: {path}: {key} holds bytes that are not UTF-8. Save it as text.") from error
    return found
