"""Tensors as they lie in a file: dtype and shape now, values only when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLOATING", "INTEGER", "MOST_CHANNELS", "StoredTensor", "coarser", "item_bytes", "strided", "widen"]

_NUMPY_CODES = {
    "float64": "f8",
    "float32": "f4",
    "float16": "f2",
    "bfloat16": "u2",  # numpy has no bfloat16: its bits are the upper half of a float32
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint8": "u1",
    "bool": "?",
}
_BY_PRECISION = ("float64", "float32", "float16", "bfloat16")
FLOATING = frozenset(_BY_PRECISION)
INTEGER = frozenset({"int64", "int32", "int16", "int8", "uint8"})
MOST_CHANNELS = 1 << 20
"""More channels than any layer has: an expanded tensor of a few bytes may claim any number."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that has not been read yet.

    Attributes:
        dtype: Name as torch spells it, such as "bfloat16"; dtypes no BN buffer has are named but cannot be read.
        shape: As stored.
        read: Returns the values, widened without loss to a numpy dtype. Raises ValueError where the file does not
            hold what it promises.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def item_bytes(dtype: str) -> int | None:
    """Size of one value of a dtype in bytes, or None for a dtype that cannot be read."""
    code = _NUMPY_CODES.get(dtype)
    return None if code is None else np.dtype(code).itemsize


def coarser(left: str, right: str) -> str:
    """Return the floating dtype with the shorter mantissa."""
    return max(left, right, key=_BY_PRECISION.index)


def strided(
    buffer: memoryview,
    dtype: str,
    shape: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    offset: int = 0,
    big_endian: bool = False,
) -> NDArray[Any]:
    """Copy a tensor out of the bytes of its storage.

    Args:
        buffer: The bytes of the storage.
        dtype: Name of the stored dtype.
        shape: Shape of the tensor.
        strides: Steps in values, one per dimension; contiguous if not given.
        offset: Where the tensor begins, in values.
        big_endian: Byte order of the storage.

    Returns:
        The values in native byte order; bfloat16 comes back as float32, exactly.

    Raises:
        ValueError: If the dtype cannot be read or the tensor reaches outside its storage.
    """
    code = _NUMPY_CODES.get(dtype)
    if code is None:
        raise ValueError(f"dtype {dtype} cannot be read")
    stored = np.dtype(code).newbyteorder(">" if big_endian else "<")
    steps = _contiguous_strides(shape) if strides is None else tuple(strides)
    if len(steps) != len(shape) or offset < 0 or min((*shape, *steps), default=0) < 0:
        raise ValueError("tensor has an impossible shape, stride or offset")
    empty = 0 in shape
    end = offset if empty else offset + 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if end * stored.itemsize > len(buffer):
        raise ValueError(f"tensor needs {end * stored.itemsize} bytes, its storage has {len(buffer)}")
    if empty:
        return np.empty(tuple(shape), dtype=stored.newbyteorder("="))
    flat = np.frombuffer(buffer, dtype=stored, count=end - offset, offset=offset * stored.itemsize)
    if strides is None or steps == _contiguous_strides(shape):
        view = flat.reshape(shape)
    else:
        view = np.lib.stride_tricks.as_strided(flat, tuple(shape), tuple(step * stored.itemsize for step in steps))
    values = view.astype(stored.newbyteorder("="))
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def widen(values: NDArray[Any]) -> NDArray[np.float64]:
    """Convert to float64, which holds every stored dtype exactly; a signalling NaN becomes a quiet one in silence."""
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
