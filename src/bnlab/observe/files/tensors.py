"""Represents the tensors in a file: dtype and shape are known at once, and values are read on request."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlab.observe.files.content import Span
from bnlab.observe.float_formats import FLOAT_FORMATS

__all__ = [
    "FLOATING",
    "INTEGER",
    "MAX_CHANNELS",
    "MAX_RANK",
    "StoredTensor",
    "as_numbers",
    "coarser",
    "fortran_strides",
    "is_shape",
    "item_bytes",
    "stored_dtype",
    "strided",
    "widen",
]

_NUMPY_CODES = {
    "float64": "f8",
    "float32": "f4",
    "float16": "f2",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint8": "u1",
    "bool": "?",
    "uint16": "u2",
    "uint32": "u4",
    "uint64": "u8",
    "complex64": "c8",
    "complex128": "c16",
}
_CODES_OF_BITS = {
    "bfloat16": "u2",
    **{name: "u1" for name in FLOAT_FORMATS if name.startswith("float8")},
}
"""Dtypes that numpy lacks. Their bits are read as integers."""
FLOATING = frozenset(FLOAT_FORMATS)
INTEGER = frozenset({"int64", "int32", "int16", "int8", "uint8"})
MAX_CHANNELS = 1 << 20
"""Limit above which a tensor is not read. No layer has so many channels, but a tensor of a few bytes may claim them."""
MAX_RANK = 64
"""The largest number of dimensions of a tensor in torch."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that has not been read yet.

    Attributes:
        dtype: The torch name of the dtype, such as "bfloat16". A dtype unknown to `item_bytes` cannot be read.
        shape: The stored shape.
        bits: Returns the stored values; those of a dtype that numpy lacks are returned as integers of the same size.
            Raises ValueError if the file does not hold the bytes that its header describes.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: Callable[[], NDArray[Any]]

    def read(self) -> NDArray[Any]:
        """Return the values, widened without loss to a numpy dtype.

        Raises:
            ValueError: If the file does not hold the bytes that its header describes, or if no numpy dtype can hold the
                values.
        """
        return as_numbers(self.bits(), self.dtype)

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def is_shape(lengths: Sequence[object]) -> bool:
    """Return whether values from a file, which may be anything, are the shape of a tensor that can exist."""
    return len(lengths) <= MAX_RANK and all(type(length) is int and 0 <= length < 1 << 63 for length in lengths)


def fortran_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the steps of a tensor whose first axis is the fastest, in values."""
    return _contiguous_strides(shape[::-1])[::-1]


def item_bytes(dtype: str) -> int | None:
    """Return the size of one value of a dtype in bytes, or None for a dtype that cannot be read."""
    stored = stored_dtype(dtype)
    return None if stored is None else stored.itemsize


def stored_dtype(dtype: str) -> np.dtype[Any] | None:
    """Return the numpy dtype in which the values of a dtype are read, or None for a dtype that cannot be read.

    For a dtype that numpy lacks, it is that of integers of the same size.
    """
    code = _NUMPY_CODES.get(dtype) or _CODES_OF_BITS.get(dtype)
    return None if code is None else np.dtype(code)


def as_numbers(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return the stored values as numbers; those of a dtype that numpy lacks are converted to float32 exactly."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)  # its bits are the upper half of a float32
    if dtype in _CODES_OF_BITS:
        return np.take(FLOAT_FORMATS[dtype].numbers, bits)
    return bits


def coarser(left: str, right: str) -> str:
    """Return the floating dtype with the shorter mantissa."""
    return max(left, right, key=list(FLOAT_FORMATS).index)


def strided(
    storage: Span,
    dtype: str,
    shape: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    offset: int = 0,
    big_endian: bool = False,
) -> NDArray[Any]:
    """Copy a tensor out of the bytes of its storage.

    Args:
        storage: The bytes of the storage, of which those of the tensor are read.
        dtype: Name of the stored dtype.
        shape: Shape of the tensor.
        strides: Steps in values, one per dimension; None for a contiguous tensor.
        offset: Position of the first value, in values.
        big_endian: Byte order of the storage.

    Returns:
        The values in native byte order; those of a dtype that numpy lacks are integers of the same size.

    Raises:
        ValueError: If the dtype cannot be read, or if the tensor extends beyond its storage.
    """
    stored = stored_dtype(dtype)
    if stored is None:
        raise ValueError(f"dtype {dtype} cannot be read")
    stored = stored.newbyteorder(">" if big_endian else "<")
    if len(shape) > MAX_RANK:
        raise ValueError(f"tensor has {len(shape)} dimensions, torch has at most {MAX_RANK}")
    steps = _contiguous_strides(shape) if strides is None else tuple(strides)
    end = _end(shape, steps, offset)
    if end * stored.itemsize > storage.size:
        raise ValueError(f"tensor needs {end * stored.itemsize} bytes, its storage has {storage.size}")
    if 0 in shape:
        return np.empty(tuple(shape), dtype=stored.newbyteorder("="))
    data = storage.part(offset * stored.itemsize, (end - offset) * stored.itemsize).read()
    flat = np.frombuffer(data, dtype=stored)
    if steps == _contiguous_strides(shape):
        view = flat.reshape(shape)
    else:
        view = np.lib.stride_tricks.as_strided(flat, tuple(shape), tuple(step * stored.itemsize for step in steps))
    return view.astype(stored.newbyteorder("="))


def _end(shape: Sequence[int], steps: Sequence[int], offset: int) -> int:
    """Return the position behind the last value of a tensor in its storage, in values."""
    if len(steps) != len(shape) or offset < 0 or min((*shape, *steps), default=0) < 0:
        raise ValueError("tensor has an impossible shape, stride or offset")
    if 0 in shape:
        return offset
    return offset + 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))


def widen(values: NDArray[Any]) -> NDArray[np.float64]:
    """Convert to float64, which holds every stored dtype exactly, without a warning for signalling NaNs."""
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1] if shape else ()
