"""Writes pickles opcode by opcode, because no pickler writes hostile ones."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "END",
    "KEYS",
    "LEGACY_HEADER",
    "START",
    "dictionary",
    "get",
    "integer",
    "layer",
    "listed",
    "named",
    "put",
    "reduced",
    "stored",
    "tensor",
    "text",
    "tuple_of",
    "zipped",
]

KEYS = ("weight", "bias", "running_mean", "running_var")
"""The tensors of a BN layer."""
START, END = b"\x80\x02", b"."
LEGACY_HEADER = b"".join(
    pickle.dumps(part, 2)
    for part in (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    )
)
"""What comes before the tree in a file of ``torch.save`` before 1.6."""


def text(value: str) -> bytes:
    """Push a string."""
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    """Push an integer of any size."""
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    """Push a class or function."""
    return f"c{module}\n{name}\n".encode()


def put(index: int) -> bytes:
    """Store the top of the stack in the memo."""
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    """Push a value of the memo."""
    return b"j" + struct.pack("<I", index)


def tuple_of(*values: bytes) -> bytes:
    """Push a tuple."""
    return b"(" + b"".join(values) + b"t"


def listed(*values: bytes) -> bytes:
    """Push a list."""
    return b"](" + b"".join(values) + b"e"


def dictionary(*values: bytes) -> bytes:
    """Push a dict of keys and values in turn."""
    return b"}(" + b"".join(values) + b"u"


def reduced(function: bytes, *arguments: bytes) -> bytes:
    """Push the result of a call."""
    return function + tuple_of(*arguments) + b"R"


def stored(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    """Push a storage of torch."""
    return tuple_of(text("storage"), named("torch", kind), text(key), text("cpu"), integer(count)) + b"Q"


def tensor(
    key: str,
    shape: Sequence[int],
    strides: Sequence[int],
    *,
    offset: int = 0,
    count: int = 1,
    kind: str = "FloatStorage",
) -> bytes:
    """Push a tensor of torch."""
    sizes = (tuple_of(*map(integer, numbers)) for numbers in (shape, strides))
    function = named("torch._utils", "_rebuild_tensor_v2")
    return reduced(function, stored(key, count, kind), integer(offset), *sizes, b"\x89", b"}")


def layer(name: str, value: bytes, *, keys: Sequence[str] = KEYS) -> bytes:
    """Push the keys and values of a BN layer, which all have one value."""
    return b"".join(text(f"{name}.{key}") + value for key in keys)


def zipped(
    folder: Path, tree: bytes, *, data: bytes = b"\0\0\x80?", compression: int = zipfile.ZIP_DEFLATED, level: int = 1
) -> Path:
    """Write a zip checkpoint with one storage, "0"."""
    path = folder / "hostile.pt"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=level) as archive:
        archive.writestr("archive/data.pkl", START + tree + END)
        archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", "3\n")
    path.write_bytes(buffer.getvalue())
    return path
