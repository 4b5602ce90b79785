"""The storages to which the tensors in the pickles of torch refer."""

from __future__ import annotations

from dataclasses import dataclass

from bnlab.observe.files.content import Span
from bnlab.observe.files.pickle_data import Data, Global
from bnlab.observe.files.tensors import item_bytes

__all__ = ["StorageReference", "persistent_load", "storage_item_bytes"]

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


@dataclass(frozen=True, slots=True)
class StorageReference:
    """A storage of a pickle, which lies beside the pickle.

    Attributes:
        key: The key under which it lies.
        dtype: The torch name of its dtype, or the name of its class where that has no dtype.
        offset: Where it begins in a larger one, in values.
        bytes: Its bytes where they lie inside the pickle; None where they lie beside it.
    """

    key: str
    dtype: str
    offset: int = 0
    bytes: Span | None = None


def persistent_load(identifier: Data) -> Data:
    """Return what a persistent id stands for, without its device.

    It is ('storage', type, key, device, numel[, view]), or ('module', class, file, source) before torch 1.6.

    Raises:
        ValueError, TypeError: If it is something else.
    """
    if not (isinstance(identifier, tuple) and len(identifier) >= 3 and identifier[0] in ("module", "storage")):
        raise ValueError("persistent id is not that of a storage")
    what, kind, key = identifier[:3]
    if what == "module":
        return kind
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
