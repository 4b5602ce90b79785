"""Reads the msgpack files of ``flax.serialization``: nested maps down to arrays, which stay unread.

Flax writes an array as extension 1, and a scalar of numpy as extension 3. Both hold another msgpack value, (shape, name
of the dtype, bytes). It splits an array above 1 GB into a map of chunks. Source: flax/serialization.py, and
https://github.com/msgpack/msgpack/blob/master/spec.md.
"""

from __future__ import annotations

import math
import struct
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlab.observe.files.budget import Budget
from bnlab.observe.files.content import Content, Span
from bnlab.observe.files.tensors import MAX_RANK, StoredTensor, is_shape, item_bytes, strided

__all__ = ["looks_like_msgpack", "read_msgpack"]

_CHUNKED = "__msgpack_chunked_array__"
_ARRAYS = (1, 3)
_DEEPEST = 64
_WINDOW = 1 << 16
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_LENGTHS = {1: ">B", 2: ">H", 4: ">I"}
_STRINGS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_LISTS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def looks_like_msgpack(head: bytes) -> bool:
    """Return whether a file that begins with these bytes may be a map of msgpack whose first key is a short name."""
    at = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else 0) if head else 0
    if not at or len(head) <= at:
        return False
    kind = head[at]
    start, length = (at + 1, kind & 31) if 0xA0 <= kind <= 0xBF else (at + 2, head[at + 1] if kind == 0xD9 else 0)
    name = head[start : start + length]
    return 0 < length == len(name) and name.isascii() and name.decode("ascii").isprintable()


def read_msgpack(content: Content) -> Any:  # noqa: ANN401 - any tree
    """Read a file down to its arrays, which stay unread.

    Raises:
        ValueError, TypeError: If the file is damaged.
        TooMuchWork: If it holds more than any checkpoint.
    """
    reader = _Reader(content.span(), content.budget)
    tree = reader.value()
    reader.require_end()
    return tree


