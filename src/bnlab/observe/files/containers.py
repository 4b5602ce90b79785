"""Walks the containers in a file: dicts, lists and foreign objects, each with the path to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from bnlab.errors import PickledModule
from bnlab.observe.files.numpy_data import as_stored_tensor
from bnlab.observe.files.pickle_data import InertObject
from bnlab.observe.files.tensors import StoredTensor

__all__ = ["Container", "containers", "keys_of", "kind_of", "refusal_of_module", "tensors_in"]

Path: TypeAlias = "tuple[Path, Any] | None"
"""The path to a container as a linked list, because copying a tuple at each level of a deep file would be slow."""

_CONTAINERS = (dict, list, tuple, InertObject)


@dataclass(frozen=True)
class Container:
    """A container of a file.

    Attributes:
        path: The path to the container.
        children: The contents of the container; empty for a pickled module.
        module: The class of a pickled module; None for any other container.
    """

    path: Path
    children: Mapping[Any, Any]
    module: str | None = None


def containers(tree: object) -> Iterator[Container]:
    """Yield every container, each object once, in file order, without the contents of pickled modules."""
    seen: set[int] = set()
    pending: list[tuple[Path, object]] = [(None, tree)]
    while pending:
        path, node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, InertObject) and _is_module(node):
            yield Container(path, {}, node.kind.path)
            continue
        children = _children(node)
        yield Container(path, children)
        inner = [(key, child) for key, child in children.items() if isinstance(child, _CONTAINERS)]
        pending.extend(((path, key), child) for key, child in reversed(inner))


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
    """Return the error for a file that holds a pickled module of the class `kind` and no state dict."""
    return PickledModule(
        f"file must hold tensors only, got a pickled module ({kind}), which could be read only by running code. "
        "Give package.module:callable that builds the model, "
        "or save its state dict: torch.save(model.state_dict(), path)."
    )


def _children(node: object) -> Mapping[Any, Any]:
    match node:
        case dict():
            return node
        case list() | tuple():
            return dict(enumerate(node))
        case InertObject():
            inside = {**dict(enumerate(node.arguments)), **dict(enumerate(node.elements)), **node.items}
            return {**inside, **{key: value for state in _states(node) for key, value in state.items()}}
        case _:
            return {}


def _states(node: InertObject) -> list[dict[Any, Any]]:
    """Return the attributes of a foreign object, whose state is a dict, or a pair of a dict and the slots."""
    parts = node.state if isinstance(node.state, (tuple, list)) else [node.state]
    return [part for part in parts if isinstance(part, dict)]


def _is_module(node: InertObject) -> bool:
    """Return whether unpickling would make an nn.Module, from its attributes or by a call that receives them."""
    attributes = [*_states(node), *(part for part in node.arguments if isinstance(part, dict))]
    return any({"_parameters", "_modules"} <= part.keys() for part in attributes)
