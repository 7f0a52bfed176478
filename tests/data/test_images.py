"""A folder of images, a folder for each class: read, or refused by file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedllm_sec.data import arrays
from fedllm_sec.errors import DataError


def put(path: Path, shade: int, size: tuple[int, int] = (4, 6), mode: str = "L") -> None:
    """An image of one shade: width and height `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 0)).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for k, name in enumerate(("cat", "dog", "newt")):
        for n in range(4):
            put(tmp_path / name / f"{n}.png", 60 * k + n)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_folders_are_classes_in_the_order_of_their_names(pets: Path):
    with (
        pytest.warns(UserWarning, match="0 cat, 1 dog, 2 newt"),
        pytest.warns(UserWarning, match=r"1 of 13 files are left out, .*; first cat/notes\.txt"),
    ):
        train, test = arrays.load(str(pets), test_share=0.25, seed=1)
    assert (train.x.shape, test.x.shape, train.classes) == ((9, 1, 6, 4), (3, 1, 6, 4), 3)
    for rows in (train, test):
        assert [round(float(x[0, 0, 0]) * 255) // 60 for x in rows.x] == rows.y.tolist()
    again, _ = arrays.load(str(pets), test_share=0.25, seed=1)
    assert np.array_equal(again.x, train.x)


def test_parts_may_be_folders_of_their_own_and_images_are_brought_to_a_size(tmp_path: Path):
    for part, shade in (("train", 10), ("val", 20)):
        put(tmp_path / part / "a" / "1.jpg", shade, (8, 8), "RGB")
        put(tmp_path / part / "b" / "deep" / "2.png", shade + 100, (4, 6))
    train, test = arrays.load(str(tmp_path), test="val", size=(5, 5))
    assert (train.x.shape, test.x.shape) == ((2, 3, 5, 5), (2, 3, 5, 5))
    assert test.y.tolist() == [0, 1]
    assert test.x[1].unique().tolist() == pytest.approx([120 / 255])
    with pytest.raises(DataError, match=r"its images have different sizes \(6 x 4, 8 x 8\)\. Set data\.size"):
        arrays.load(str(tmp_path), test="val")
    with pytest.raises(DataError, match=r"has a folder train and none test"):
        arrays.load(str(tmp_path))
    put(tmp_path / "val" / "c" / "1.png", 1)
    with pytest.raises(DataError, match=r'has a folder "c", which .*train has not'):
        arrays.load(str(tmp_path), test="val")


def test_folders_named_like_parts_are_not_taken_for_classes(tmp_path: Path):
    for part in ("Train", "Test"):
        put(tmp_path / part / "a" / "1.png", 1)
    with pytest.raises(DataError, match=r"named like parts, not like classes.*data.train: Train, data.test: Test"):
        arrays.load(str(tmp_path))


def test_files_that_are_no_images_are_named(pets: Path, tmp_path: Path):
    (pets / "dog" / "bad.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"dog/bad\.png: is a pointer to the file, .* Run `git lfs pull`"):
        arrays.load(str(pets))
    (pets / "dog" / "bad.png").write_bytes(b"\x89PNG\r\n not really")
    with pytest.raises(DataError, match=r"dog/bad\.png: cannot be read as an image"):
        arrays.load(str(pets))
    (pets / "dog" / "bad.png").unlink()
    whole = (pets / "dog" / "1.png").read_bytes()
    (pets / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"dog/1\.png: cannot be read as an image"):
        arrays.load(str(pets))
    (pets / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no image"):
        arrays.load(str(pets))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: has no folder with images"):
        arrays.load(str(tmp_path / "none"))


def test_an_image_of_more_pixels_than_any_camera_makes_is_refused(pets: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedllm_sec.data.images.LARGEST", 10)
    with pytest.raises(DataError, match=r"cat/0\.png: cannot be read as an image \(4 x 6 pixels are more than"):
        arrays.load(str(pets))


def test_sixteen_bits_are_scaled_turned_images_are_turned_and_values_without_a_range_refused(tmp_path: Path):
    for name, value in (("a", 0), ("b", 257 * 40)):
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.fromarray(np.full((4, 6), value + 257 * k, dtype=np.uint16)).save(tmp_path / name / f"{k}.png")
    train, test = arrays.load(str(tmp_path), test_share=0.25)
    assert train.x.shape[1] == 1
    assert sorted(round(float(v) * 255) for x in (train.x, test.x) for v in x.flatten(1).mean(1)) == [0, 1, 40, 41]
    turned = Image.new("L", (6, 4), 9)
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "a" / "0.png", exif=exif)
    with pytest.raises(DataError, match=r"different sizes \(4 x 6, 6 x 4\)"):
        arrays.load(str(tmp_path))
    Image.fromarray(np.zeros((4, 6), dtype=np.float32)).save(tmp_path / "a" / "0.tif")
    with pytest.raises(DataError, match=r"0\.tif: .* of kind F, whose range nobody knows"):
        arrays.load(str(tmp_path))
