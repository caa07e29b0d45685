"""Labelled grey images: scikit-learn's digits (in its package, no download), MNIST files, or MNIST from the hub.

Validation images are kept out of the training part, so that the test part is looked at once, at the end. The
split depends on the data only, not on a run's seed: whatever loads the data again gets the same parts.
"""

import gzip
import os
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import AfterValidator
from torch import Tensor

from e2e_sae.errors import MissingFileError, UserError
from e2e_sae.seeds import seed_for
from e2e_sae.types import path_candidates

DIGITS = "digits"
HUB = "hub"
HUB_NAME = "ylecun/mnist"
EXPECTED = f"'{DIGITS}' (scikit-learn's), '{HUB}' ({HUB_NAME}), an .npz file or a folder of idx files"
VALID_FRACTION = 0.1
"""Share of the training images that is kept for validation."""
TEST_FRACTION = 0.2
"""Share that is kept for testing where the data bring no test part."""
NPZ_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", None, None),
)
IDX_STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")


def _image_source(given: str, info: Any) -> str:
    if given in (DIGITS, HUB):
        return given
    places = path_candidates(given, info)
    for place in places:
        if os.path.exists(place):
            return str(place)
    looked = " and ".join(f"'{p}'" for p in places)
    raise ValueError(f"no such file or folder: '{given}' (looked at {looked}); expected {EXPECTED}")


ImageSource = Annotated[str, AfterValidator(_image_source)]
"""`digits`, `hub`, or an existing file or folder (stored absolute)."""


class Images(NamedTuple):
    """One part of the data."""

    pixels: Float[Tensor, "image d_in"]
    """From 0 to 1, row by row."""
    labels: Int64[Tensor, " image"]
    """From 0."""


class ImageData(NamedTuple):
    """All parts."""

    train: Images
    valid: Images
    test: Images
    height_width: tuple[int, int]
    """Of one image, in pixels."""

    @property
    def d_in(self) -> int:
        """Pixels of one image."""
        return self.height_width[0] * self.height_width[1]

    @property
    def n_classes(self) -> int:
        """One more than the greatest label."""
        return 1 + max(int(part.labels.max()) for part in (self.train, self.valid, self.test))


class _Arrays(NamedTuple):
    """Images [image, height, width] and labels as they were stored."""

    pixels: Any
    labels: Any
    white: float | None = None
    """The greatest possible pixel; None: 255, or 1 for floats that do not exceed it."""


def load_images(source: str) -> ImageData:
    """Returns the images of an `ImageSource`.

    Raises:
        UserError: there is nothing of that name, or it holds no labelled images.
    """
    path = Path(source)
    if source == DIGITS:
        train, test = _digits(), None
    elif source == HUB:
        train, test = _hub()
    elif path.is_dir():
        train, test = _idx_folder(path)
    elif path.suffix == ".npz" and path.is_file():
        train, test = _npz(path)
    elif path.exists():
        raise UserError(f"'{source}' is of an unknown kind '{path.suffix}': expected {EXPECTED}")
    else:
        raise MissingFileError(f"no such data: '{source}': expected {EXPECTED}")
    known = _images(source, train)
    rest, tested = _split(known, TEST_FRACTION, "test") if test is None else (known, _images(source, test))
    if test is not None and test.pixels.shape[1:] != train.pixels.shape[1:]:
        raise UserError(f"'{source}': training and test images differ in size")
    trained, valid = _split(rest, VALID_FRACTION, "valid")
    height, width = train.pixels.shape[1:]
    return ImageData(trained, valid, tested, (height, width))


def _split(images: Images, fraction: float, purpose: str) -> tuple[Images, Images]:
    """Returns (the rest, a random share); both keep the order of the images."""
    n = len(images.labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_for(0, "image_split", purpose)))
    n_kept = max(1, round(n * fraction))
    kept, rest = order[:n_kept].sort().values, order[n_kept:].sort().values
    return Images(*(t[rest] for t in images)), Images(*(t[kept] for t in images))


