"""Reads what numpy saves: ``.npz``, a zip archive of arrays, and ``.npy``, one array.

An array is a header in Python syntax and the bytes of its values. The header is parsed as literals only, and an array
of objects, which is a pickle, is never read.
"""

from __future__ import annotations

import ast
import math
import struct
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from bnlab.errors import NotACheckpoint
from bnlab.observe.files.content import Content, Span
from bnlab.observe.files.numpy_data import torch_dtype
from bnlab.observe.files.tensors import StoredTensor, fortran_strides, is_shape, item_bytes, strided
from bnlab.observe.files.zip_archive import Archive

__all__ = ["NPY_MAGIC", "NPY_SUFFIX", "read_npy", "read_npz"]

NPY_MAGIC = b"\x93NUMPY"
NPY_SUFFIX = ".npy"
_LARGEST_HEADER = 10_000  # the limit of numpy itself
_HEAD_BYTES = _LARGEST_HEADER + 16
_VOID = "bfloat16"
"""The only 2 bytes without a name in a file of tensors: JAX saves bfloat16 in this way."""
_LENGTHS = {1: struct.Struct("<H"), 2: struct.Struct("<I"), 3: struct.Struct("<I")}
_KEYS = {"descr", "fortran_order", "shape"}
_UNREADABLE = "unreadable"


def read_npz(archive: Archive) -> dict[str, StoredTensor]:
    """Return every array of an archive by name. Those that are not compressed are not read yet.

    Raises:
        ValueError: If the archive or one of its arrays is damaged.
        NotACheckpoint: If all arrays are arrays of objects.
        TooMuchWork: If the arrays unpack to more than any checkpoint holds.
    """
    names = [name for name in archive.members if name.endswith(NPY_SUFFIX)]
    archive.content.budget.spend("tensors", len(names))
    tensors = {name.removesuffix(NPY_SUFFIX): _member(archive, name) for name in names}
    if tensors and all(tensor.dtype == _UNREADABLE for tensor in tensors.values()):
        raise _refusal_of_objects()
    return tensors


def read_npy(content: Content) -> StoredTensor:
    """Return the array of a file.

    Raises:
        ValueError: If the file is damaged.
        NotACheckpoint: If it holds an array of objects, as ``np.save(path, dict)`` writes it.
    """
    tensor = _array("array", content.span(), content.head(_HEAD_BYTES))
    if tensor.dtype == _UNREADABLE:
        raise _refusal_of_objects()
    return tensor


def _refusal_of_objects() -> NotACheckpoint:
    return NotACheckpoint(
        "file must hold arrays of numbers, got arrays of Python objects, which could be read only by running code. "
        "Save the numbers by name: numpy.savez(path, **state)."
    )


@dataclass(frozen=True)
class _Packed:
    """A compressed member, which is unpacked when its values are read."""

    archive: Archive
    name: str

    def read_at(self, start: int, size: int) -> bytes:
        return self.archive.span(self.name).part(start, size).read()


def _member(archive: Archive, name: str) -> StoredTensor:
    header = archive.head(name, _HEAD_BYTES)
    span = Span(_Packed(archive, name), 0, archive.members[name].size)
    return _array(name, span, header)


def _array(name: str, span: Span, start: bytes) -> StoredTensor:
    descr, fortran, shape, at = _header(name, start)
    dtype = (_VOID if descr[1:] == "V2" else torch_dtype(descr[1:])) if isinstance(descr, str) else None
    if dtype is None:
        return StoredTensor(_UNREADABLE, shape, partial(_refuse, name))
    size = math.prod(shape) * (item_bytes(dtype) or 0)
    if span.size - at != size:
        raise ValueError(f"{name} needs {size} bytes, it has {span.size - at}")
    data = span.part(at, size)
    strides = fortran_strides(shape) if fortran else None
    bits = partial(strided, data, dtype, shape, strides=strides, big_endian=str(descr).startswith(">"))
    return StoredTensor(dtype, shape, bits)


def _header(name: str, start: bytes) -> tuple[object, bool, tuple[int, ...], int]:
    """Return the description of the values, whether they lie in Fortran order, the shape, and where they begin."""
    version = start[len(NPY_MAGIC)] if start.startswith(NPY_MAGIC) and len(start) > len(NPY_MAGIC) else 0
    length_of = _LENGTHS.get(version)
    if length_of is None:
        raise ValueError(f"{name} does not begin like an array of numpy")
    at = len(NPY_MAGIC) + 2 + length_of.size
    if len(start) < at:
        raise ValueError(f"{name} ends in its header")
    (length,) = length_of.unpack_from(start, at - length_of.size)
    if length > _LARGEST_HEADER:
        raise ValueError(f"{name} has a header of {length} bytes, numpy writes at most {_LARGEST_HEADER}")
    if at + length > len(start):
        raise ValueError(f"{name} ends in its header")
    text = start[at : at + length].decode("utf-8" if version == max(_LENGTHS) else "latin-1")
    return (*_fields(name, text), at + length)


def _fields(name: str, text: str) -> tuple[object, bool, tuple[int, ...]]:
    try:
        header = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.keys() != _KEYS:
        raise ValueError(f"{name} has a header that is none of numpy")
    fortran, shape = header["fortran_order"], header["shape"]
    if not isinstance(fortran, bool) or not isinstance(shape, tuple) or not is_shape(shape):
        raise ValueError(f"{name} has an impossible shape")
    return header["descr"], fortran, shape


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} holds other values than numbers")