class _Reader:
    """Reads the values in a range of bytes through a window, so that the bytes of arrays are skipped."""

    def __init__(self, span: Span, budget: Budget) -> None:
        self._span = span
        self._budget = budget
        self._at = 0
        self._window = b""
        self._window_at = 0

    def require_end(self) -> None:
        if self._at != self._span.size:
            raise ValueError(f"{self._span.size - self._at} bytes lie behind its last value")

    def value(self, depth: int = 0) -> Any:  # noqa: ANN401 - any tree
        """Return the next value."""
        if depth > _DEEPEST:
            raise ValueError(f"its maps are nested more than {_DEEPEST} deep")
        kind = self._take(1)[0]
        if kind <= 0x7F or kind >= 0xE0:
            return kind if kind <= 0x7F else kind - 0x100
        if kind in _CONSTANTS:
            return _CONSTANTS[kind]
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind <= 0x9F or kind in _MAPS or kind in _LISTS:
            return self._container(kind, depth)
        return self._bytes(kind, depth)

    def _container(self, kind: int, depth: int) -> Any:  # noqa: ANN401 - any tree
        if kind <= 0x8F or kind in _MAPS:
            return self._map(kind & 15 if kind <= 0x8F else self._length(_MAPS[kind]), depth)
        count = kind & 15 if kind <= 0x9F else self._length(_LISTS[kind])
        self._require(count)
        return [self.value(depth + 1) for _ in range(count)]

    def _map(self, count: int, depth: int) -> Any:  # noqa: ANN401 - any tree
        self._require(2 * count)
        mapping: dict[Any, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise TypeError("a map has a key that is neither a name nor a number")
            if key in mapping:
                raise ValueError(f"a map has two entries for {str(key)[:200]!r}")
            mapping[key] = self.value(depth + 1)
        return _joined(mapping) if _CHUNKED in mapping else mapping

    def _bytes(self, kind: int, depth: int) -> Any:  # noqa: ANN401 - a name, a range of bytes, an array or None
        if kind <= 0xBF or kind in _STRINGS:
            size = kind & 31 if kind <= 0xBF else self._length(_STRINGS[kind])
            self._budget.spend("bytes of text and numbers", size)
            return self._take(size).decode("utf-8")
        if kind in _BYTES:
            return self._skip(self._length(_BYTES[kind]))
        if kind in _EXTENSIONS or kind in _FIXED_EXTENSIONS:
            size = _FIXED_EXTENSIONS.get(kind) or self._length(_EXTENSIONS[kind])
            code = self._number(">b")
            data = self._skip(size)
            return _array(data, self._budget, depth) if code in _ARRAYS else None
        raise ValueError(f"byte {self._at - 1} is none with which a value begins")

    def _length(self, size: int) -> int:
        return int(self._number(_LENGTHS[size]))

    def _number(self, code: str) -> Any:  # noqa: ANN401 - an integer or a float
        (number,) = struct.unpack(code, self._take(struct.calcsize(code)))
        return number

    def _require(self, count: int) -> None:
        """Refuse more values than there are bytes, or than the budget has, before the first is read."""
        if count > self._span.size - self._at:
            raise ValueError(f"{count} values are claimed at byte {self._at}, the file has {self._span.size} bytes")
        self._budget.spend("objects", count)

    def _skip(self, size: int) -> Span:
        data = self._span.part(self._at, size)
        self._at += size
        return data

    def _take(self, size: int) -> bytes:
        start = self._at - self._window_at
        if start < 0 or start + size > len(self._window):
            length = min(max(size, _WINDOW), self._span.size - self._at)
            if length < size:
                raise ValueError(f"its last value is cut off at byte {self._span.size}")
            self._budget.check_time()
            self._window, self._window_at, start = self._span.part(self._at, length).read(), self._at, 0
        self._at += size
        return self._window[start : start + size]


def _array(data: Span, budget: Budget, depth: int) -> StoredTensor | None:
    """Return the array in an extension; None for an array of a dtype that is unknown here."""
    budget.spend("tensors")
    reader = _Reader(data.part(0, data.size), budget)
    match reader.value(depth + 1):
        case [list(shape), str(dtype), Span() as values]:
            reader.require_end()
        case _:
            raise ValueError("an array is not one of shape, dtype and bytes")
    if not is_shape(shape):
        raise ValueError("an array has an impossible shape")
    size = item_bytes(dtype)
    if size is not None and math.prod(shape) * size != values.size:
        raise ValueError(f"an array of shape {tuple(shape)} and {dtype} has {values.size} bytes")
    return StoredTensor(dtype, tuple(shape), partial(strided, values, dtype, tuple(shape)))


def _joined(mapping: dict[Any, Any]) -> StoredTensor:
    """Return the array that Flax wrote in chunks."""
    match mapping:
        case {"shape": dict(shape), "chunks": dict(chunks)}:
            pass
        case _:
            raise ValueError("an array in chunks lacks its shape or its chunks")
    values = [chunks.get(str(index)) for index in range(len(chunks))]
    parts = [part for part in values if isinstance(part, StoredTensor) and len(part.shape) == 1]
    if not parts or len(parts) < len(values):
        raise ValueError("an array in chunks has a chunk that is none")
    sizes = [shape.get(str(axis)) for axis in range(len(shape))]
    lengths = tuple(length for length in sizes if isinstance(length, int) and length >= 0)
    if len(lengths) < len(sizes) or len(lengths) > MAX_RANK:
        raise ValueError("an array in chunks has an impossible shape")
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or sum(part.numel for part in parts) != math.prod(lengths):
        raise ValueError(f"the chunks of an array do not fill its shape {lengths}")
    return StoredTensor(dtypes.pop(), lengths, partial(_concatenated, parts, lengths))


def _concatenated(parts: list[StoredTensor], shape: tuple[int, ...]) -> NDArray[Any]:
    return np.concatenate([part.bits() for part in parts]).reshape(shape)
