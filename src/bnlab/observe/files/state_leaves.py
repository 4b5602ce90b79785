"""Says where the tensors of a state dict lie, which of them are the statistics of BN layers, and puts others there.

A path is the tuple of keys that lead to a tensor through dicts and lists. A bare path lacks what wrappers put into the
names, so that the same tensor has the same bare path in the state dict of a model and in that of its DDP wrapper.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from bnlab.conventions import bare_names
from bnlab.observe.files.containers import containers, keys_of
from bnlab.observe.files.houses import path_parts, places
from bnlab.observe.files.jax_trees import with_joined_trees
from bnlab.observe.files.split_tensor import SplitTensor
from bnlab.observe.files.state_dict import optimizer_part, possible_layers
from bnlab.observe.files.state_in_memory import as_stored
from bnlab.observe.files.tensors import StoredTensor

__all__ = ["Leaf", "Path", "StateLeaves", "StatisticsPaths", "is_of_optimizer", "leaves_of", "with_leaves"]

Path: TypeAlias = "tuple[Any, ...]"
Leaf: TypeAlias = "Tensor | np.ndarray[Any, Any] | StoredTensor | SplitTensor"
_LEAVES = (Tensor, np.ndarray, StoredTensor, SplitTensor)


@dataclass(frozen=True)
class StatisticsPaths:
    """The bare paths of the statistics of one BN layer.

    Attributes:
        name: The path of the layer as one string, as the state dict has it.
        mean: The path of the running mean.
        var: The path of the running variance.
        counter: The path of the counter of batches; None for a layer without one.
    """

    name: str
    mean: Path
    var: Path
    counter: Path | None

    @property
    def all(self) -> tuple[Path, ...]:
        """The paths of all its tensors."""
        return (self.mean, self.var) if self.counter is None else (self.mean, self.var, self.counter)


@dataclass(frozen=True)
class StateLeaves:
    """The tensors of a state dict, and its BN layers.

    Attributes:
        paths: The paths of the tensors by their bare paths, in the order of the state dict.
        tensors: The tensors by their bare paths.
        layers: The BN layers.
        left_alone: Name and reason for what has the names of a BN layer, is none that can be read, and belongs to no
            optimizer.
    """

    paths: Mapping[Path, Path]
    tensors: Mapping[Path, Leaf]
    layers: tuple[StatisticsPaths, ...]
    left_alone: tuple[tuple[str, str], ...]


def leaves_of(state: object) -> StateLeaves:
    """Return the tensors of a state dict and its BN layers, which their names and shapes show.

    No value is read.

    Args:
        state: Nested mappings and lists of tensors, numpy arrays or tensors of a file.
    """
    raw = _walk(state)
    paths = _bare(raw)
    stored = as_stored(state)
    bare_of = {path: bare for bare, path in paths.items()}
    by_identity: dict[int, Path] = {}
    for path, leaf in _walk(stored).items():
        if path in bare_of:
            by_identity.setdefault(id(leaf), bare_of[path])
    layers, left_alone = _layers(stored, by_identity)
    return StateLeaves(paths, {bare: raw[path] for bare, path in paths.items()}, layers, left_alone)


def is_of_optimizer(path: Path) -> bool:
    """Return whether an optimizer keeps the tensor at a path."""
    return optimizer_part(part for key in path for part in path_parts(str(key))) is not None


def with_leaves(state: object, leaves: Mapping[Path, object]) -> object:
    """Return a copy of nested containers with other tensors.

    Args:
        state: The containers, which stay as they are.
        leaves: The new tensors by their paths.
    """
    return _with_leaves(state, leaves, (), {})


def _walk(state: object) -> dict[Path, Leaf]:
    """Return every tensor by its path. A container that occurs twice is entered once."""
    leaves: dict[Path, Leaf] = {}
    entered: set[int] = set()
    pending: list[tuple[Path, object]] = [((), state)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, _LEAVES):
            leaves[path] = node
        elif isinstance(node, (Mapping, list, tuple)) and id(node) not in entered:
            entered.add(id(node))
            items = node.items() if isinstance(node, Mapping) else enumerate(node)
            pending.extend(reversed([((*path, key), child) for key, child in items]))
    return leaves


def _bare(raw: Mapping[Path, Leaf]) -> dict[Path, Path]:
    """Return the paths by their bare paths. Names lose what wrappers put into all names of one container."""
    names: dict[Path, list[str]] = {}
    for path in raw:
        if path and isinstance(path[-1], str):
            names.setdefault(path[:-1], []).append(path[-1])
    bare = {start: bare_names(inside) for start, inside in names.items()}
    return {(*path[:-1], bare[path[:-1]].get(path[-1], path[-1])) if path[:-1] in bare else path: path for path in raw}


def _layers(
    stored: object, by_identity: Mapping[int, Path]
) -> tuple[tuple[StatisticsPaths, ...], tuple[tuple[str, str], ...]]:
    layers: dict[Path, StatisticsPaths] = {}
    left_alone: list[tuple[str, str]] = []
    for container in with_joined_trees(containers(stored)):
        path = tuple(map(str, keys_of(container.path)))
        for possible in possible_layers(path, container, places(container.children)):
            where = {role: by_identity.get(id(value)) for role, (_, value) in possible.place.entries.items()}
            mean, var = where.get("running_mean"), where.get("running_var")
            reason = possible.half.reason if possible.half is not None else possible.objection
            if reason is None and mean is not None and var is not None:
                layers.setdefault(mean, StatisticsPaths(possible.path, mean, var, where.get("num_batches_tracked")))
            elif optimizer_part((*path, *path_parts(possible.place.start))) is None:
                left_alone.append((possible.path, reason or "lies in an object of a foreign class"))
    return tuple(layers.values()), tuple(left_alone)


def _with_leaves(node: object, leaves: Mapping[Path, object], path: Path, copies: dict[int, Any]) -> object:
    if path in leaves:
        return leaves[path]
    if isinstance(node, _LEAVES) or not isinstance(node, (Mapping, list, tuple)):
        return node
    if id(node) in copies:
        return copies[id(node)]
    if isinstance(node, Mapping):
        mapping = copies[id(node)] = copy.copy(node) if isinstance(node, MutableMapping) else dict(node)
        for key, child in node.items():
            mapping[key] = _with_leaves(child, leaves, (*path, key), copies)
        return mapping
    items: list[Any] = []
    if isinstance(node, list):
        copies[id(node)] = items
    items += [_with_leaves(child, leaves, (*path, index), copies) for index, child in enumerate(node)]
    if isinstance(node, list):
        return items
    return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
