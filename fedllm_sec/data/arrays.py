"""Images with class labels: scikit-learn's digits, a local .npz, or a set from the hub, as `Labelled` tensors."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedllm_sec.data.images import image_folder
from fedllm_sec.data.npz import KEYS, read_npz
from fedllm_sec.errors import DataError
from fedllm_sec.protocols import Labelled
from fedllm_sec.recipe import places
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.recipe.section import MOST_CLASSES
from fedllm_sec.seeds import seed_for

if TYPE_CHECKING:
    from datasets import Dataset

CHANNELS = (1, 3, 4)
SHARE = 0.1  # of the images of a set in one part


def load(
    name: str,
    config: str | None = None,
    train: str = "train",
    test: str = "test",
    image: str | None = None,
    label: str | None = None,
    classes: int | None = None,
    *,
    size: tuple[int, int] | None = None,
    test_share: float | None = None,
    seed: int = 0,
) -> tuple[Labelled, Labelled]:
    """Clean training and test rows; images of a folder are brought to `size`, height and width.

    Of a set in one part a share is held out, drawn by the seed.
    """
    folder = os.path.isdir(os.path.expanduser(name))
    if name == "digits" or name.lower().endswith(".npz") or folder:
        given: dict[str, Any] = {"config": config, "image": image, "label": label}
        if not folder:
            given |= {"train": train != "train" and train, "test": test != "test" and test}
        if idle := next((key for key, value in given.items() if value), None):
            raise DataError(f"data.{idle}: {given[idle]}: names a part of a hub set; {name} is none. Remove it.")
    if folder:
        raw = image_folder(Path(name).expanduser(), train, test, size)
    elif name == "digits":
        raw = _digits()
    elif name.lower().endswith(".npz"):
        raw = read_npz(Path(name))
    elif places.is_local(name) or os.path.exists(name):
        raise DataError(
            f"data.name: {name}: must be a folder with one of images for each class, or end in .npz, with the arrays "
            f"{', '.join(KEYS)}, or x and y."
        )
    else:
        hub, known_image, known_label = places.IMAGE_SETS.get(name, (name, None, None))
        raw = {}
        for part, split in (("train", train), ("test", test)):
            table = _hub_table(name, hub, config, split)
            raw[f"x_{part}"], raw[f"y_{part}"] = from_table(table, image or known_image, label or known_label, name)
    if drawn := "x" in raw:
        raw = _parted(raw, test_share, seed, name)
    elif test_share is not None:
        raise DataError(f"data.test_share: {test_share:g}: {name} has training and test rows of its own. Remove it.")
    made = labelled(_numbered(raw, name, drawn), name, classes)
    refuse_same(raw["x_train"], raw["x_test"], name)
    return made


def _parted(raw: dict[str, np.ndarray], share: float | None, seed: int, place: str) -> dict[str, np.ndarray]:
    """A set in one part as training and held-out rows, at least one of each, drawn by the seed."""
    x, y = raw["x"], raw["y"]
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise DataError(f"data: {place}: x has shape {x.shape} and y {y.shape}: they must have a row for each image.")
    if len(x) < 2:
        raise DataError(f"data: {place}: has {len(x)} image, so none can be held out. Give more.")
    if share is None:
        warnings.warn(
            f"data: {place} is training and test set: {SHARE:.0%} of its images, drawn by the seed, are held out. Set "
            "data.test_share to choose.",
            stacklevel=3,
        )
    held = np.zeros(len(x), dtype=bool)
    count = min(max(1, round((share or SHARE) * len(x))), len(x) - 1)
    held[np.random.default_rng(seed_for(seed, "rows", "held out")).permutation(len(x))[:count]] = True
    return {"x_train": x[~held], "y_train": y[~held], "x_test": x[held], "y_test": y[held]}


def _numbered(raw: dict[str, np.ndarray], place: str, drawn: bool) -> dict[str, np.ndarray]:
    """Class names as numbers in the order of the names; numbers stay as they are."""
    named = [part for part in ("train", "test") if raw[f"y_{part}"].dtype.kind in "US" and raw[f"y_{part}"].ndim == 1]
    if len(named) == 1:
        raise DataError(f"data: {place}: y_{named[0]} alone holds class names. Give both parts names, or numbers.")
    if not named:
        return raw
    names = sorted(set(raw["y_train"].tolist()))
    number = {name: k for k, name in enumerate(names)}
    if strange := sorted(set(raw["y_test"].tolist()) - number.keys()):
        raise DataError(
            f"data: {place}: test rows have the class {strange[0]!r}, which no training row has. "
            + ("Give more rows of it, or training and test rows apart." if drawn else "Give training rows of it.")
        )
    told = ", ".join(f"{k} {name!s}" for name, k in number.items())
    warnings.warn(f"data: {place}: classes by number: {told[:500]}.", stacklevel=3)
    return raw | {f"y_{part}": np.array([number[y] for y in raw[f"y_{part}"].tolist()]) for part in ("train", "test")}


def refuse_same(train: np.ndarray, test: np.ndarray, place: str) -> None:
    """Test images that are training images too are counted and said; where all are, nothing is held out: an error."""
    known = {image.tobytes() for image in train}
    both = sum(image.tobytes() in known for image in test)
    if both == len(test):
        raise DataError(f"data: {place}: all {both} test images are training images too. Give others as test.")
    if both:
        warnings.warn(
            f"data: {place}: {both} of {len(test)} test images are training images too: what is measured on those is "
            "not held out.",
            stacklevel=2,
        )


def labelled(raw: dict[str, np.ndarray], place: str, classes: int | None = None) -> tuple[Labelled, Labelled]:
    """Checked arrays as tensors: x (n, channels, height, width) float32 in [0, 1], y (n,) int64."""
    for part in ("train", "test"):
        x, y = raw[f"x_{part}"], raw[f"y_{part}"]
        where = f"data: {place}: x_{part}"
        if x.dtype != np.uint8 and x.dtype.kind != "f":
            raise DataError(f"{where} is {x.dtype}, must be uint8 from 0 to 255, or floats from 0 to 1. Convert it.")
        if x.dtype.kind == "f" and not bool(((x >= 0) & (x <= 1)).all()):
            row, *_ = first = tuple(np.argwhere(~((x >= 0) & (x <= 1)))[0])
            way_out = "Scale it." if np.isfinite(x[first]) else "Remove or fill what is no number."
            raise DataError(
                f"{where} has the value {x[first]!s} in row {row} (all: {np.nanmin(x, initial=np.inf):.6g} to "
                f"{np.nanmax(x, initial=-np.inf):.6g}); floats must lie from 0 to 1. {way_out}"
            )
        if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in CHANNELS and x.shape[1] not in CHANNELS):
            raise DataError(
                f"{where} has shape {x.shape}, must be (rows, height, width), or (rows, height, width, channels) or "
                "(rows, channels, height, width) with 1, 3 or 4 channels. Move the axes."
            )
        if len(x) == 0:
            raise DataError(f"{where} has zero rows.")
        if x.size == 0:
            raise DataError(f"{where} has shape {x.shape}: its images have no pixel. Write the images themselves.")
        if x.shape[1:] != raw["x_train"].shape[1:]:
            raise DataError(
                f"{where} has images of {x.shape[1:]}, x_train of {raw['x_train'].shape[1:]}. They must agree."
            )
        if y.ndim != 1 or y.dtype.kind not in "iu":
            raise DataError(
                f"data: {place}: y_{part} is {y.dtype} of shape {y.shape}, must be one integer a row. "
                "Give class numbers from 0."
            )
        if len(y) != len(x):
            raise DataError(f"data: {place}: {len(x)} images but {len(y)} labels in the {part} part.")
    known = classes if classes is not None else int(raw["y_train"].max()) + 1
    present = len(np.unique(raw["y_train"]))
    idle = known - present
    if known > MOST_CLASSES:
        raise DataError(
            f"data: {place}: y_train goes up to {known - 1}, and a model has an output for each class from 0 on. "
            f"Number the {present} classes without gaps."
        )
    for part in ("train", "test"):
        y = raw[f"y_{part}"]  # in the type of the file: the largest uint64 is no -1
        wrong = np.flatnonzero((y < 0) | (y >= known))
        if len(wrong):
            raise DataError(
                f"data: {place}: y_{part} has label {y[wrong[0]]} in row {wrong[0]} ({len(wrong)} such rows); classes "
                f"go from 0{f' to {known - 1}' if known > 0 else ''}. Correct the labels or set data.classes."
            )
    if min(known, present) < 2:
        raise DataError(f"data: {place}: y_train holds one class only. Give at least two.")
    if idle and classes is None:
        warnings.warn(
            f"data: {place}: classes go from 0 to {known - 1}, and {idle} of these {known} have no training row: the "
            "model has an output for each of them all the same. Number the classes without gaps.",
            stacklevel=2,
        )

    def made(part: str) -> Labelled:
        images = raw[f"x_{part}"]
        if images.dtype.kind == "f":  # torch knows neither the bytes of another machine nor float128
            images = images.astype(np.float32)
        x = torch.from_numpy(np.ascontiguousarray(images))
        if x.ndim == 3:
            x = x[:, None]
        elif x.shape[3] in CHANNELS:  # also where the first axis might be channels: rows of a few pixels are rare
            x = x.permute(0, 3, 1, 2)
        y = torch.from_numpy(raw[f"y_{part}"].astype(np.int64))
        x = x.contiguous().float() / 255 if x.dtype == torch.uint8 else x.contiguous()
        return Labelled(x, y, known, torch.zeros(len(y), dtype=torch.bool))

    return made("train"), made("test")


def _digits() -> dict[str, np.ndarray]:
    """1,797 handwritten digits of 8x8; every fifth is held out."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    x = np.round(found.images * (255 / 16)).astype(np.uint8)
    held = np.arange(len(x)) % 5 == 4
    return {
        "x_train": x[~held],
        "y_train": found.target[~held],
        "x_test": x[held],
        "y_test": found.target[held],
    }


