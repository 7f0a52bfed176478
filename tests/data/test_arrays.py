"""Images: what is read is what lies in the file, and what cannot be used is refused with its place."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from fedllm_sec.build.names import checked
from fedllm_sec.data import arrays
from fedllm_sec.errors import DataError, RecipeError


def raw(**changes):
    x = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
    y = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)
    return {"x_train": x, "y_train": y, "x_test": x[:3], "y_test": y[:3], **changes}


def test_grey_and_colour_images_become_channels_first_from_0_to_1(tmp_path: Path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", **raw(x_train=colour, x_test=255 - colour[:3]))
    train, test = arrays.load(str(tmp_path / "a.npz"))
    assert train.x.shape == (6, 3, 4, 5)
    assert train.x[4, 2, 1, 3] == np.float32(colour[4, 1, 3, 2]) / np.float32(255)
    assert train.classes == 3
    assert test.y.tolist() == [0, 1, 2]
    assert not train.poisoned.any()
    assert arrays.labelled(raw(), "here")[0].x.shape == (6, 1, 4, 5)


def test_floats_channels_first_names_of_classes_and_one_part_are_read(tmp_path: Path):
    x = np.random.default_rng(0).random((10, 3, 4, 5))
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 0.0, 1.0
    names = np.array(["dog", "cat"] * 5)
    np.savez(tmp_path / "a.npz", x=x, y=names)
    with (
        pytest.warns(UserWarning, match=r"a\.npz: classes by number: 0 cat, 1 dog\."),
        pytest.warns(UserWarning, match="10% of its images, drawn by the seed, are held out"),
    ):
        train, test = arrays.load(str(tmp_path / "a.npz"), seed=3)
    assert (len(train.y), len(test.y), train.classes) == (9, 1, 2)
    both = torch.cat([train.x, test.x])
    assert sorted(both.sum((1, 2, 3)).tolist()) == pytest.approx(sorted(x.sum((1, 2, 3))), rel=1e-6)
    for row, y in zip(both, torch.cat([train.y, test.y]), strict=True):
        at = int(np.argmin(np.abs(x - row.numpy()).sum((1, 2, 3))))
        assert names[at] == ["cat", "dog"][int(y)]
    with pytest.raises(DataError, match=r"data\.test_share: 0\.5: digits has training and test rows of its own"):
        arrays.load("digits", test_share=0.5)
    np.savez(tmp_path / "b.npz", **raw(y_train=np.array(list("abcabc")), y_test=np.array(list("abz"))))
    with pytest.raises(DataError, match="test rows have the class 'z', which no training row has"):
        arrays.load(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", **raw(y_train=np.array(list("abcabc"))))
    with pytest.raises(DataError, match=r"y_train alone holds class names\. Give both parts names, or numbers"):
        arrays.load(str(tmp_path / "c.npz"))


def test_names_of_classes_as_bytes_are_their_text(tmp_path: Path):
    given = raw(y_train=np.array([b"a", "é".encode()] * 3), y_test=np.array([b"a"] * 3), x_test=raw()["x_test"] + 130)
    np.savez(tmp_path / "a.npz", **given)
    with pytest.warns(UserWarning, match="classes by number: 0 a, 1 é"):
        arrays.load(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", **given | {"y_train": np.array([b"a", b"\xff"] * 3)})
    with pytest.raises(DataError, match="y_train holds bytes that are not UTF-8"):
        arrays.load(str(tmp_path / "a.npz"))


def test_numbers_of_classes_that_nobody_has_are_told():
    with pytest.warns(UserWarning, match="from 0 to 13, and 11 of these 14 have no training row"):
        arrays.labelled(raw(y_train=np.array([3, 8, 13] * 2), y_test=np.array([3, 8, 13])), "set")


def test_digits_are_there_without_a_download():
    train, test = arrays.load("digits")
    assert (len(train.y), len(test.y), train.classes) == (1438, 359, 10)
    assert train.x.shape[1:] == (1, 8, 8)
    assert train.x.max() == 1
    assert len(set(test.y.tolist())) == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": np.zeros((6, 4, 5), dtype=np.int32)}, "x_train is int32, must be uint8"),
        (
            {"x_train": np.full((6, 4, 5), 255.0)},
            r"value 255\.0 in row 0 \(all: 255 to 255\); floats must lie from 0 to 1\. Scale it",
        ),
        ({"x_train": np.full((6, 4, 5), np.nan)}, "has the value nan in row 0 .* Remove or fill what is no number"),
        ({"x_train": np.linspace(0, 1.0001, 120).reshape(6, 4, 5)}, r"value 1\.0001 in row 5 \(all: 0 to 1\.0001\)"),
        ({"x_train": np.zeros((6, 20), dtype=np.uint8)}, r"x_train has shape \(6, 20\)"),
        ({"x_train": np.zeros((6, 2, 4, 5), dtype=np.uint8)}, r"1, 3 or 4 channels"),
        ({"x_test": np.zeros((3, 5, 5), dtype=np.uint8)}, r"images of \(5, 5\), x_train of \(4, 5\)"),
        ({"x_train": np.zeros((0, 4, 5), dtype=np.uint8)}, "zero rows"),
        ({"x_train": np.zeros((6, 0, 5), dtype=np.uint8)}, r"shape \(6, 0, 5\): its images have no pixel"),
        ({"y_train": -np.ones(6, dtype=np.int64)}, "label -1 in row 0 .*classes go from 0. Correct"),
        ({"y_train": np.zeros(6)}, "y_train is float64"),
        ({"y_train": np.zeros((6, 3), dtype=np.int64)}, r"of shape \(6, 3\)"),
        ({"y_train": np.zeros(5, dtype=np.int64)}, "6 images but 5 labels"),
        ({"y_train": np.zeros(6, dtype=np.int64)}, "one class only|y_test has label"),
        ({"y_train": np.full(6, 2), "y_test": np.full(3, 2)}, "one class only"),
        ({"y_test": np.array([0, 1, 3])}, "y_test has label 3 in row 2 .*classes go from 0 to 2"),
        ({"y_train": np.array([0, 1, -1, 0, 1, 2])}, "y_train has label -1 in row 2"),
    ],
)
def test_unusable_arrays_are_named(change, words):
    with pytest.raises(DataError, match=words):
        arrays.labelled(raw(**change), "set.npz")


def test_labels_are_judged_in_the_type_they_were_written_in(tmp_path: Path):
    long = np.array([0, 1, 2, 0, 1, 2], np.uint64)
    assert arrays.labelled(raw(y_train=long), "x")[0].y.tolist() == [0, 1, 2, 0, 1, 2]
    long[5] = 2**64 - 1  # no label of -1
    with pytest.raises(DataError, match=r"y_train goes up to 18446744073709551615, .*Number the 4 classes"):
        arrays.labelled(raw(y_train=long), "x")
    with pytest.raises(RecipeError, match=r"data.classes: 1000000000.0: Input should be less than or equal to 100000"):
        checked({"task": "classify", "clients": {"local_steps": 1}, "data": {"classes": 1e9}})


def test_more_classes_than_labels_can_be_asked_for_and_fewer_are_refused():
    assert arrays.labelled(raw(), "set", classes=62)[0].classes == 62
    with pytest.raises(DataError, match="label 2 in row 2"):
        arrays.labelled(raw(), "set", classes=2)


def test_files_that_are_no_npz_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        arrays.load(str(tmp_path / "none.npz"))
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        arrays.load(str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "half.npz", x_train=np.zeros(3), y_trian=np.zeros(3))
    with pytest.raises(DataError, match=r'lacks y_train, x_test, y_test. Did you mean "y_trian"'):
        arrays.load(str(tmp_path / "half.npz"))
    np.savez(tmp_path / "three.npz", x_train=np.zeros(3), y_train=np.zeros(3), x_test=np.zeros(3))
    with pytest.raises(DataError, match=r"lacks y_test\. It has x_train, y_train, x_test\."):
        arrays.load(str(tmp_path / "three.npz"))
    np.savez(tmp_path / "pickle.npz", **{k: np.array([{}], dtype=object) for k in arrays.KEYS})
    with pytest.raises(DataError, match=r"it holds Python objects; reading those is running code\)\. Save numbers"):
        arrays.load(str(tmp_path / "pickle.npz"))
    with pytest.raises(DataError, match=r"or end in \.npz"):
        arrays.load("/data/images.mat")


def npy(header: str) -> bytes:
    """An array file with this header and no data."""
    head = header.encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy("{'descr':'|u1','fortran_order':False,'shape':(10000000000,8,8)}\n"), "cannot be read"),
        (npy("{'descr':'|u1','fortran_order':False,'shape':(-1,8,8)}\n"), "negative dimensions"),
        (npy("__import__('os').mkdir('ran')\n"), "the head of an array is damaged"),
        (npy("(" * 9000 + "\n"), "cannot be read"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "cannot be read"),
        (b"garbage", "x_train is no array"),
    ],
)
def test_an_array_whose_header_lies_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", **{key: values for key, values in raw().items() if key != "x_train"})
    with zipfile.ZipFile("a.npz", "a") as file:
        file.writestr("x_train.npy", content)
    with pytest.raises(DataError, match=words):
        arrays.load("a.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04K\x01.", npy("{}\n")])
def test_a_file_that_is_no_archive_is_no_npz(tmp_path: Path, content: bytes):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="it is no archive"):
        arrays.load(str(tmp_path / "a.npz"))


def test_a_pointer_of_git_lfs_is_no_npz(tmp_path: Path):
    (tmp_path / "a.npz").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"a\.npz: is a pointer to the file, .* Run `git lfs pull`"):
        arrays.load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("kind", ["<f4", ">f4", ">f8", "f2", "g"])
def test_floats_of_any_machine_are_the_same_images(kind: str):
    half = np.full((6, 4, 5), 0.5, kind)
    train, _ = arrays.labelled(raw(x_train=half, y_train=raw()["y_train"].astype(">i4")), "set")
    assert train.x.dtype == torch.float32
    assert train.x.unique().tolist() == [0.5]


def test_any_spoilt_archive_is_read_or_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", **raw(x_test=255 - raw()["x_test"]))
    whole = (tmp_path / "a.npz").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        spoilt = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for at in rng.integers(len(spoilt) or 1, size=3 if spoilt else 0):
            spoilt[at] = rng.integers(256)
        (tmp_path / "a.npz").write_bytes(bytes(spoilt))
        with contextlib.suppress(DataError):
            arrays.load(str(tmp_path / "a.npz"))


def test_class_numbers_with_huge_gaps_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"y_train goes up to 5000000000, .* Number the 6 classes without gaps"):
        arrays.labelled(raw(y_train=np.arange(6) * 10**9), "here")


def table(**more):
    images = np.random.default_rng(1).integers(0, 256, (4, 6, 7), dtype=np.uint8)
    features = Features({"img": Image(), "fine_label": ClassLabel(num_classes=3)})
    columns = {"img": list(images), "fine_label": [0, 1, 2, 0]}
    for name in more:
        features[name] = ClassLabel(num_classes=2)
        columns[name] = [0, 1, 0, 1]
    return images, Dataset.from_dict(columns, features=features)


def test_a_table_of_the_hub_gives_its_image_and_label_columns():
    images, rows = table()
    x, y = arrays.from_table(rows, None, None, "set")
    assert np.array_equal(x, images)
    assert y.tolist() == [0, 1, 2, 0]


def test_an_ambiguous_or_mistyped_column_is_named():
    _, rows = table(coarse_label=1)
    with pytest.raises(DataError, match="2 columns of kind ClassLabel"):
        arrays.from_table(rows, None, None, "set")
    with pytest.raises(DataError, match=r'no column "fine_lable".*Did you mean "fine_label"'):
        arrays.from_table(rows, None, "fine_lable", "set")
    assert arrays.from_table(rows, None, "coarse_label", "set")[1].tolist() == [0, 1, 0, 1]


def test_test_images_that_are_training_images_are_counted_and_all_of_them_are_an_error(tmp_path: Path):
    x = raw()["x_train"]
    np.savez(tmp_path / "some.npz", **raw(x_test=np.stack([x[0], 255 - x[1], 255 - x[2]])))
    with pytest.warns(UserWarning, match="1 of 3 test images are training images too"):
        arrays.load(str(tmp_path / "some.npz"))
    np.savez(tmp_path / "all.npz", **raw())
    with pytest.raises(DataError, match="all 3 test images are training images too"):
        arrays.load(str(tmp_path / "all.npz"))


def test_a_sample_keeps_rows_whole():
    train, _ = arrays.labelled(raw(), "set")
    few = arrays.sample(train, 2, np.random.default_rng(0))
    assert len(few.y) == 2
    for x, y in zip(few.x, few.y, strict=True):
        at = next(i for i in range(6) if torch.equal(train.x[i], x))
        assert train.y[at] == y


def test_real_images_load(shared: Path):
    train, test = arrays.load(str(shared / "data/cifar10_jpeg_10k.npz"))
    assert train.x.shape == (10_000, 3, 32, 32)
    assert len(test.y) == 2_000
    assert train.classes == 10


@pytest.mark.parametrize("setting", [{"config": "x"}, {"image": "foo"}, {"train": "bar"}, {"label": "y"}])
def test_a_setting_of_hub_sets_cannot_act_on_digits(setting):
    with pytest.raises(DataError, match=f"data.{next(iter(setting))}: .*names a part of a hub set; digits is none"):
        arrays.load("digits", **setting)
