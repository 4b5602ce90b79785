"""Reads a safetensors file: an 8-byte length, a JSON header, and the bytes of the tensors.

This module parses the header itself instead of using the safetensors package, whose numpy reader has no bfloat16 and
whose torch reader needs torch. The format is small and frozen.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bnlab.errors import TooMuchWork
from bnlab.observe.files.content import Content, Span
from bnlab.observe.files.tensors import MAX_RANK, StoredTensor, item_bytes, strided
from bnlab.unique_keys import DuplicateKey, unique_keys

__all__ = ["NamedTensors", "looks_like_safetensors", "read_safetensors"]

_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000  # the limit of the reference implementation
_LARGEST_UNICODE_HEADER = 16 << 20  # one emoji makes Python keep 4 bytes for each character
_MOST_PARTS = 500_000
_MOST_DIGITS = 20
_LONGEST_NAME = 200
_DEEPEST = 120
_METADATA = "__metadata__"
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_BITS = {
    **{code: 8 * (item_bytes(name) or 0) for code, name in _DTYPES.items()},
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits of one value of each dtype of the format. Those of less than a byte cannot be read as numbers."""


def looks_like_safetensors(head: bytes) -> bool:
    """Return whether a file that begins with these bytes may be a safetensors file."""
    return len(head) > _LENGTH.size and _LENGTH.unpack_from(head)[0] <= _LARGEST_HEADER and head[8:9] == b"{"


class NamedTensors(dict[str, StoredTensor]):
    """The tensors of a safetensors file by name.

    Attributes:
        metadata: The strings that the file holds beside the tensors, or None.
    """

    metadata: Mapping[str, str] | None = None


def read_safetensors(content: Content) -> NamedTensors:
    """Return every tensor of the file by name. The values are not read yet.

    Raises:
        ValueError, TypeError: If the header is invalid, or if its tensors do not fill the rest of the file exactly, one
            behind the other.
        TooMuchWork: If the header describes more than any checkpoint holds.
    """
    header, start = _header(content)
    data = content.span(start)
    metadata = header.pop(_METADATA, None)
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    _check_places(entries, data.size)
    tensors = NamedTensors({name: _tensor(entry, data) for name, entry in entries.items()})
    tensors.metadata = metadata
    return tensors


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _header(content: Content) -> tuple[dict[str, Any], int]:
    """Return the header, and the position at which the bytes of the tensors begin."""
    if content.size < _LENGTH.size:
        raise ValueError("its header is cut off")
    (length,) = _LENGTH.unpack(content.head(_LENGTH.size))
    start = _LENGTH.size + length
    if length > _LARGEST_HEADER or start > content.size:
        raise ValueError(f"its header claims {length} bytes, the file has {content.size}")
    header = _parsed(_text(content, length))
    metadata = header.get(_METADATA)
    if metadata is not None and not _are_strings(metadata):
        raise TypeError(f"its {_METADATA} holds something else than strings")
    return header, start


def _text(content: Content, length: int) -> str:
    """Return the header as text, unless it describes so much that parsing it would take too much memory."""
    data = content.read_at(_LENGTH.size, length)
    if data[:1] != b"{":
        raise TypeError("its header does not begin with a JSON object")
    parts = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if parts > _MOST_PARTS or (length > _LARGEST_UNICODE_HEADER and not data.isascii()):
        raise TooMuchWork(
            f"header must describe at most {_MOST_PARTS:,} names and numbers, got {parts:,} in {length:,} bytes. "
            "Save the state dict alone."
        )
    return data.decode("utf-8")  # json.loads(data) would accept UTF-16 too


def _parsed(text: str) -> dict[str, Any]:
    try:
        header = json.loads(
            text, object_pairs_hook=unique_keys, parse_constant=_refuse, parse_int=_natural, parse_float=_finite
        )
    except DuplicateKey as err:
        raise ValueError(f"its header has two entries for {_shown(err.key)}") from None
    if not isinstance(header, dict):
        raise TypeError("its header is not a JSON object")
    return header


def _refuse(constant: str) -> None:
    raise ValueError(f"its header holds {constant}, which JSON does not have")


def _natural(digits: str) -> int | float:
    """Return an integer; one that no size or position can be becomes a float, which `_entry` refuses."""
    number = int(digits) if digits[0] != "-" and len(digits) <= _MOST_DIGITS else 1 << 64
    return number if number < 1 << 64 else -1.0


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"its header holds the number {_shown(text)}, which is too large")
    return number


def _is_deep(value: object, allowed: int = _DEEPEST) -> bool:
    """Return whether lists and objects are nested more deeply than the reference implementation reads."""
    inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return bool(inner) and (allowed == 0 or any(_is_deep(one, allowed - 1) for one in inner))


def _are_strings(metadata: object) -> bool:
    if not isinstance(metadata, dict):
        return False
    return all(isinstance(value, str) and not _has_half_character(key + value) for key, value in metadata.items())


def _has_half_character(text: str) -> bool:
    """Return whether a text has half a surrogate pair, which JSON can write and UTF-8 cannot."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _entry(name: str, entry: object) -> _Entry:
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(begin), int(end)], **others}:
            pass
        case _:
            raise ValueError(f"its header has an invalid entry for {_shown(name)}")
    if _is_deep(others):
        raise ValueError(f"its header has a nested entry for {_shown(name)}")
    if _has_half_character(name):
        raise ValueError(f"its header has the name {_shown(name)}, which is no text")
    bits = _BITS.get(kind)
    if bits is None:
        raise ValueError(f"tensor {_shown(name)} has the dtype {_shown(kind)}, which safetensors does not know")
    if len(shape) > MAX_RANK:
        raise ValueError(f"tensor {_shown(name)} has {len(shape)} dimensions, torch has at most {MAX_RANK}")
    if not all(type(length) is int for length in (*shape, begin, end)):
        raise ValueError(f"tensor {_shown(name)} has a shape or a place that is no number")
    if begin > end or 8 * (end - begin) != _checked_product(shape, name) * bits:
        raise ValueError(f"tensor {_shown(name)} of shape {tuple(shape)} does not fit into bytes {begin} to {end}")
    return _Entry(_DTYPES.get(kind, kind), tuple(shape), begin, end)


def _checked_product(shape: list[int], name: str) -> int:
    """Return the number of values, which must not overflow at any step, as the format demands."""
    count = 1
    for length in shape:
        count *= length
        if count >= 1 << 64:
            raise ValueError(f"tensor {_shown(name)} has more values than 64 bits count")
    return count


def _check_places(entries: Mapping[str, _Entry], size: int) -> None:
    """Refuse tensors that overlap, or that leave bytes of the file to nobody."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            kind = (
                "overlaps the tensor before it" if entry.begin < end else f"leaves a hole of {entry.begin - end} bytes"
            )
            raise ValueError(f"tensor {_shown(name)} begins at byte {entry.begin}, and {kind}")
        end = entry.end
    if end != size:
        problem = f"ends at byte {end}" if end > size else f"leaves {size - end} bytes at its end to no tensor"
        raise ValueError(f"its data of {size} bytes {'is cut off: the last tensor ' if end > size else ''}{problem}")


def _tensor(entry: _Entry, data: Span) -> StoredTensor:
    part = data.part(entry.begin, entry.end - entry.begin)
    return StoredTensor(entry.dtype, entry.shape, partial(strided, part, entry.dtype, entry.shape))


def _shown(name: str) -> str:
    """Return a name as it may appear in a message."""
    return ascii(name) if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]!a}..."
