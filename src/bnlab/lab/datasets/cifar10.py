"""CIFAR-10 from the files of its distribution, which are read as data, and from two npz formats.

The reader takes the first of these formats in a folder. Original images come before images with lossy compression,
which have a different distribution:

- the Python version, ``data_batch_1`` .. ``data_batch_5`` and ``test_batch``: pickles, of which no code is run;
- the binary version: the same names with ``.bin``;
- ``cifar10_lossless_train4000.npz``: arrays `image` (N, 32, 32, 3) and `label`, the first 4,000 training images only;
- ``cifar10_jpeg.npz``: arrays `jpeg` (the bytes of all files), `offset`, `label` and `is_test`. It needs Pillow.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnlab.errors import BnlabError, DamagedFile, MissingPackage
from bnlab.lab.datasets.images import Images, checked_labels
from bnlab.lab.datasets.local import Search, is_file, open_file, unreadable
from bnlab.observe.files.budget import Budget
from bnlab.observe.files.content import Span
from bnlab.observe.files.numpy_data import as_stored_tensor
from bnlab.observe.files.pickle_globals import PLAIN, Builder
from bnlab.observe.files.pickle_machine import read_pickle
from bnlab.regular_file import read_whole

__all__ = ["read"]

_SEARCH = Search(
    "cifar10",
    (
        *("cifar10", "CIFAR10", "cifar-10-batches-py", "cifar-10-batches-bin"),
        *("cifar10/cifar-10-batches-py", "cifar10/cifar-10-batches-bin"),
    ),
    "Set BNLAB_DATA to the folder that holds the files of its Python or binary version.",
)
_PARTS = {"train": tuple(f"data_batch_{part}" for part in range(1, 6)), "test": ("test_batch",)}
_LOSSLESS = "cifar10_lossless_train4000.npz"
_JPEG = "cifar10_jpeg.npz"
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MAX_BYTES = 1 << 28

Part = tuple[NDArray[np.uint8], torch.Tensor]


def read(split: str, folder: Path | None = None) -> Images:
    """Return the images of "train" or "test", of shape (N, 3, 32, 32), RGB.

    There are 50,000 images in "train" and 10,000 in "test". If only the npz files are present, "train" has 4,000.

    Args:
        split: "train" or "test".
        folder: The folder to search, instead of ``$BNLAB_DATA``.

    Raises:
        UnreadableFile: If the files are missing or cannot be opened.
        DamagedFile: If a file breaks its format.
        MissingPackage: If the images are JPEG files and Pillow is not installed.
    """
    for place in _SEARCH.folders(folder):
        for suffix, parse in (("", _parse_python), (".bin", _parse_binary)):
            paths = [place / f"{name}{suffix}" for name in _PARTS[split]]
            if all(is_file(path) for path in paths):
                return _joined([parse(path, read_whole(path, _MAX_BYTES)) for path in paths])
        if split == "train" and is_file(place / _LOSSLESS):
            return _joined([_read_lossless(place / _LOSSLESS)])
        if is_file(place / _JPEG):
            return _joined([_read_jpeg(place / _JPEG, split)])
    names = f"{_PARTS[split][0]} .. {_PARTS[split][-1]}" if split == "train" else _PARTS[split][0]
    raise _SEARCH.missing_files(f"{names} (or .bin)", folder)


def _joined(parts: list[Part]) -> Images:
    pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in parts]))
    return Images(pixels.view(-1, *_SHAPE), torch.cat([labels for _, labels in parts]), white=255)


def _parse_binary(path: Path, content: bytes) -> Part:
    """Parse records of one label and three planes of 32x32 bytes."""
    if not content or len(content) % (1 + _PIXELS):
        raise DamagedFile(f"{path}: file must hold records of {1 + _PIXELS} bytes, got {len(content)} bytes.")
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
    return records[:, 1:], checked_labels(path, records[:, 0], len(records))


def _parse_python(path: Path, content: bytes) -> Part:
    """Parse a pickled dict of `data`, uint8 (N, 3072), and `labels`, written by Python 2 or 3."""
    try:
        tree, _ = read_pickle(Span.of(content), Builder(PLAIN, budget := Budget()).build, _refuse, budget)
    except (ValueError, OverflowError) as err:
        raise DamagedFile(f"{path}: file must be a whole pickle, got: {' '.join(str(err).split())}.") from None
    entries = {_text(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}
    labels = entries.get("labels")
    if not isinstance(labels, list) or not all(type(label) is int and abs(label) < 1 << 31 for label in labels):
        raise DamagedFile(f"{path}: labels must be a list of integers, got something else.")
    pixels = _array(entries.get("data"))
    if pixels is None or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise DamagedFile(f"{path}: data must be a whole uint8 array of shape (N, {_PIXELS}), got something else.")
    return pixels, checked_labels(path, np.array(labels, np.int64), len(pixels))


def _refuse(_: object) -> object:
    raise ValueError("it refers to something outside the file")


def _text(key: object) -> object:
    return key.decode("latin-1") if isinstance(key, bytes) else key


def _array(value: object) -> NDArray[Any] | None:
    """Return a pickled array."""
    try:
        stored = as_stored_tensor(value)
        return None if stored is None else stored.read()
    except ValueError:
        return None


def _read_lossless(path: Path) -> Part:
    image, label = _arrays(path, "image", "label")
    if image.dtype != np.uint8 or image.shape[1:] != (32, 32, 3):
        raise DamagedFile(f"{path}: image must be uint8 of shape (N, 32, 32, 3), got {image.dtype} of {image.shape}.")
    return np.ascontiguousarray(image.transpose(0, 3, 1, 2)), checked_labels(path, label, len(image))


def _read_jpeg(path: Path, split: str) -> Part:
    decode = _decoder(path)
    jpeg, offset, label, is_test = _arrays(path, "jpeg", "offset", "label", "is_test")
    whole = jpeg.dtype == np.uint8 and jpeg.ndim == 1 and np.issubdtype(offset.dtype, np.integer) and offset.ndim == 1
    ordered = whole and offset.size and offset[0] >= 0 and offset[-1] <= jpeg.size and bool((np.diff(offset) > 0).all())
    if not ordered or is_test.dtype != np.bool_ or is_test.shape != (offset.size - 1,):
        raise DamagedFile(
            f"{path}: offset and is_test must hold the place and the split of each image, got something else."
        )
    labels = checked_labels(path, label, len(is_test))
    chosen = np.flatnonzero(is_test == (split == "test"))
    if not chosen.size:
        raise DamagedFile(f"{path}: file must hold images of the {split} split, got none.")
    pixels = np.stack([decode(jpeg[offset[at] : offset[at + 1]].tobytes()) for at in chosen])
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), labels[torch.from_numpy(chosen)]


def _arrays(path: Path, *names: str) -> list[NDArray[Any]]:
    try:
        # The file is opened here because np.load does not close a file that it cannot read.
        with open_file(path) as file, np.load(file, allow_pickle=False) as archive:
            _require_small(path, archive)
            return [archive[name] for name in names]
    except BnlabError:
        raise
    except OSError as err:
        raise unreadable(path, err) from None
    except Exception as err:  # numpy evaluates the header, which may raise any error
        text = " ".join(str(err).split())
        raise DamagedFile(f"{path}: file must be a whole npz archive of {', '.join(names)}, got: {text}.") from None


def _require_small(path: Path, archive: Any) -> None:  # noqa: ANN401 - a single array has another type, and no files
    """Refuse an archive whose arrays are too large: a small file may hold many gigabytes of equal bytes."""
    size = sum(member.file_size for member in archive.zip.infolist())
    if size > _MAX_BYTES:
        raise DamagedFile(f"{path}: arrays must have at most {_MAX_BYTES} bytes, got {size}.")


def _decoder(path: Path) -> Callable[[bytes], NDArray[np.uint8]]:
    """Return a function that turns the bytes of a JPEG file into an array (32, 32, 3)."""
    try:
        pillow = importlib.import_module("PIL.Image")
    except ImportError:
        raise MissingPackage(
            f"{path}: file must be readable without Pillow, got JPEG images. Install it: pip install pillow."
        ) from None

    def decode(content: bytes) -> NDArray[np.uint8]:
        try:
            with pillow.open(io.BytesIO(content), formats=["JPEG"]) as image:
                if image.size == (32, 32):
                    return np.asarray(image.convert("RGB"))
                text = "x".join(map(str, image.size))
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as err:
            text = " ".join(str(err).split())
        raise DamagedFile(f"{path}: images must be whole JPEG files of 32x32 pixels, got: {text}.")

    return decode
