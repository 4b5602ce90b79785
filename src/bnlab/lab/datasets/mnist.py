"""MNIST from its idx files, gzipped or not."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray

from bnlab.errors import DamagedFile
from bnlab.lab.datasets.images import Images, checked_labels
from bnlab.lab.datasets.local import Search, is_file, open_file, unreadable

__all__ = ["read"]

_SEARCH = Search(
    "mnist",
    ("mnist", "MNIST", "mnist/raw", "MNIST/raw"),
    "Set BNLAB_DATA to the folder that holds the four files of MNIST.",
)
_PREFIX = {"train": "train", "test": "t10k"}
_SIDE = 28
_IMAGES, _LABELS = 2051, 2049
_MAX_IMAGES = 1_000_000  # a header may claim any number, and memory is allocated before the bytes are read


def read(split: str, folder: Path | None = None) -> Images:
    """Return the 60,000 images of "train" or the 10,000 of "test", of shape (N, 1, 28, 28).

    Args:
        split: "train" or "test".
        folder: The folder to search, instead of ``$BNLAB_DATA``.

    Raises:
        UnreadableFile: If the files are missing or cannot be opened.
        DamagedFile: If a file is not a complete idx file of 28x28 images or of their labels.
    """
    images, labels = (f"{_PREFIX[split]}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    for place in _SEARCH.folders(folder):
        stored, beside = _stored(place / images), _stored(place / labels)
        if stored is not None and beside is not None:
            pixels = _read_idx(stored, _IMAGES, (_SIDE, _SIDE))
            return Images(
                torch.from_numpy(pixels).unsqueeze(1),
                checked_labels(beside, _read_idx(beside, _LABELS, ()), len(pixels)),
                white=255,
            )
    raise _SEARCH.missing_files(f"{images}[.gz] and {labels}[.gz]", folder)


def _stored(path: Path) -> Path | None:
    return next((file for file in (path, Path(f"{path}.gz")) if is_file(file)), None)


def _read_idx(path: Path, magic: int, item: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes whose items have the shape `item`."""
    try:
        with open_file(path) as file:
            if path.suffix != ".gz":
                return _parse_idx(path, file, magic, item)
            with gzip.GzipFile(fileobj=file) as stream:
                return _parse_idx(path, cast("BinaryIO", stream), magic, item)
    except (gzip.BadGzipFile, zlib.error, EOFError) as err:
        raise DamagedFile(f"{path}: file must be a whole gzip file, got: {str(err).lower()}.") from None
    except OSError as err:
        raise unreadable(path, err) from None


def _parse_idx(path: Path, stream: BinaryIO, magic: int, item: tuple[int, ...]) -> NDArray[np.uint8]:
    header = struct.Struct(f">{2 + len(item)}I")
    head = stream.read(header.size)
    if len(head) < header.size:
        raise DamagedFile(f"{path}: file must begin with {header.size} bytes of idx header, got {len(head)}.")
    number, count, *sizes = header.unpack(head)
    if number != magic:
        raise DamagedFile(f"{path}: file must begin with the idx number {magic}, got {number}.")
    if tuple(sizes) != item or not 0 < count <= _MAX_IMAGES:
        shape = "x".join(map(str, ("N", *item)))
        raise DamagedFile(
            f"{path}: shape must be {shape} with N from 1 to {_MAX_IMAGES}, got {'x'.join(map(str, (count, *sizes)))}."
        )
    expected = int(np.prod((count, *item)))
    content = stream.read(expected + 1)  # one byte more reaches the checksum of gzip and detects extra bytes
    if len(content) != expected:
        got = "more" if len(content) > expected else len(content)
        raise DamagedFile(f"{path}: file must hold {expected} bytes after its header, got {got}.")
    return np.frombuffer(bytearray(content), np.uint8).reshape(count, *item)
