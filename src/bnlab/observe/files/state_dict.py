"""Finds BN layers among the tensors of a checkpoint by the names and shapes of their state.

A BN layer is a ``running_mean`` and a ``running_var`` of one shape (C,), with a ``weight``, ``bias`` and
``num_batches_tracked`` of the right shape where they exist. What has such a name and another shape is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from bnlab.conventions import WRAPPER_PREFIXES
from bnlab.errors import PickledModule
from bnlab.observe.evidence import Evidence, Hyperparameters, LayerState, NetworkState, distinct
from bnlab.observe.files.numpy_data import as_stored_tensor
from bnlab.observe.files.pickle_data import Stranger
from bnlab.observe.files.tensors import FLOATING, INTEGER, MOST_CHANNELS, StoredTensor, coarser, widen

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
        prefixes = _prefixes(mapping)
        if prefixes:
            _collect(_keys(path), mapping, prefixes, hyperparameters, found)
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
    return Evidence(distinct(_networks(found.networks)), tuple(found.left_alone + pickled))


def _mappings(tree: object, found: _Found) -> Iterator[tuple[Path, Mapping[Any, Any]]]:
    """Yield every mapping with its path, each object once, in file order."""
    seen: set[int] = set()
    pending: list[tuple[Path, object]] = [(None, tree)]
    while pending:
        path, node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Stranger) and _is_module(node):
            found.pickled_modules.append((_dotted(_keys(path)), node.kind.path))
            continue
        children = _children(node)
        yield path, children
        inner = [(str(key), child) for key, child in children.items() if isinstance(child, _CONTAINERS)]
        pending.extend(((path, key), child) for key, child in reversed(inner))


_CONTAINERS = (dict, list, tuple, Stranger)


def _children(node: object) -> Mapping[Any, Any]:
    match node:
        case dict():
            return node
        case list() | tuple():
            return dict(enumerate(node))
        case Stranger():
            inside = {**dict(enumerate(node.arguments)), **dict(enumerate(node.elements)), **node.items}
            return {**inside, **{key: value for state in _states(node) for key, value in state.items()}}
        case _:
            return {}


def _states(node: Stranger) -> list[dict[Any, Any]]:
    """Return the attributes of a foreign object: a dict, or a pair of one and the slots."""
    parts = node.state if isinstance(node.state, (tuple, list)) else [node.state]
    return [part for part in parts if isinstance(part, dict)]


def _is_module(node: Stranger) -> bool:
    """Whether this would have become an nn.Module: one with its attributes, or one that builds itself from them."""
    attributes = [*_states(node), *(part for part in node.arguments if isinstance(part, dict))]
    return any({"_parameters", "_modules"} <= part.keys() for part in attributes)


def _keys(path: Path) -> tuple[str, ...]:
    keys = []
    while path is not None:
        path, key = path
        keys.append(key)
    return tuple(reversed(keys))


def _dotted(keys: tuple[str, ...]) -> str:
    return ".".join(keys)


def _prefixes(mapping: Mapping[Any, Any]) -> list[str]:
    """Return what stands before ``running_mean`` or ``running_var``, in file order."""
    ends = ("running_mean", "running_var")
    starts = (key.removesuffix(end) for key in mapping if isinstance(key, str) for end in ends if key.endswith(end))
    return list(dict.fromkeys(start for start in starts if not start or start.endswith(".")))


def _collect(
    path: tuple[str, ...],
    mapping: Mapping[Any, Any],
    prefixes: list[str],
    hyperparameters: Hyperparameters,
    found: _Found,
) -> None:
    """Add the BN layers that lie directly in one mapping."""
    for prefix in prefixes:
        own = {key: mapping[prefix + key] for key in _OWN_KEYS if mapping.get(prefix + key) is not None}
        own = {key: as_stored_tensor(value) or value for key, value in own.items()}
        reason = _not_batch_norm(own) or _something_beside(prefix, own, mapping)
        if reason is not None:
            found.left_alone.append((_dotted((*path, *([prefix[:-1]] if prefix else []))), reason))
            continue
        # A mapping that is itself one layer, as in {"bn1": {"running_mean": ...}}, belongs to the network around it.
        network, name = (path, prefix[:-1]) if prefix or not path else (path[:-1], path[-1])
        found.networks.setdefault(network, []).append(_layer(name, own, hyperparameters))


def _not_batch_norm(own: Mapping[str, Any]) -> str | None:
    """Return why this is no BN layer although it is named like one, or why it cannot be read, or None."""
    for key in ("running_mean", "running_var"):
        if key not in own:
            return f"has no {key}"
    for key in ("running_mean", "running_var", "weight", "bias"):
        if key in own and not isinstance(own[key], StoredTensor):
            return f"{key} is stored as {_kind(own[key])}, not as an ordinary tensor"
    mean: StoredTensor = own["running_mean"]
    if len(mean.shape) != 1 or not 0 < mean.numel <= MOST_CHANNELS:
        return f"running_mean has the shape {mean.shape}, that of a BN layer is (C,)"
    if mean.dtype not in FLOATING:
        return f"running_mean has the dtype {mean.dtype}"
    for key in ("running_var", "weight", "bias"):
        if key in own and (own[key].shape != mean.shape or own[key].dtype not in FLOATING):
            return f"{key} has the shape {own[key].shape} and dtype {own[key].dtype}, running_mean has {mean.shape}"
    return None


def _kind(value: object) -> str:
    return value.kind.path if isinstance(value, Stranger) else type(value).__name__


def _something_beside(prefix: str, own: Mapping[str, Any], mapping: Mapping[Any, Any]) -> str | None:
    """Return what no BN layer has beside its statistics, for statistics that nothing else marks as a BN layer's."""
    if own.keys() & {"weight", "num_batches_tracked"}:
        return None
    tensors = (key for key, value in mapping.items() if isinstance(key, str) and isinstance(value, StoredTensor))
    beside = [key for key in _direct_keys(prefix, tensors) if key not in _OWN_KEYS]
    return f"has {beside[0]!r} beside its running_mean, which no BN layer has" if beside else None