def _images(source: str, arrays: _Arrays) -> Images:
    """Returns stored arrays as images, after looking at their shapes and values."""
    pixels, labels = arrays.pixels, arrays.labels
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
        raise UserError(
            f"'{source}': expected images [image, height, width] and labels [image], "
            f"got {list(pixels.shape)} and {list(labels.shape)}"
        )
    if len(labels) < 10:
        raise UserError(f"'{source}' holds {len(labels)} images: expected at least 10")
    if labels.dtype.kind not in "ui" or labels.min() < 0:
        raise UserError(f"'{source}': labels must be whole numbers from 0")
    if pixels.dtype.kind not in "uif" or not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
        raise UserError(f"'{source}': pixels must be numbers from 0 to 255, or from 0 to 1")
    is_unit = pixels.dtype.kind == "f" and pixels.max() <= 1
    white = arrays.white or (1.0 if is_unit else 255.0)
    flat = (pixels.astype(np.float32) / np.float32(white)).reshape(len(pixels), -1)
    return Images(torch.from_numpy(flat), torch.from_numpy(labels.astype(np.int64)))


def _digits() -> _Arrays:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return _Arrays(digits.images, digits.target, white=16.0)


def _hub() -> tuple[_Arrays, _Arrays]:
    import datasets

    try:
        data: Any = datasets.load_dataset(HUB_NAME)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingFileError(f"'{HUB_NAME}' cannot be had from the hub ({reason}): expected {EXPECTED}") from None
    return _columns(data["train"]), _columns(data["test"])


def _columns(rows: Any) -> _Arrays:
    """Returns a hub data set's columns `image` (pictures) and `label`."""
    return _Arrays(np.stack([np.asarray(image) for image in rows["image"]]), np.asarray(rows["label"]))


def _npz(path: Path) -> tuple[_Arrays, _Arrays | None]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"'{path}' is damaged or no .npz file of plain arrays: {error}") from None
    for names in NPZ_KEYS:
        if all(name is None or name in arrays for name in names):
            x_train, y_train, x_test, y_test = (None if name is None else arrays[name] for name in names)
            return _Arrays(x_train, y_train), None if x_test is None else _Arrays(x_test, y_test)
    expected = " or ".join(", ".join(filter(None, names)) for names in NPZ_KEYS)
    raise UserError(f"'{path}' holds {', '.join(sorted(arrays)) or 'nothing'}: expected {expected}")


def _idx_folder(folder: Path) -> tuple[_Arrays, _Arrays]:
    """Reads the four files of MNIST, wherever they lie in the folder (torchvision puts them into `MNIST/raw`)."""
    paths: list[Path] = []
    for stem in IDX_STEMS:
        found = sorted(folder.rglob(f"{stem}?idx[13]-ubyte")) or sorted(folder.rglob(f"{stem}?idx[13]-ubyte.gz"))
        if not found:
            kind = "idx3" if "images" in stem else "idx1"
            raise MissingFileError(f"no {stem}-{kind}-ubyte (or .gz) in '{folder}': expected {EXPECTED}")
        paths.append(found[0])
    x_train, y_train, x_test, y_test = (_read_idx(path) for path in paths)
    return _Arrays(x_train, y_train), _Arrays(x_test, y_test)


def _read_idx(path: Path) -> Any:
    """Returns an idx file's array of unsigned bytes (format: http://yann.lecun.com/exdb/mnist, at its end)."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"'{path}' is damaged: {error}") from None
    n_axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * n_axes
    if content[:3] != b"\0\0\x08" or n_axes == 0 or len(content) < start:
        raise UserError(
            f"'{path}' is no idx file of unsigned bytes: it begins with {content[:4].hex(' ') or 'nothing'}"
        )
    shape = np.frombuffer(content[4:start], dtype=">u4").tolist()
    if len(content) - start != int(np.prod(shape)):
        raise UserError(f"'{path}' is damaged: {len(content) - start} bytes of data, expected {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
