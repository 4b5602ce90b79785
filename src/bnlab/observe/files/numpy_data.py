"""Rebuilds numpy arrays inside a pickle from the inert record of the call with which numpy would make them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from bnlab.observe.files.content import Span
from bnlab.observe.files.pickle_data import InertObject, LongText
from bnlab.observe.files.tensors import StoredTensor, fortran_strides, is_shape, item_bytes, strided

__all__ = ["as_stored_tensor", "torch_dtype"]

_PACKAGES = ("numpy.core", "numpy._core")  # before and since numpy 2
_RECONSTRUCT = frozenset(f"{package}.multiarray._reconstruct" for package in _PACKAGES)
_FROM_BUFFER = frozenset(f"{package}.numeric._frombuffer" for package in _PACKAGES)
_SCALAR = frozenset(f"{package}.multiarray.scalar" for package in _PACKAGES)
_TUPLE, _EVAL = (frozenset({f"builtins.{name}", f"__builtin__.{name}"}) for name in ("tuple", "eval"))
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

    Converters from other frameworks write state dicts of numpy arrays, so arrays count as tensors. A numpy scalar is an
    array of shape ().
    """
    value = _without_paddle(value)
    if not isinstance(value, InertObject):
        return None
    path = value.kind.path
    if path in _RECONSTRUCT:
        match value.state:
            case (int(), tuple(shape), InertObject() as kind, bool(fortran), data):
                return _tensor(shape, kind, data, fortran=fortran)
    elif path in _FROM_BUFFER:
        match value.arguments:
            case (data, InertObject() as kind, tuple(shape), str(order)):
                return _tensor(shape, kind, data, fortran=order == "F")
    elif path in _SCALAR:
        match value.arguments:
            case (InertObject() as kind, data):
                return _tensor((), kind, data, fortran=False)
    return None


def _without_paddle(value: object) -> object:
    """Return the array in what `paddle.save` makes of a tensor: ``tuple((name, array))``, ``eval("data", {...})``.

    Source: `_pickle_save` in `python/paddle/framework/io.py` of Paddle.
    """
    match value:
        case InertObject(kind=kind, arguments=((str(), InertObject() as array),)) if kind.path in _TUPLE:
            return array
        case InertObject(kind=kind, arguments=("data", {"data": InertObject() as array})) if kind.path in _EVAL:
            return array
        case (str(), InertObject() as array):
            return array
        case _:
            return value


def _tensor(shape: tuple[Any, ...], kind: InertObject, data: object, *, fortran: bool) -> StoredTensor | None:
    name = kind.arguments[0] if kind.arguments else None
    dtype = torch_dtype(name) if isinstance(name, str) else None
    size = None if dtype is None else item_bytes(dtype)
    if dtype is None or size is None or not is_shape(shape):
        return None
    span = _span(data, math.prod(shape) * size)
    if span is None:
        return None
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "<"
    strides = fortran_strides(shape) if fortran else None
    bits = partial(strided, span, dtype, shape, strides=strides, big_endian=order == ">")
    return StoredTensor(dtype, shape, bits)


def _span(data: object, size: int) -> Span | None:
    """Return the bytes of an array of a size. Protocol 2 writes them as text, and Python 2 cannot tell them from it."""
    match data:
        case Span():
            return data
        case bytes():
            return Span.of(data)
        case str():
            return Span.of(data.encode("latin-1"))
        case LongText():
            return Span(_BytesAsText(data), 0, size)
        case _:
            return None


@dataclass(frozen=True)
class _BytesAsText:
    """Bytes that are written as text, whose number is known only when the text is read."""

    text: LongText

    def read_at(self, start: int, size: int) -> bytes:
        data = self.text.latin1()[start : start + size]
        if len(data) < size:
            raise ValueError(f"array needs {start + size} bytes, its text has {len(self.text.latin1())}")
        return data


def torch_dtype(code: str) -> str | None:
    """Return the torch name of a dtype of numpy, such as "f4"; None for a dtype that BN state cannot have."""
    return _DTYPES.get(code)
