"""Turns the tensors of an ONNX model into arrays, after their size is known."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.observe.files.onnx_model.external_data import ModelFile

if TYPE_CHECKING:
    from onnx import SparseTensorProto, TensorProto

__all__ = ["dense", "dtype_name", "holds_numbers", "number_of_values", "tensor_values", "value_parts"]

_FLOATING = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
_NO_NUMBERS = (0, 8)  # undefined, and strings
_MAX_RANK = 64  # numpy has no more
_EXTERNAL = 1
_BYTE = 8
_FIELDS = {
    **dict.fromkeys((1, 14), "float_data"),
    **dict.fromkeys((11, 15), "double_data"),
    **dict.fromkeys((12, 13), "uint64_data"),
    7: "int64_data",
}
_PACKED = {"INT4": 4, "4E2M1": 4, "INT2": 2, "6E2M3": 6, "6E3M2": 6}
"""Bits of the types of which a byte holds several values, by the end of their name."""
_PARTS = {14: 2, 15: 2}
"""Values in the field for one value of the tensor: a complex number has two."""


@dataclass(frozen=True)
class NumberType:
    """How the values of a data type are stored.

    Attributes:
        dtype: The dtype of numpy or ml_dtypes.
        bits: The bits of one value in a file.
    """

    dtype: np.dtype[Any]
    bits: int


def dtype_name(data_type: int) -> str:
    """Return the name of an ONNX data type: that of torch for the floating types BN computes in."""
    return _FLOATING.get(data_type, f"onnx type {data_type}")


@cache
def number_type(data_type: int) -> NumberType | None:
    """Return how the values of an ONNX data type are stored; None if it holds no numbers that numpy can hold."""
    from onnx import TensorProto, helper

    if data_type in _NO_NUMBERS or data_type not in TensorProto.DataType.values():
        return None
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(data_type))
    except KeyError:
        return None
    name = TensorProto.DataType.Name(data_type)
    packed = (bits for ending, bits in _PACKED.items() if name.endswith(ending))
    return NumberType(dtype, next(packed, dtype.itemsize * _BYTE))


def holds_numbers(data_type: int) -> bool:
    """Return whether numpy, with ml_dtypes, has a dtype for an ONNX data type."""
    return number_type(data_type) is not None


def number_of_values(dims: Sequence[int]) -> int:
    """Return the number of values of a shape; one too large to read for a shape that no array has."""
    if len(dims) > _MAX_RANK:
        return 1 << 63
    if min(dims, default=0) < 0:
        raise ValueError(f"a tensor has the impossible shape {list(dims)}")
    return math.prod(dims)


def tensor_values(tensor: TensorProto, file: ModelFile) -> NDArray[Any]:
    """Return the values of a tensor in its own dtype, also bfloat16 and float8.

    Args:
        tensor: A tensor whose number of values the caller has judged.
        file: The file of the model, which leads to external data.

    Raises:
        ValueError: If the tensor does not hold the values that its dims promise, or values that are no numbers.
        DamagedFile: If its external data cannot be read.
    """
    kind = number_type(tensor.data_type)
    if kind is None:
        raise ValueError(f"tensor {tensor.name!r} has the data type {tensor.data_type}, which holds no numbers")
    size = -(-number_of_values(tensor.dims) * kind.bits // _BYTE)
    if tensor.data_location == _EXTERNAL:
        content = file.span(tensor, size).read()
        if kind.bits >= _BYTE:
            return np.frombuffer(content, dtype=kind.dtype).reshape(tensor.dims)
        return _converted(type(tensor)(data_type=tensor.data_type, dims=tensor.dims, raw_data=content))
    _check_length(tensor, kind, size)
    if kind.bits >= _BYTE and tensor.HasField("raw_data") and sys.byteorder == "little":
        return np.frombuffer(tensor.raw_data, dtype=kind.dtype).reshape(tensor.dims)
    return _converted(tensor)


def _converted(tensor: TensorProto) -> NDArray[Any]:
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(tensor))


def value_parts(tensor: TensorProto, file: ModelFile, part: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield the values of a tensor in parts of this size, each with the position of its first value.

    Args:
        tensor: A tensor of numbers of whole bytes.
        file: The file of the model, which leads to external data.
        part: Number of values.

    Raises:
        ValueError, DamagedFile: As `tensor_values` does.
    """
    kind = number_type(tensor.data_type)
    if tensor.data_location != _EXTERNAL or kind is None:
        values = tensor_values(tensor, file).reshape(-1)
        yield from ((start, values[start : start + part]) for start in range(0, values.size, part))
        return
    dtype, count = kind.dtype, number_of_values(tensor.dims)
    span = file.span(tensor, count * dtype.itemsize)
    for start in range(0, count, part):
        size = min(part, count - start)
        yield start, np.frombuffer(span.part(start * dtype.itemsize, size * dtype.itemsize).read(), dtype=dtype)


def dense(tensor: SparseTensorProto, file: ModelFile) -> NDArray[Any]:
    """Return the values of a sparse tensor, with zeros where it stores none.

    Raises:
        ValueError: If indices and values do not fit together, or an index lies outside the shape.
        DamagedFile: If its external data cannot be read.
    """
    shape = tuple(tensor.dims)
    count, stored = number_of_values(shape), number_of_values(tensor.values.dims)
    if stored > count or number_of_values(tensor.indices.dims) > max(1, len(shape)) * stored:
        raise ValueError("a sparse tensor has more values than its shape")
    values, indices = (tensor_values(part, file) for part in (tensor.values, tensor.indices))
    if indices.ndim > 1:
        indices = np.ravel_multi_index(tuple(indices.reshape(-1, len(shape)).T), shape)
    if indices.size != values.size or (indices.size and not 0 <= indices.min() <= indices.max() < count):
        raise ValueError("a sparse tensor has an index outside its shape")
    flat = np.zeros(count, dtype=values.dtype)
    flat[indices] = values.reshape(-1)
    return flat.reshape(shape)


def _check_length(tensor: TensorProto, kind: NumberType, size: int) -> None:
    """Refuse a tensor that holds more or fewer values than its dims, before they are converted."""
    if tensor.HasField("raw_data"):
        stored, needed = len(tensor.raw_data), size
    else:
        stored = len(getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data")))
        count = number_of_values(tensor.dims) * _PARTS.get(tensor.data_type, 1)
        packs = kind.bits < _BYTE and _BYTE % kind.bits == 0  # a value of 6 bits has an int32 of its own
        needed = size if packs else count
    if stored != needed:
        raise ValueError(f"tensor {tensor.name!r} must hold the values its dims promise, got others")
