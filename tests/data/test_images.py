"""Digits, npz and idx files: pixels from 0 to 1, parts that do not overlap, and what is said about bad files."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from e2e_sae.data.images import DIGITS, ImageData, _columns, load_images
from e2e_sae.errors import MissingFileError, UserError


def numbered(n: int, first: int = 0) -> tuple[Any, Any]:
    """Images of 2 x 3 pixels that all differ (the first two pixels count), and labels from 0 to 4."""
    numbers = np.arange(first, first + n)
    pixels = np.zeros((n, 2, 3), dtype=np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1], pixels[:, 1, 2] = numbers // 250, numbers % 250, 255
    return pixels, (numbers % 5).astype(np.uint8)


def write_idx(path: Path, array: Any) -> None:
    content = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def numbers_in(part: Any) -> list[int]:
    return [round(a * 255) * 250 + round(b * 255) for a, b in part.pixels[:, :2].tolist()]


def check_numbered(data: ImageData) -> None:
    """200 training and 50 test images of `numbered`, a tenth of the former for validation."""
    assert (data.height_width, data.d_in, data.n_classes) == ((2, 3), 6, 5)
    assert numbers_in(data.test) == list(range(200, 250))
    train, valid = numbers_in(data.train), numbers_in(data.valid)
    assert len(valid) == 20
    assert sorted(train + valid) == list(range(200))
    for part in data[:3]:
        assert part.labels.tolist() == [n % 5 for n in numbers_in(part)]
        assert part.pixels.dtype == torch.float32
        assert part.pixels[:, 5].eq(1).all()


@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")],
)
def test_npz_files_under_either_set_of_names(tmp_path: Path, names: tuple[str, ...]):
    arrays = (*numbered(200), *numbered(50, first=200))
    np.savez(tmp_path / "data.npz", **dict(zip(names, arrays, strict=True)))
    check_numbered(load_images(str(tmp_path / "data.npz")))


@pytest.mark.parametrize(
    "form", ["{}-{}-ubyte", "{}-{}-ubyte.gz", "{}.{}-ubyte", "MNIST/raw/{}-{}-ubyte"], ids=["-", "gz", ".", "raw"]
)
def test_idx_files_in_the_forms_they_are_handed_around_in(tmp_path: Path, form: str):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for stem, (pixels, labels) in {"train": numbered(200), "t10k": numbered(50, first=200)}.items():
        write_idx(tmp_path / form.format(f"{stem}-images", "idx3"), pixels)
        write_idx(tmp_path / form.format(f"{stem}-labels", "idx1"), labels)
    check_numbered(load_images(str(tmp_path)))


def test_data_without_a_test_part_are_split_in_three(tmp_path: Path):
    pixels, labels = numbered(200)
    np.savez(tmp_path / "data.npz", images=pixels, labels=labels)
    data = load_images(str(tmp_path / "data.npz"))
    parts = [numbers_in(part) for part in (data.train, data.valid, data.test)]
    assert [len(part) for part in parts] == [144, 16, 40]
    assert sorted(n for part in parts for n in part) == list(range(200))
    again = load_images(str(tmp_path / "data.npz"))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(data[:3], again[:3], strict=True))


def test_floats_up_to_one_stay_and_others_are_divided_by_255(tmp_path: Path):
    pixels, labels = numbered(200)
    for scale in (1 / 255, 1.0):
        np.savez(tmp_path / "data.npz", images=pixels.astype(np.float64) * scale, labels=labels)
        data = load_images(str(tmp_path / "data.npz"))
        assert data.train.pixels.max() == 1
        assert sorted(numbers_in(data.train) + numbers_in(data.valid) + numbers_in(data.test)) == list(range(200))


def test_digits_need_no_file_and_have_every_class_in_every_part():
    data = load_images(DIGITS)
    assert (data.height_width, data.n_classes) == ((8, 8), 10)
    assert sum(len(part.labels) for part in data[:3]) == 1797
    assert data.train.pixels.max() == 1
    assert all(len(part.labels.unique()) == 10 for part in data[:3])


def test_columns_of_a_hub_data_set_become_arrays():
    import datasets
    from PIL import Image

    pixels, labels = numbered(12)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.fromarray(image) for image in pixels], "label": labels.tolist()}
    arrays = _columns(datasets.Dataset.from_dict(rows, features=features))
    assert np.array_equal(arrays.pixels, pixels)
    assert np.array_equal(arrays.labels, labels)


def test_the_hub_out_of_reach_is_one_line():
    with pytest.raises(
        MissingFileError, match=r"'ylecun/mnist' cannot be had from the hub .*expected 'digits'"
    ) as raised:
        load_images("hub")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.zeros(3)}, "holds a: expected x_train, y_train, x_test, y_test or"),
        ({"images": np.zeros((20, 4)), "labels": np.zeros(20, int)}, r"expected images \[image, height, width\]"),
        ({"images": np.zeros((20, 2, 2)), "labels": np.zeros(19, int)}, r"got \[20, 2, 2\] and \[19\]"),
        ({"images": np.zeros((9, 2, 2)), "labels": np.zeros(9, int)}, "holds 9 images: expected at least 10"),
        ({"images": np.zeros((20, 2, 2)), "labels": np.zeros(20)}, "labels must be whole numbers"),
        ({"images": np.full((20, 2, 2), -1), "labels": np.zeros(20, int)}, "pixels must be numbers from 0 to 255"),
        ({"images": np.full((20, 2, 2), np.nan), "labels": np.zeros(20, int)}, "pixels must be numbers from 0 to 255"),
        ({"images": np.array([{}] * 20), "labels": np.zeros(20, int)}, "no .npz file of plain arrays"),
    ],
)
def test_npz_files_that_hold_no_labelled_images(tmp_path: Path, arrays: dict[str, Any], words: str):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UserError, match=words):
        load_images(str(tmp_path / "data.npz"))


def test_damaged_and_missing_files_are_named(tmp_path: Path):
    (tmp_path / "data.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(UserError, match=r"data\.npz' is damaged or no \.npz"):
        load_images(str(tmp_path / "data.npz"))
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"of an unknown kind '\.csv': expected 'digits'"):
        load_images(str(tmp_path / "data.csv"))
    with pytest.raises(MissingFileError, match="no such data: 'digit'"):
        load_images("digit")
    with pytest.raises(MissingFileError, match=r"no train-images-idx3-ubyte \(or \.gz\)"):
        load_images(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no idx file of unsigned bytes: it begins with nothing"),
        (b"\0\0\x0d\x01\0\0\0\x01", "it begins with 00 00 0d 01"),
        (b"\0\0\x08\x03\0\0\0\x02", "no idx file"),
        (b"\0\0\x08\x01\0\0\0\x05abc", r"3 bytes of data, expected \[5\]"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, content: bytes, words: str):
    for stem, (pixels, labels) in {"train": numbered(200), "t10k": numbered(50)}.items():
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte", pixels)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte", labels)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_images(str(tmp_path))