def _direct_keys(prefix: str, names: Iterable[str]) -> list[str]:
    keys = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return [key for key in keys if "." not in key]


def _layer(name: str, own: Mapping[str, Any], hyperparameters: Hyperparameters) -> LayerState:
    values = {key: widen(own[key].read()) for key in _OWN_KEYS & own.keys() if key != "num_batches_tracked"}
    return LayerState(
        name=name,
        running_mean=values["running_mean"],
        running_var=values["running_var"],
        weight=values.get("weight"),
        bias=values.get("bias"),
        num_batches_tracked=_counter(own.get("num_batches_tracked")),
        dtype=coarser(own["running_mean"].dtype, own["running_var"].dtype),
        affine_dtype=own.get("weight", own["running_var"]).dtype,
        hyperparameters=hyperparameters,
    )


def _counter(stored: object) -> int | None:
    """Return the counter from a number, or from a tensor of one; averaged weights may have made it a float."""
    if isinstance(stored, StoredTensor) and stored.numel == 1 and stored.dtype in FLOATING | INTEGER:
        stored = stored.read().reshape(()).item()
    if isinstance(stored, float) and stored.is_integer():
        stored = int(stored)
    return stored if isinstance(stored, int) and not isinstance(stored, bool) and abs(stored) < 2**63 else None


def _networks(found: Mapping[tuple[str, ...], list[LayerState]]) -> list[NetworkState]:
    """Name the networks and their layers: relative names for a single network, full paths for several."""
    parts = [(path, name, part) for path, layers in found.items() for name, part in _split_averaged(layers).items()]
    if len(parts) == 1:
        return [NetworkState("", _without_wrappers(parts[0][2]))]
    return [
        NetworkState(
            _dotted((*path, *([name] if name else []))),
            tuple(replace(layer, name=_dotted((*path, layer.name) if layer.name else path)) for layer in part),
        )
        for path, name, part in parts
    ]


def _split_averaged(layers: list[LayerState]) -> dict[str, list[LayerState]]:
    """Split a flat state dict that holds a network and its average, as in ``model.bn1`` beside ``ema.bn1``.

    The copies must match layer by layer, and one must be called an average: blocks of one network may match as well.
    """
    groups: dict[str, list[LayerState]] = {}
    signatures: dict[str, list[tuple[str, int]]] = {}
    for layer, bare in zip(layers, _without_wrappers(layers), strict=True):
        first, _, rest = bare.name.partition(".")
        groups.setdefault(first, []).append(layer)
        signatures.setdefault(first, []).append((rest, layer.channels))
    expected = next(iter(signatures.values()))
    words = {word for name in groups for word in name.lower().split("_")}
    if len(groups) > 1 and words & _AVERAGED and all(signature == expected for signature in signatures.values()):
        return groups
    return {"": layers}


def _without_wrappers(layers: list[LayerState]) -> tuple[LayerState, ...]:
    while prefix := next((p for p in WRAPPER_PREFIXES if all(layer.name.startswith(p) for layer in layers)), ""):
        layers = [replace(layer, name=layer.name.removeprefix(prefix)) for layer in layers]
    return tuple(layers)
