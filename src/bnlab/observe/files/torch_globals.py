"""The names in the pickles of torch that stand for tensors and storages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from bnlab.observe.files.content import Span
from bnlab.observe.files.numpy_data import as_stored_tensor
from bnlab.observe.files.pickle_data import Data, Global
from bnlab.observe.files.pickle_globals import Builder, Known, Storages
from bnlab.observe.files.sharded_tensor import WRAPPER, distributed_tensor
from bnlab.observe.files.tensors import MAX_RANK, StoredTensor, item_bytes, strided

__all__ = ["TORCH", "StorageReference", "persistent_load", "storage_item_bytes"]

_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_OTHER_STORAGE_BYTES = {
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
    "UntypedStorage": 1,  # counted in bytes: float8, uint16 and other dtypes without a class of their own
}
_INT64 = 1 << 63


@dataclass(frozen=True, slots=True)
class StorageReference:
    """A storage of a pickle, which lies beside the pickle.

    Attributes:
        key: The key under which it lies.
        dtype: The torch name of its dtype, or the name of its class where that has no dtype.
        offset: Where it begins in a larger one, in values.
    """

    key: str
    dtype: str
    offset: int = 0


def persistent_load(identifier: Data) -> Data:
    """Return what a persistent id stands for, without its device.

    It is ('storage', type, key, device, numel[, view]), or ('module', class, file, source) before torch 1.6.

    Raises:
        ValueError, TypeError: If it is something else.
    """
    if isinstance(identifier, tuple) and len(identifier) >= 3 and identifier[0] == "module":
        return identifier[1]
    if not (isinstance(identifier, tuple) and len(identifier) >= 3 and identifier[0] == "storage"):
        raise ValueError("persistent id is not that of a storage")
    kind, key = identifier[1], identifier[2]
    if not (isinstance(kind, Global) and isinstance(key, str)):
        raise TypeError("persistent id names no storage")
    view = identifier[5] if len(identifier) > 5 else None
    offset = view[1] if isinstance(view, tuple) else 0
    return StorageReference(key, _STORAGE_DTYPES.get(kind.name, kind.name), offset)


def storage_item_bytes(dtype: str) -> int:
    """Return the size of one value of a storage in bytes, also for dtypes whose values are never read.

    Raises:
        ValueError: If the dtype is unknown.
    """
    size = item_bytes(dtype) or _OTHER_STORAGE_BYTES.get(dtype)
    if size is None:
        raise ValueError(f"storages of type {dtype} are unknown")
    return size


def _tensor(builder: Builder, arguments: tuple[Data, ...], dtype: Global | None = None) -> StoredTensor:
    storage, offset, shape, strides = arguments[:4]
    name = storage.dtype if dtype is None else dtype.name
    _check_places(offset, shape, strides)
    builder.budget.spend("tensors")
    bits = partial(_bits, builder.storages, storage.key, name, shape, strides, offset + storage.offset)
    return StoredTensor(name, tuple(shape), bits)


def _check_places(offset: Data, shape: Data, strides: Data) -> None:
    """Refuse what no tensor of torch has, before anything is computed with it."""
    if len(shape) > MAX_RANK:
        raise ValueError(f"tensor has {len(shape)} dimensions, torch has at most {MAX_RANK}")
    for number in (offset, *shape, *strides):
        if type(number) is not int or not -_INT64 <= number < _INT64:
            raise TypeError


def _bits(
    storages: Storages, key: str, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> Data:
    span: Span = storages.locate(key)
    return strided(span, dtype, shape, strides=strides, offset=offset, big_endian=storages.big_endian)


def _tensor_v2(builder: Builder, arguments: tuple[Data, ...]) -> Data:
    # The last argument marks views such as a conjugate, whose values differ from the stored ones.
    return None if any(arguments[6:]) else _tensor(builder, arguments)


def _tensor_v3(builder: Builder, arguments: tuple[Data, ...]) -> Data:
    return None if any(arguments[7:]) else _tensor(builder, arguments, dtype=arguments[6])


def _first(_: Builder, arguments: tuple[Data, ...]) -> Data:
    """Return the value that a call marks as a parameter, a buffer or a type."""
    return arguments[0]


def _from_type(builder: Builder, arguments: tuple[Data, ...]) -> Data:
    """Return the tensor of a subclass, which is that of its base class."""
    kind, _, inner = arguments[:3]
    nested = isinstance(kind, Global) and kind.path == _FROM_TYPE
    if isinstance(kind, Global) and kind.path == WRAPPER and len(arguments) > 3:
        return distributed_tensor(inner, arguments[3])
    return None if nested or not isinstance(kind, Global) else builder.build(kind, inner)


def _from_numpy(_: Builder, arguments: tuple[Data, ...]) -> Data:
    """Return the tensor of a device such as XLA, which is pickled as an array."""
    return as_stored_tensor(arguments[0])


_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"

TORCH: Mapping[str, Known] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _from_numpy,
    "torch._utils._rebuild_xla_tensor": _from_numpy,
    _FROM_TYPE: _from_type,
    **{
        f"torch.jit._pickle.{name}": _first
        for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
    },
}
"""Tensors, parameters and typed lists of torch."""
