"""Walks through the tensors of a batch: nested tuples, lists, mappings, dataclasses, and objects such as graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from bnlab.observe.passes.calling import Batch, is_opaque

__all__ = ["copy_of_batch", "copy_of_object", "map_tensors", "sequence_like", "tensors_in", "with_tensors"]


def map_tensors(
    item: Any,  # noqa: ANN401
    function: Callable[[Tensor], Any],
    of_object: Callable[[Any], Any] = lambda item: item,
) -> Any:  # noqa: ANN401
    """Apply a function to every tensor in nested tuples, lists, mappings and dataclasses, whose types are kept.

    Args:
        item: A batch.
        function: Maps a tensor to its replacement.
        of_object: Maps an object that moves itself to a device, such as a graph, to its replacement.
    """
    if isinstance(item, Tensor):
        return function(item)
    if is_opaque(item):
        return of_object(item)
    if isinstance(item, Mapping):
        return _mapping_like(item, {key: map_tensors(part, function, of_object) for key, part in item.items()})
    if isinstance(item, (tuple, list)):
        return sequence_like(item, [map_tensors(part, function, of_object) for part in item])
    if not is_dataclass(item) or isinstance(item, type):
        return item
    other = copy.copy(item)
    for name, part in _fields_of(item).items():
        object.__setattr__(other, name, map_tensors(part, function, of_object))  # it may be frozen
    return other


def copy_of_batch(item: Batch) -> Batch:
    """Return a copy of a batch, with new containers and tensors of the same types."""
    return map_tensors(item, torch.clone, copy_of_object)


def copy_of_object(item: Any) -> Any:  # noqa: ANN401
    """Return a copy of an object that moves itself to a device, such as a graph; its `clone()` if it has one."""
    clone = getattr(item, "clone", None)
    return clone() if callable(clone) else copy.copy(item)


def with_tensors(item: Batch, tensors: Iterable[Tensor]) -> Batch:
    """Return a batch, or a part of one, with other tensors in place of those that have dimensions, in their order."""
    waiting = iter(tensors)
    return map_tensors(item, lambda tensor: next(waiting) if tensor.dim() else tensor)


def _mapping_like(item: Mapping[Any, Any], parts: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(item) is dict or not isinstance(item, MutableMapping):
        return parts
    other = copy.copy(item)
    other.update(parts)
    return other


def sequence_like(item: Any, parts: list[Any]) -> Any:  # noqa: ANN401
    """Return a tuple, named tuple or list of the type of another one, with other parts."""
    return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)


def _fields_of(record: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    if hasattr(record, "__dict__"):
        return dict(vars(record))
    return {field.name: getattr(record, field.name) for field in fields(record) if hasattr(record, field.name)}


def tensors_in(value: Any) -> list[Tensor]:  # noqa: ANN401
    """Return every tensor in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list, set)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if not is_dataclass(value) or isinstance(value, type):
        return []
    return [tensor for item in _fields_of(value).values() for tensor in tensors_in(item)]
