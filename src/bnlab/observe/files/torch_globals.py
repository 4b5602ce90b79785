"""The names in the pickles of torch that stand for tensors and storages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from bnlab.observe.files.content import Span
from bnlab.observe.files.legacy_pickles import read_legacy_pickles
from bnlab.observe.files.numpy_data import as_stored_tensor
from bnlab.observe.files.pickle_data import Data, Global
from bnlab.observe.files.pickle_globals import Builder, Known, Storages
from bnlab.observe.files.sharded_tensor import WRAPPER, distributed_tensor
from bnlab.observe.files.tensors import MAX_RANK, StoredTensor, strided
from bnlab.observe.files.torch_storages import StorageReference

__all__ = ["TORCH"]

_INT64 = 1 << 63


def _tensor(builder: Builder, arguments: tuple[Data, ...], dtype: Global | None = None) -> StoredTensor:
    storage, offset, shape, strides = arguments[:4]
    name = storage.dtype if dtype is None else dtype.name
    _check_places(offset, shape, strides)
    builder.budget.spend("tensors")
    bits = partial(_bits, builder.storages, storage, name, shape, strides, offset + storage.offset)
    return StoredTensor(name, tuple(shape), bits)


def _check_places(offset: Data, shape: Data, strides: Data) -> None:
    """Refuse what no tensor of torch has, before anything is computed with it."""
    if len(shape) > MAX_RANK:
        raise ValueError(f"tensor has {len(shape)} dimensions, torch has at most {MAX_RANK}")
    for number in (offset, *shape, *strides):
        if type(number) is not int or not -_INT64 <= number < _INT64:
            raise TypeError


def _bits(
    storages: Storages,
    storage: StorageReference,
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
) -> Data:
    span = storages.locate(storage.key) if storage.bytes is None else storage.bytes
    return strided(span, dtype, shape, strides=strides, offset=offset, big_endian=storages.big_endian)


def _storage(builder: Builder, arguments: tuple[Data, ...]) -> Data:
    """Return a storage that ``pickle.dump`` of a tensor writes: as a file of the legacy ``torch.save`` in bytes."""
    (data,) = arguments
    source = Span.of(data) if isinstance(data, bytes) else data
    if not isinstance(source, Span):
        return None
    storage, storages = read_legacy_pickles(source, {}, builder.budget)
    if not isinstance(storage, StorageReference):
        return None
    return replace(storage, bytes=storages.locate(storage.key))


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
    if not isinstance(kind, Global) or kind.path == _FROM_TYPE:
        return None
    if kind.path == WRAPPER and len(arguments) > 3:
        return distributed_tensor(inner, arguments[3])
    return builder.build(kind, inner)


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
    "torch.storage._load_from_bytes": _storage,
    **{
        f"torch.jit._pickle.{name}": _first
        for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
    },
}
"""Tensors, parameters and typed lists of torch."""
