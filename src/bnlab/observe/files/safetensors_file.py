"""Reads a safetensors file: an 8-byte length, a JSON header, and the bytes of the tensors.

This module parses the header itself instead of using the safetensors package, whose numpy reader has no bfloat16 and
whose torch reader needs torch. The format is small and frozen.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from functools import partial
from typing import Any

from bnlab.observe.files.content import Content, Span
from bnlab.observe.files.tensors import MAX_RANK, StoredTensor, item_bytes, strided

__all__ = ["looks_like_safetensors", "read_metadata", "read_safetensors"]

_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000  # the limit of the reference implementation
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


def looks_like_safetensors(head: bytes) -> bool:
    """Return whether a file that begins with these bytes may be a safetensors file."""
    return len(head) > _LENGTH.size and _LENGTH.unpack_from(head)[0] <= _LARGEST_HEADER and head[8:9] == b"{"


def read_safetensors(content: Content) -> dict[str, StoredTensor]:
    """Return every tensor of the file by name. The values are not read yet.

    Raises:
        ValueError, TypeError: If the header is invalid, or describes tensors that the file does not hold.
    """
    header, start = _header(content)
    data = content.span(start)
    return {name: _tensor(name, entry, data) for name, entry in header.items() if name != _METADATA}


def read_metadata(content: Content) -> dict[str, str] | None:
    """Return the strings that the file holds beside the tensors, or None.

    Raises:
        ValueError, TypeError: If the header is invalid.
    """
    metadata = _header(content)[0].get(_METADATA)
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else None


def _header(content: Content) -> tuple[dict[str, Any], int]:
    """Return the header, and the position at which the bytes of the tensors begin."""
    if content.size < _LENGTH.size:
        raise ValueError("its header is cut off")
    (length,) = _LENGTH.unpack(content.head(_LENGTH.size))
    start = _LENGTH.size + length
    if length > _LARGEST_HEADER or start > content.size:
        raise ValueError(f"its header claims {length} bytes, the file has {content.size}")
    header = json.loads(content.read_at(_LENGTH.size, length))
    if not isinstance(header, dict):
        raise TypeError("its header is not a JSON object")
    return header, start


def _tensor(name: str, entry: Mapping[str, Any], data: Span) -> StoredTensor:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"its header has an invalid entry for {name!r}") from None
    dtype = _DTYPES.get(kind, str(kind))
    if len(shape) > MAX_RANK:
        raise ValueError(f"tensor {name!r} has {len(shape)} dimensions, torch has at most {MAX_RANK}")
    whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) and begin <= end <= data.size
    size = item_bytes(dtype)
    if not whole or (size is not None and end - begin != math.prod(shape) * size):
        raise ValueError(f"tensor {name!r} does not fit into the file")
    return StoredTensor(dtype, shape, partial(strided, data.part(begin, end - begin), dtype, shape))
