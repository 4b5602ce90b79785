"""Finds BN layers among the tensors of a checkpoint by the names and shapes of their state.

A BN layer is a ``running_mean`` and a ``running_var`` of one shape (C,), with a ``weight``, ``bias`` and
``num_batches_tracked`` of the right shape where they exist. What has such a name and another shape is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeGuard

from bnlab.conventions import WRAPPER_PREFIXES
from bnlab.errors import PickledModule
from bnlab.observe.evidence import Evidence, Hyperparameters, LayerState, NetworkState
from bnlab.observe.pickle_data import Stranger
from bnlab.observe.tensors import FLOATING, INTEGER, StoredTensor, widen

__all__ = ["find_batch_norm"]

_OWN_KEYS = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
_AVERAGED = frozenset({"ema", "swa", "teacher", "averaged", "average", "avg", "shadow", "momentum"})

Path: TypeAlias = "tuple[Path, str] | None"
"""The way to a container, as a linked list: a file may nest them deeper than a tuple could be copied each time."""


@dataclass
class _Found:
    """What a walk through the tree has met so far."""

    networks: dict[tuple[str, ...], list[LayerState]] = field(default_factory=dict)
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    pickled_modules: list[tuple[str, str]] = field(default_factory=list)


def find_batch_norm(tree: object, hyperparameters: Hyperparameters) -> Evidence:
    """Return the BN layers in nested dicts, lists and foreign containers of unread tensors.

    Args:
        tree: What a checkpoint holds, down to :class:`StoredTensor`.
        hyperparameters: Momentum and eps, which a state dict does not hold.

    Returns:
        One network per container that holds BN layers. Layer names are relative to it, without the prefixes of
        wrappers, when it is the only one; otherwise they are full paths in the file.

    Raises:
        PickledModule: If there is no state to read beside a pickled ``nn.Module``.
        ValueError: If a tensor cannot be read.
    """
    found = _Found()
    for path, mapping in _mappings(tree, found):
        _collect(path, mapping, hyperparameters, found)
    if not found.networks and found.pickled_modules:
        _, kind = found.pickled_modules[0]
        raise PickledModule(
            f"file must hold tensors only, got a pickled module ({kind}), which could be read only by running code. "
            "Give package.module:callable that builds the model, "
            "or save its state dict: torch.save(model.state_dict(), path)."
        )
    pickled = [
        (name, f"is a pickled module ({kind}), which is never unpickled") for name, kind in found.pickled_modules
    ]
    return Evidence(tuple(_networks(found.networks)), tuple(found.left_alone + pickled))


def _mappings(tree: object, found: _Found) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yield every mapping with its path, each object once, in file order."""
    seen: set[int] = set()
    pending: list[tuple[Path, object]] = [(None, tree)]
    while pending:
        path, node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if _is_pickled_module(node):
            found.pickled_modules.append((_dotted(_keys(path)), node.kind.path))
            continue
        children = _children(node)
        if children:
            yield _keys(path), children
            pending.extend(((path, str(key)), child) for key, child in reversed(list(children.items())))


def _children(node: object) -> Mapping[Any, Any]:
    match node:
        case dict():
            return node
        case list() | tuple():
            return dict(enumerate(node))
        case Stranger():
            state = node.state if isinstance(node.state, dict) else {}
            return {**state, **node.items, **dict(enumerate(node.elements))}
        case _:
            return {}


def _is_pickled_module(node: object) -> TypeGuard[Stranger]:
    return (
        isinstance(node, Stranger) and isinstance(node.state, dict) and {"_parameters", "_modules"} <= set(node.state)
    )


def _keys(path: Path) -> tuple[str, ...]:
    keys = []
    while path is not None:
        path, key = path
        keys.append(key)
    return tuple(reversed(keys))


def _dotted(keys: tuple[str, ...]) -> str:
    return ".".join(keys)


def _collect(
    path: tuple[str, ...], mapping: Mapping[Any, Any], hyperparameters: Hyperparameters, found: _Found
) -> None:
    """Add the BN layers that lie directly in one mapping."""
    tensors = {key: value for key, value in mapping.items() if isinstance(key, str) and isinstance(value, StoredTensor)}
    for prefix in _prefixes(tensors):
        own = {key: tensors[prefix + key] for key in _OWN_KEYS if prefix + key in tensors}
        full_name = _dotted((*path, prefix.rstrip("."))) if prefix else _dotted(path)
        reason = _not_batch_norm(prefix, own, tensors)
        if reason is not None:
            found.left_alone.append((full_name, reason))
            continue
        # A mapping that is itself one layer, as in {"bn1": {"running_mean": ...}}, belongs to the network around it.
        network, name = (path, prefix.rstrip(".")) if prefix or not path else (path[:-1], path[-1])
        counter = mapping.get(prefix + "num_batches_tracked")
        found.networks.setdefault(network, []).append(_layer(name, own, counter, hyperparameters))


