"""Walks the containers in a file: dicts, lists and foreign objects, each with the path to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from bnlab.errors import PickledModule
from bnlab.observe.files.budget import Budget
from bnlab.observe.files.numpy_data import as_stored_tensor
from bnlab.observe.files.pickle_data import InertObject
from bnlab.observe.files.pickled_module import ModuleTree, attributes_of, read_module
from bnlab.observe.files.tensors import StoredTensor

__all__ = ["Container", "containers", "keys_of", "kind_of", "refusal_of_module", "tensors_in"]

Path: TypeAlias = "tuple[Path, Any] | None"
"""The path to a container as a linked list, because copying a tuple at each level of a deep file would be slow."""

_PAIR = 2
_CONTAINERS = (dict, list, tuple, InertObject, ModuleTree)


@dataclass(frozen=True)
class Container:
    """A container of a file.

    Attributes:
        path: The path to the container.
        children: The contents of the container; the state dict of a pickled module.
        module: The pickled module; None for any other container.
    """

    path: Path
    children: Mapping[Any, Any]
    module: ModuleTree | None = None


def containers(tree: object, budget: Budget | None = None) -> Iterator[Container]:
    """Yield every container, each object once, in file order, and pickled modules as their state dicts.

    Args:
        tree: The contents of a file.
        budget: The work on the file so far; None for a tree that is no file.

    Raises:
        TooMuchWork: If the walk takes longer than that through any checkpoint.
    """
    walk = _Walk(budget or Budget())
    pending: list[tuple[Path, object]] = [(None, tree)]
    while pending:
        path, node = pending.pop()
        if not walk.is_new(node):
            continue
        walk.budget.check_time()
        module = node if isinstance(node, ModuleTree) else None
        if isinstance(node, InertObject):
            module = read_module(node, walk.budget)
        if module is not None:
            yield Container(path, module.tensors, module)
            walk.seen |= module.objects
            inner = module.attributes
        else:
            children = walk.children(node)
            yield Container(path, children)
            inner = [(key, child) for key, child in children.items() if isinstance(child, _CONTAINERS)]
        pending.extend(((path, key), child) for key, child in reversed(inner))


@dataclass
class _Walk:
    """The objects that a walk has met so far. Each is looked into once, however many objects share it."""

    budget: Budget
    seen: set[int] = field(default_factory=set)

    def is_new(self, node: object) -> bool:
        """Return whether an object is met for the first time."""
        is_new = id(node) not in self.seen
        self.seen.add(id(node))
        return is_new

    def children(self, node: object) -> Mapping[Any, Any]:
        """Return the contents of a container by their keys."""
        match node:
            case dict():
                return node
            case list() | tuple():
                return dict(node) if _is_list_of_pairs(node) else dict(enumerate(node))
            case InertObject():
                return self._inside(node)
            case _:
                return {}

    def _inside(self, node: InertObject) -> Mapping[Any, Any]:
        """Return the arguments, elements, items and attributes of an object that no object before it has."""
        inside: dict[Any, Any] = {}
        for part in (node.arguments, node.elements):
            if part and self.is_new(part):
                inside.update(enumerate(part))
        inside.update(node.items)
        for attributes in attributes_of(node):
            if self.is_new(attributes):
                inside.update(attributes)
        return inside


def _is_list_of_pairs(node: Sequence[Any]) -> bool:
    """Return whether a list holds names and tensors, as ``list(model.state_dict().items())`` does."""
    return bool(node) and all(
        isinstance(pair, (tuple, list))
        and len(pair) == _PAIR
        and isinstance(pair[0], str)
        and (isinstance(pair[1], StoredTensor) or as_stored_tensor(pair[1]) is not None)
        for pair in node
    )


def keys_of(path: Path) -> tuple[Any, ...]:
    """Return the keys that lead from the root to a container."""
    keys = []
    while path is not None:
        path, key = path
        keys.append(key)
    return tuple(reversed(keys))


def tensors_in(mapping: Mapping[Any, Any]) -> dict[str, StoredTensor]:
    """Return the tensors and arrays whose keys in a mapping are strings, in file order."""
    values = {key: as_stored_tensor(value) or value for key, value in mapping.items() if isinstance(key, str)}
    return {key: value for key, value in values.items() if isinstance(value, StoredTensor)}


def kind_of(value: object) -> str:
    """Return the name of the class of a value, as a user would write it."""
    return value.kind.path if isinstance(value, InertObject) else type(value).__name__


def refusal_of_module(kind: str) -> PickledModule:
    """Return the error for a file that holds a pickled module of the class `kind` and no tensor that can be read."""
    return PickledModule(
        f"file must hold tensors, got a pickled module ({kind}) without a tensor that can be read as data. "
        "Give package.module:callable that builds the model, "
        "or save its state dict: torch.save(model.state_dict(), path)."
    )
