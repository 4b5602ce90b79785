"""Rebuilds numpy arrays inside a pickle from the inert record of the call with which numpy would make them."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnlab.observe.files.content import Span
from bnlab.observe.files.pickle_data import InertObject
from bnlab.observe.files.tensors import StoredTensor, item_bytes, strided

__all__ = ["as_stored_tensor"]

_RECONSTRUCT = frozenset({"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"})
_DTYPES = {
    "f8": "float64",
    "f4": "float32",
    "f2": "float16",
    "i8": "int64",
    "i4": "int32",
    "i2": "int16",
    "i1": "int8",
    "u1": "uint8",
    "b1": "bool",
}


def as_stored_tensor(value: object) -> StoredTensor | None:
    """Return the array that a InertObject represents, or None if it is not an array of a dtype that BN state can have.

    Converters from other frameworks write state dicts of numpy arrays, so arrays count as tensors.
    """
    if not (isinstance(value, InertObject) and value.kind.path in _RECONSTRUCT):
        return None
    match value.state:
        case (int(), tuple(shape), InertObject() as kind, bool(fortran), bytes(data)):
            return _tensor(shape, kind, data, fortran=fortran)
        case _:
            return None


def _tensor(shape: tuple[Any, ...], kind: InertObject, data: bytes, *, fortran: bool) -> StoredTensor | None:
    name = kind.arguments[0] if kind.arguments else None
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    size = None if dtype is None else item_bytes(dtype)
    if dtype is None or size is None or not all(isinstance(n, int) for n in shape):
        return None
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "<"
    strides = _fortran_strides(shape) if fortran else None
    bits = partial(strided, Span.of(data), dtype, shape, strides=strides, big_endian=order == ">")
    return StoredTensor(dtype, shape, bits)


def _fortran_strides(shape: tuple[int, ...]) -> list[int]:
    strides = [1]
    for length in shape[:-1]:
        strides.append(strides[-1] * length)
    return strides