def _prefixes(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return what stands before ``running_mean`` or ``running_var``, in file order."""
    ends = (key.removesuffix(end) for key in tensors for end in ("running_mean", "running_var") if key.endswith(end))
    return list(dict.fromkeys(prefix for prefix in ends if not prefix or prefix.endswith(".")))


def _not_batch_norm(prefix: str, own: Mapping[str, StoredTensor], tensors: Mapping[str, StoredTensor]) -> str | None:
    """Return why this is no BN layer although it is named like one, or None."""
    for key in ("running_mean", "running_var"):
        if key not in own:
            return f"has no {key}"
        if len(own[key].shape) != 1 or own[key].numel == 0:
            return f"{key} has the shape {own[key].shape}, that of a BN layer is (C,)"
        if own[key].dtype not in FLOATING:
            return f"{key} has the dtype {own[key].dtype}"
    shape = own["running_mean"].shape
    for key in ("running_var", "weight", "bias"):
        if key in own and (own[key].shape != shape or own[key].dtype not in FLOATING):
            return f"{key} has the shape {own[key].shape} and dtype {own[key].dtype}, running_mean has {shape}"
    if not own.keys() & {"weight", "num_batches_tracked"}:
        beside = [key for key in _direct_keys(prefix, tensors) if key not in _OWN_KEYS]
        if beside:
            return f"has {beside[0]!r} beside its running_mean, which no BN layer has"
    return None


def _direct_keys(prefix: str, tensors: Mapping[str, StoredTensor]) -> list[str]:
    keys = (key.removeprefix(prefix) for key in tensors if key.startswith(prefix))
    return [key for key in keys if "." not in key]


def _layer(name: str, own: Mapping[str, StoredTensor], counter: object, known: Hyperparameters) -> LayerState:
    return LayerState(
        name=name,
        running_mean=widen(own["running_mean"].read()),
        running_var=widen(own["running_var"].read()),
        weight=widen(own["weight"].read()) if "weight" in own else None,
        bias=widen(own["bias"].read()) if "bias" in own else None,
        num_batches_tracked=_counter(counter),
        dtype=own["running_var"].dtype,
        affine_dtype=own.get("weight", own["running_var"]).dtype,
        hyperparameters=known,
    )


def _counter(stored: object) -> int | None:
    """Return the counter from a number, or from a tensor of one; averaged weights may have made it a float."""
    if isinstance(stored, StoredTensor) and stored.numel == 1 and stored.dtype in FLOATING | INTEGER:
        stored = stored.read().reshape(()).item()
    if isinstance(stored, float) and stored.is_integer():
        return int(stored)
    return stored if isinstance(stored, int) else None


def _networks(found: Mapping[tuple[str, ...], list[LayerState]]) -> list[NetworkState]:
    """Name the networks and their layers: relative names for a single network, full paths for several."""
    parts = [(path, part) for path, layers in found.items() for part in _split_averaged(layers)]
    if len(parts) == 1:
        return [NetworkState("", _without_wrappers(parts[0][1]))]
    return [
        NetworkState(
            _dotted((*path, _first(part[0].name))) if len(_split_averaged(found[path])) > 1 else _dotted(path),
            tuple(replace(layer, name=_dotted((*path, layer.name) if layer.name else path)) for layer in part),
        )
        for path, part in parts
    ]


def _split_averaged(layers: list[LayerState]) -> list[list[LayerState]]:
    """Split a flat state dict that holds a network and its average, as in ``model.bn1`` beside ``ema.bn1``.

    The copies must match layer by layer, and one must be called an average: blocks of one network may match as well.
    """
    groups: dict[str, list[LayerState]] = {}
    for layer in layers:
        groups.setdefault(_first(layer.name), []).append(layer)
    signatures = [[(layer.name.partition(".")[2], layer.channels) for layer in group] for group in groups.values()]
    words = {word for name in groups for word in name.lower().split("_")}
    if len(groups) > 1 and words & _AVERAGED and all(signature == signatures[0] for signature in signatures):
        return list(groups.values())
    return [layers]


def _first(name: str) -> str:
    return name.partition(".")[0]


def _without_wrappers(layers: list[LayerState]) -> tuple[LayerState, ...]:
    while prefix := next((p for p in WRAPPER_PREFIXES if all(layer.name.startswith(p) for layer in layers)), ""):
        layers = [replace(layer, name=layer.name.removeprefix(prefix)) for layer in layers]
    return tuple(layers)