def _hub_table(name: str, hub: str, config: str | None, split: str) -> Dataset:
    problem = places.hub_problem()
    from datasets import load_dataset

    try:
        return load_dataset(hub, config, split=split)
    except Exception as error:  # the hub client raises many kinds
        reason = problem or f"it says: {places.why(error)}"
        known = ["digits", *places.IMAGE_SETS]
        way_out = " Give a local .npz." if name in known else did_you_mean(name, known)
        raise DataError(
            f'data.name: "{name}" is neither digits, a local .npz nor a set the hub gave ({reason}).{way_out}'
        ) from error


def from_table(table: Dataset, image: str | None, label: str | None, place: str) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of a `datasets` table: its only image column and its only label column, unless they are named."""
    image = _column(table, "Image", image, place, "image")
    label = _column(table, "ClassLabel", label, place, "label")
    decoded = table.select_columns([image, label]).with_format("numpy")
    images = decoded[image][:]
    if isinstance(images, list) or images.dtype == object:
        shapes = sorted({np.shape(i) for i in images})
        raise DataError(f"data: {place}: images of different shapes {shapes[:3]}. Resize them to one.")
    return np.asarray(images), np.asarray(decoded[label][:])


def _column(table: Dataset, kind: str, named: str | None, place: str, setting: str) -> str:
    if named is not None:
        if named not in table.column_names:
            raise DataError(
                f'data.{setting}: {place} has no column "{named}".{did_you_mean(named, table.column_names)}'
            )
        return named
    fitting = [c for c, feature in table.features.items() if type(feature).__name__ == kind]
    if len(fitting) != 1:
        raise DataError(
            f"data: {place} has {len(fitting)} columns of kind {kind} among {', '.join(table.column_names)}. "
            f"Name one with data.{setting}."
        )
    return fitting[0]


def subset(rows: Labelled, at: np.ndarray | torch.Tensor) -> Labelled:
    """The chosen rows."""
    index = torch.as_tensor(at, dtype=torch.long)
    fixed = None if rows.fixed is None else rows.fixed[index]
    return replace(rows, x=rows.x[index], y=rows.y[index], poisoned=rows.poisoned[index], fixed=fixed)


def sample(rows: Labelled, limit: int | None, rng: np.random.Generator) -> Labelled:
    """At most `limit` rows, drawn without replacement, in their order."""
    if limit is None or limit >= len(rows.y):
        return rows
    return subset(rows, np.sort(rng.permutation(len(rows.y))[:limit]))


def to_device(rows: Labelled, device: torch.device) -> Labelled:
    """The rows in the memory of the device, where batches are then cut from them."""
    fixed = None if rows.fixed is None else rows.fixed.to(device)
    return replace(rows, x=rows.x.to(device), y=rows.y.to(device), poisoned=rows.poisoned.to(device), fixed=fixed)
