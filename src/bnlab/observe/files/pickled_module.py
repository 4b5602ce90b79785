"""Reads a pickled ``nn.Module`` as data: its state dict, and what the objects of its BN layers say beside it.

A module is pickled as the dict of its attributes. ``_parameters`` and ``_buffers`` hold tensors by name, ``_modules``
the modules inside. A graph module of torch.fx is pickled as a call with that dict. The same attributes lie flat in the
objects of a TorchScript archive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from bnlab.conventions import NAMES_IN_WRAPPERS
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.budget import Budget
from bnlab.observe.files.numpy_data import as_stored_tensor
from bnlab.observe.files.pickle_data import InertObject
from bnlab.observe.files.tensors import StoredTensor
from bnlab.observe.graph_state import NodeMode, UntrackedLayer

__all__ = [
    "ModuleTree",
    "Parts",
    "StoredModule",
    "add_module",
    "attributes_of",
    "is_plausible",
    "objection_to_instance_norm",
    "read_module",
]

_STATISTICS = ("running_mean", "running_var")
_FEW = 4  # a call that makes a module has its attributes among the first arguments
_TREE = frozenset({"_parameters", "_buffers", "_modules"})
_OBJECTS_OF_MODULE = 8
_CONTAINERS = (dict, list, tuple, InertObject)


@dataclass(frozen=True)
class StoredModule:
    """What the object of a normalization layer says beside its tensors.

    Attributes:
        kind: The class, as a user would write it.
        training: The mode in which it was saved; None where it is not stored.
        tracks: Whether it keeps running statistics.
        hyperparameters: Those of eps and momentum that are stored.
        objection: Why it is not a BN layer with statistics; None if it is one.
        mode: Which statistics the code around it uses; None where only the object is stored.
    """

    kind: str
    training: bool | None
    tracks: bool
    hyperparameters: Mapping[str, float | None]
    objection: str | None = None
    mode: NodeMode | None = None

    def stated(self, known: Hyperparameters) -> Hyperparameters:
        """Return hyperparameters with those of this layer, unless the caller states others."""
        return known.stating(**self.hyperparameters)


@dataclass(frozen=True)
class Parts:
    """The attributes of one module, sorted.

    Attributes:
        kind: The class, as a user would write it.
        tensors: Parameters and buffers by name; None for those that the module does not have.
        modules: The modules inside, by name.
        attributes: All attributes.
        others: Those that are neither parameters and buffers nor modules.
        buffers: The buffers.
        mode: Which statistics the code of the module uses; None where it is not stored.
    """

    kind: str
    tensors: Mapping[Any, Any]
    modules: Mapping[Any, Any]
    attributes: Mapping[Any, Any]
    others: Mapping[Any, Any]
    buffers: Mapping[Any, Any]
    mode: NodeMode | None = None


PartsOf: TypeAlias = Callable[[InertObject], "Parts | None"]


@dataclass
class ModuleTree:
    """A module and those inside, as data.

    Attributes:
        kind: Its class.
        tensors: Its state dict. Values may be other objects where a tensor cannot be read.
        layers: Its normalization layers by their names in ``named_modules``.
        again: Further names of modules that have one already.
        attributes: The other attributes of all modules, each with the keys that lead to it.
        objects: The identities of the objects of all modules.
        is_program: Whether it is a program with its code, in which BN may have been folded.
    """

    kind: str
    tensors: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, StoredModule] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    attributes: list[tuple[str, Any]] = field(default_factory=list)
    objects: set[int] = field(default_factory=set)
    is_program: bool = False

    @property
    def is_readable(self) -> bool:
        """Whether it holds a tensor that can be read."""
        return any(isinstance(value, StoredTensor) for value in self.tensors.values())

    def untracked(self, known: Hyperparameters) -> Iterator[UntrackedLayer]:
        """Yield the BN layers without running statistics.

        Args:
            known: What the caller states.
        """
        for name, layer in self.layers.items():
            if layer.tracks:
                continue
            weight = self.tensors.get(f"{name}.weight".removeprefix("."))
            channels = weight.numel if isinstance(weight, StoredTensor) else 0
            stated = layer.stated(known)
            yield UntrackedLayer(name, channels, weight is not None, stated.momentum, stated.eps)


def read_module(node: InertObject, budget: Budget) -> ModuleTree | None:
    """Read the module that unpickling would make of an object, or return None for any other object.

    Args:
        node: The object.
        budget: Counts the modules and the lengths of their names.

    Raises:
        TooMuchWork: If the modules lie deeper, or under more names, than those of any network.
    """
    if _attributes(node) is None:
        return None
    node = _unwrapped(node)
    tree = ModuleTree(node.kind.path)
    add_module(tree, node, _parts, budget)
    return tree


def add_module(tree: ModuleTree, node: InertObject, parts_of: PartsOf, budget: Budget) -> None:
    """Add a module and those inside, in the order of ``named_modules``.

    Args:
        tree: Where to add them.
        node: The object of the module.
        parts_of: Returns the parts of a module; None for an object that is no module.
        budget: Counts the work.

    Raises:
        TooMuchWork: As `read_module` does.
    """
    pending: list[tuple[str, InertObject]] = [("", node)]
    while pending:
        prefix, inside = pending.pop()
        parts = parts_of(inside)
        if parts is None:
            continue
        is_first = id(inside) not in tree.objects
        tree.objects.add(id(inside))
        budget.spend("objects", _OBJECTS_OF_MODULE if is_first else 8 * _OBJECTS_OF_MODULE)
        budget.spend("bytes of text and numbers", len(prefix))
        budget.check_time()
        _add(tree, prefix, parts, is_first=is_first)
        inner = [(f"{prefix}{key}.", child) for key, child in parts.modules.items() if isinstance(child, InertObject)]
        pending.extend(reversed(inner))


def attributes_of(node: InertObject) -> list[Mapping[Any, Any]]:
    """Return the dicts of attributes of an object: its state, or a pair of a dict and the slots."""
    state = node.state
    parts = state[:_FEW] if isinstance(state, (tuple, list)) else (state,)
    return [part for part in parts if isinstance(part, dict)]


def _attributes(node: InertObject) -> Mapping[Any, Any] | None:
    """Return the attributes of a module, from its state or from the call that makes it; None for another object."""
    candidates = [*attributes_of(node), *(part for part in node.arguments[:_FEW] if isinstance(part, dict))]
    return next((part for part in candidates if {"_parameters", "_modules"} <= part.keys()), None)


def _unwrapped(node: InertObject) -> InertObject:
    """Return the module inside the wrappers of torch."""
    for _ in NAMES_IN_WRAPPERS:
        attributes = _attributes(node)
        name = NAMES_IN_WRAPPERS.get(node.kind.path)
        inner = None if name is None or attributes is None else _mapping(attributes["_modules"]).get(name)
        if not isinstance(inner, InertObject) or _attributes(inner) is None:
            break
        node = inner
    return node


def _parts(node: InertObject) -> Parts | None:
    """Return the parts of a pickled module; None for another object."""
    attributes = _attributes(node)
    if attributes is None:
        return None
    buffers = _mapping(attributes.get("_buffers"))
    fleeting = _names(attributes.get("_non_persistent_buffers_set")) - {*_STATISTICS}
    tensors = {**_mapping(attributes["_parameters"]), **buffers}
    return Parts(
        kind=node.kind.path,
        tensors={key: value for key, value in tensors.items() if key not in fleeting},
        modules=_mapping(attributes["_modules"]),
        attributes=attributes,
        others={key: value for key, value in attributes.items() if key not in _TREE},
        buffers=buffers,
    )


def _add(tree: ModuleTree, prefix: str, parts: Parts, *, is_first: bool) -> None:
    """Add the tensors, the layer and the other attributes of one module."""
    name = prefix.removesuffix(".")
    for key, value in parts.tensors.items():
        if isinstance(key, str) and value is not None:
            tree.tensors[prefix + key] = as_stored_tensor(value) or value
    if not is_first:
        tree.again.add(name)
        return
    layer = _layer(parts) if parts.buffers.keys() >= {*_STATISTICS} else None
    if layer is not None:
        tree.layers[name] = layer
    tree.attributes += [(f"{prefix}{key}", value) for key, value in parts.others.items() if _may_hold_tensors(value)]


def _may_hold_tensors(value: object) -> bool:
    """Return whether an attribute is worth a look: each module has a dozen empty dicts, and pairs such as (3, 3)."""
    if isinstance(value, (list, tuple)) and len(value) <= _FEW:
        return any(isinstance(part, (*_CONTAINERS, StoredTensor)) for part in value)
    return isinstance(value, InertObject) or (isinstance(value, _CONTAINERS) and bool(value))


def _layer(parts: Parts) -> StoredModule | None:
    """Return what a layer says that has a place for running statistics; None for one that is no BN and has none."""
    kind, attributes = parts.kind, parts.attributes
    tracks = all(parts.buffers[name] is not None for name in _STATISTICS)
    name = kind.rpartition(".")[2].lower()
    normalises_samples = "instancenorm" in name
    if not tracks and (normalises_samples or not ("num_features" in attributes or "batchnorm" in name)):
        return None
    objection = objection_to_instance_norm(kind) if normalises_samples else None
    training = attributes.get("training")
    names = [name for name in ("eps", "momentum") if name in attributes]
    stated = {name: attributes[name] for name in names if is_plausible(name, attributes[name])}
    return StoredModule(kind, training if isinstance(training, bool) else None, tracks, stated, objection, parts.mode)


def objection_to_instance_norm(kind: str) -> str:
    """Return why a layer of instance normalization, of the class `kind`, is no BN layer."""
    return f"is a {kind}, which normalises each sample by itself, not a BN layer"


def is_plausible(name: str, value: object) -> bool:
    """Return whether a value can be the eps or momentum of a layer."""
    if name == "momentum" and value is None:
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _mapping(value: object) -> Mapping[Any, Any]:
    if isinstance(value, InertObject):
        return value.items
    return value if isinstance(value, dict) else {}


def _names(value: object) -> set[str]:
    """Return the names in a set, which older protocols write as a call with a list."""
    if isinstance(value, InertObject):
        value = value.arguments[0] if value.arguments else value.elements
    return {name for name in value if isinstance(name, str)} if isinstance(value, (list, tuple)) else set()
