"""A folder of images, a folder for each class, as arrays."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedllm_sec.data.signs import BEGIN, refuse_stand_ins
from fedllm_sec.errors import DataError, reason
from fedllm_sec.recipe.resolve import did_you_mean

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
GREY = {"1", "L", "LA", "I;16", "I;16L", "I;16B", "I;16N"}  # modes of images without colour
DEEP = {"I", "F"}  # whose values have no agreed range
OF_THE_SYSTEM = {"Thumbs.db", "desktop.ini"}
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
LARGEST = 10**8  # pixels of an image


def image_folder(folder: Path, train: str, test: str, size: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """x and y of each part where the folder has folders `train` and `test`, else of all; y are the classes' names.

    x (rows, height, width) or (rows, height, width, 3) uint8: grey where all images are. They have one size, or are
    brought to `size`, height and width; a picture that moves counts by its first frame, one with a see-through ground
    without it.
    """
    parts = {"train": folder / train, "test": folder / test}
    if all(path.is_dir() for path in parts.values()):
        found = {part: _files(path) for part, path in parts.items()}
        known = {name for _, name in found["train"]}
        if strange := sorted({name for _, name in found["test"]} - known):
            raise DataError(
                f'data: {parts["test"]}: has a folder "{strange[0]}", which {parts["train"]} has not.'
                f"{did_you_mean(strange[0], known)}"
            )
        keys = {"train": "_train", "test": "_test"}
    elif any(path.is_dir() for path in parts.values()):
        there, lost = sorted(parts.values(), key=lambda path: not path.is_dir())
        raise DataError(f"data: {folder}: has a folder {there.name} and none {lost.name}. Name both, or neither.")
    else:
        found, keys = {"all": _files(folder)}, {"all": ""}
        _refuse_parts(folder, {name for _, name in found["all"]})
    grey = all(_mode(path) in GREY for files in found.values() for path, _ in files)
    raw: dict[str, np.ndarray] = {}
    for part, files in found.items():
        raw[f"x{keys[part]}"] = _stacked([_pixels(path, grey, size) for path, _ in files], folder)
        raw[f"y{keys[part]}"] = np.array([name for _, name in files])
    return raw


def _refuse_parts(folder: Path, classes: set[str]) -> None:
    """Raise where what would be classes are named like parts of a data set."""
    if len(classes) > 1 and all(name.casefold() in PARTS for name in classes):
        first = sorted(classes, key=lambda name: "train" not in name.casefold())
        raise DataError(
            f"data: {folder}: its folders {', '.join(first)} are named like parts, not like classes. Name them: "
            f"data.train: {first[0]}, data.test: {first[1]}."
        )


def _files(folder: Path) -> list[tuple[Path, str]]:
    """Each image and its class, in the order of their names; what has another ending is left out, and said."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    held = [
        (path, of.name)
        for of in classes
        for path in sorted(of.rglob("*"))
        if not path.is_dir() and not path.name.startswith(".") and path.name not in OF_THE_SYSTEM
    ]
    found = [(path, name) for path, name in held if path.suffix.lower() in ENDINGS and path.is_file()]
    if found and (left := sorted({path for path, _ in held} - {path for path, _ in found})):
        warnings.warn(
            f"data: {folder}: {len(left)} of {len(held)} files are left out, being none of {', '.join(ENDINGS)}; first "
            f"{left[0].relative_to(folder)}.",
            stacklevel=3,
        )
    if not found:
        raise DataError(
            f"data: {folder}: has no folder with images ({', '.join(ENDINGS)}). Put those of each class into a folder "
            "of its name."
        )
    bare = [of.name for of in classes if of.name not in {name for _, name in found}]
    if bare:
        raise DataError(
            f"data: {folder / bare[0]}: holds no image ({', '.join(ENDINGS)}). Remove it, or name its files so."
        )
    return found


def _open(path: Path) -> Image.Image:
    from PIL import Image

    made = Image.open(path)
    if made.width * made.height > LARGEST:
        raise ValueError(f"{made.width} x {made.height} pixels are more than {LARGEST:.0e}")
    return made


def _mode(path: Path) -> str:
    try:
        with _open(path) as image:
            return str(image.mode)
    except Exception as error:  # anybody may have written it: PIL raises many kinds
        with contextlib.suppress(OSError), path.open("rb") as file:
            refuse_stand_ins(file.read(BEGIN), str(path))
        raise DataError(f"data: {path}: cannot be read as an image ({reason(error)}). Remove it.") from error


def _pixels(path: Path, grey: bool, size: tuple[int, int] | None) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with _open(path) as image:
            made = _eight_bits(ImageOps.exif_transpose(image)).convert("L" if grey else "RGB")
            if size is not None and (made.height, made.width) != size:
                made = made.resize(size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(made)
    except Exception as error:
        raise DataError(f"data: {path}: cannot be read as an image ({reason(error)}). Remove it.") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with values from 0 to 255: of 16 bits the upper 8."""
    from PIL import Image

    if image.mode in DEEP:
        raise ValueError(f"its values are of kind {image.mode}, whose range nobody knows; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    return image


def _stacked(images: list[np.ndarray], folder: Path) -> np.ndarray:
    shapes = sorted({image.shape[:2] for image in images})
    if len(shapes) > 1:
        told = ", ".join(f"{height} x {width}" for height, width in shapes[:3])
        raise DataError(
            f"data: {folder}: its images have different sizes ({told}). Set data.size to bring them to one."
        )
    return np.stack(images)
