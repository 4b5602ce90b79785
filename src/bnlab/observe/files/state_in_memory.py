"""Reads the BN state of a state dict in memory, in the way in which that of a file is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.kernels.compiled.sharding import is_sharded
from bnlab.observe.evidence import Evidence, Hyperparameters
from bnlab.observe.files.split_tensor import SplitTensor
from bnlab.observe.files.state_dict import find_batch_norm
from bnlab.observe.files.tensors import StoredTensor, stored_dtype

__all__ = ["as_stored", "read_state_dict"]


def read_state_dict(state: Mapping[Any, Any], hyperparameters: Hyperparameters) -> Evidence:
    """Read the BN state of a mapping of tensors.

    Args:
        state: What ``model.state_dict()`` or ``torch.load`` returns: tensors or numpy arrays by name, which may lie
            inside other containers, under any key and behind the prefix of a wrapper. It does not change.
        hyperparameters: Momentum and eps, which a state dict does not hold.

    Returns:
        The evidence, without networks if the mapping holds no BN layer.

    Raises:
        UsageError: If the mapping holds no tensor, if it holds a module and no BN state beside it, or if a tensor of a
            BN layer has no values.
    """
    copied = _Copy()
    tree = copied.of(state, ())
    evidence = find_batch_norm(tree, hyperparameters)
    if evidence.networks:
        modules = ((".".join(map(str, path)), "is a module: check it by itself") for path in copied.modules)
        return replace(evidence, left_alone=(*evidence.left_alone, *modules))
    if copied.modules:
        keys = "".join(f"[{key!r}]" for key in copied.modules[0])
        raise UsageError(
            f"check: target must be a model or a mapping of tensors, got a {type(state).__name__} with a module. Pass "
            f"the module itself: target{keys}."
        )
    if not copied.tensors:
        raise UsageError(
            f"check: target must be a mapping with tensors, got a {type(state).__name__} without one. Pass "
            "model.state_dict(), the model, or a path."
        )
    return evidence


def as_stored(state: object) -> object:
    """Return a copy of nested containers in which every tensor is that of a file that has not been read yet.

    A tensor under two names becomes two tensors.
    """
    return _Copy().of(state, ())


@dataclass
class _Copy:
    """A copy of nested containers, in which tensors are those of a file that has not been read yet.

    Attributes:
        modules: The keys that lead to each module.
        tensors: Number of tensors.
    """

    modules: list[tuple[Any, ...]] = field(default_factory=list)
    tensors: int = 0
    _copies: dict[int, Any] = field(default_factory=dict)

    def of(self, value: object, path: tuple[Any, ...]) -> object:
        """Return the copy of one value. A container that occurs twice has one copy."""
        if isinstance(value, (Tensor, np.ndarray)):
            self.tensors += 1
            if isinstance(value, Tensor) and is_sharded(value):
                return _shard(value, path) or value
            return _stored(value, path) or value
        if isinstance(value, (StoredTensor, SplitTensor)):
            return replace(value)
        if isinstance(value, nn.Module):
            self.modules.append(path)
            return None
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, Mapping):
            mapping = self._copies[id(value)] = {}
            mapping.update({key: self.of(part, (*path, key)) for key, part in value.items()})
            return mapping
        if isinstance(value, (list, tuple)):
            items = self._copies[id(value)] = []
            items += [self.of(part, (*path, index)) for index, part in enumerate(value)]
            return items
        return value


def _shard(value: Tensor, path: tuple[Any, ...]) -> StoredTensor | SplitTensor | None:
    """Return the tensor of a DTensor if this rank holds all of it, else a tensor without its values."""
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(value, DTensor):
        return None
    local = value.to_local()
    is_whole = local.shape == value.shape and not any(isinstance(kind, Partial) for kind in value.placements)
    return _stored(local, path) if is_whole else SplitTensor(_dtype(value), tuple(value.shape), ())


def _dtype(value: Tensor | NDArray[Any]) -> str:
    """Return the torch name of the dtype of a tensor or an array."""
    return str(value.dtype).removeprefix("torch.")


def _stored(value: Tensor | NDArray[Any], path: tuple[Any, ...]) -> StoredTensor | None:
    """Return a tensor or an array as that of a file; None if it is sparse, quantized or of an unknown dtype."""
    name = _dtype(value)
    dtype = stored_dtype(name)
    if dtype is None or (isinstance(value, Tensor) and value.layout != torch.strided):
        return None
    return StoredTensor(name, tuple(value.shape), partial(_bits, value, dtype, ".".join(map(str, path))))


def _bits(value: Tensor | NDArray[Any], dtype: np.dtype[Any], path: str) -> NDArray[Any]:
    """Return the values; those of a dtype that numpy lacks as integers of the same size.

    Raises:
        UsageError: If the tensor has no values, as on the meta device.
    """
    is_lacking = _dtype(value) != dtype.name
    if not isinstance(value, Tensor):
        return value.view(dtype) if is_lacking else value
    if value.is_meta:
        raise UsageError(
            f"check: {path} must have values, got a tensor on the meta device. Load the file with map_location='cpu'."
        )
    value = value.detach().cpu().contiguous()
    array: NDArray[Any] = (value.view(getattr(torch, dtype.name)) if is_lacking else value).numpy()
    return array
