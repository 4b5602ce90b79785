"""Writes ONNX models field by field, because the onnx package writes no hostile ones."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

__all__ = ["attribute", "field", "function", "graph", "model", "node", "number", "tensor", "value_info", "varint"]

FLOAT, INT64 = 1, 7


def varint(value: int) -> bytes:
    """Encode an unsigned integer."""
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def number(key: int, value: int) -> bytes:
    """Encode a field that is an integer."""
    return varint(key << 3) + varint(value)


def field(key: int, value: bytes | str) -> bytes:
    """Encode a field that is a string or a message."""
    encoded = value.encode() if isinstance(value, str) else value
    return varint(key << 3 | 2) + varint(len(encoded)) + encoded


def tensor(
    name: str,
    dims: Sequence[int],
    data: bytes | None = None,
    *,
    kind: int = FLOAT,
    external: dict[str, str] | None = None,
) -> bytes:
    """Encode a TensorProto."""
    parts = [number(1, side) for side in dims] + [number(2, kind), field(8, name)]
    if data is not None:
        parts.append(field(9, data))
    if external is not None:
        parts += [field(13, field(1, key) + field(2, value)) for key, value in external.items()]
        parts.append(number(14, 1))
    return b"".join(parts)


def node(
    kind: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *attributes: bytes,
    name: str = "",
    domain: str = "",
) -> bytes:
    """Encode a NodeProto."""
    parts = [field(1, text) for text in inputs] + [field(2, text) for text in outputs]
    parts += [field(3, name), field(4, kind), *(field(5, value) for value in attributes), field(7, domain)]
    return b"".join(parts)


def attribute(name: str, value: int | bytes, kind: str = "int") -> bytes:
    """Encode an AttributeProto; `kind` is int, tensor or graph."""
    if isinstance(value, int):
        return field(1, name) + number(3, value) + number(20, 2)
    key, code = {"tensor": (5, 4), "graph": (6, 5)}[kind]
    return field(1, name) + field(key, value) + number(20, code)


def graph(
    nodes: Sequence[bytes],
    constants: Sequence[bytes] = (),
    *,
    name: str = "g",
    inputs: Sequence[bytes] = (),
    outputs: Sequence[bytes] = (),
    sparse: Sequence[bytes] = (),
) -> bytes:
    """Encode a GraphProto."""
    parts = [field(1, value) for value in nodes] + [field(2, name)] + [field(5, value) for value in constants]
    parts += [field(11, value) for value in inputs] + [field(12, value) for value in outputs]
    return b"".join([*parts, *(field(15, value) for value in sparse)])


def value_info(name: str, dims: Sequence[int]) -> bytes:
    """Encode the ValueInfoProto of a tensor of float32."""
    shape = b"".join(field(1, number(1, side)) for side in dims)
    return field(1, name) + field(2, field(1, number(1, FLOAT) + field(2, shape)))


def function(name: str, inputs: Sequence[str], outputs: Sequence[str], nodes: Sequence[bytes]) -> bytes:
    """Encode a FunctionProto of the domain "local"."""
    parts = [field(1, name), *(field(4, text) for text in inputs), *(field(5, text) for text in outputs)]
    parts += [
        *(field(7, value) for value in nodes),
        field(9, number(2, 17)),
        field(9, field(1, "local") + number(2, 1)),
    ]
    return b"".join([*parts, field(10, "local")])


def model(folder: Path, body: bytes, functions: Sequence[bytes] = ()) -> Path:
    """Write a ModelProto."""
    path = folder / "hostile.onnx"
    opsets = field(8, number(2, 17)) + field(8, field(1, "local") + number(2, 1))
    path.write_bytes(number(1, 8) + field(7, body) + opsets + b"".join(field(25, value) for value in functions))
    return path


def floats(*values: float) -> bytes:
    """Encode the values of a tensor."""
    return struct.pack(f"<{len(values)}f", *values)


def integers(*values: int) -> bytes:
    """Encode the values of a tensor."""
    return struct.pack(f"<{len(values)}q", *values)
