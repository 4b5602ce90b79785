"""Finds BN layers among the tensors of a checkpoint by the names and shapes of their state.

A BN layer has a ``running_mean`` and a ``running_var`` of one shape (C,). Its ``weight``, ``bias`` and
``num_batches_tracked``, where they exist, have matching shapes. Tensors with these names and other shapes are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bnlab.conventions import wrapper_prefix
from bnlab.observe.evidence import Evidence, Hyperparameters, LayerState, NetworkState, distinct
from bnlab.observe.files.containers import containers, keys_of, kind_of, refusal_of_module, tensors_in
from bnlab.observe.files.half_layers import HalfLayer, half_of
from bnlab.observe.files.numpy_data import as_stored_tensor
from bnlab.observe.files.tensors import FLOATING, INTEGER, MAX_CHANNELS, StoredTensor, coarser, widen

__all__ = ["find_batch_norm"]

_OWN_KEYS = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
_AVERAGED = frozenset({"ema", "swa", "teacher", "averaged", "average", "avg", "shadow", "momentum"})


@dataclass
class _Network:
    """The BN layers in one container, and the names of all tensors beside them."""

    layers: list[LayerState] = field(default_factory=list)
    tensor_names: set[str] = field(default_factory=set)


@dataclass
class _Contents:
    """The networks and other entries that the walk through the tree has collected so far."""

    networks: dict[tuple[str, ...], _Network] = field(default_factory=dict)
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    halves: list[tuple[str, HalfLayer]] = field(default_factory=list)
    pickled_modules: list[tuple[str, str]] = field(default_factory=list)


def find_batch_norm(tree: object, hyperparameters: Hyperparameters) -> Evidence:
    """Return the BN layers in nested dicts, lists and foreign containers of unread tensors.

    Args:
        tree: The contents of a checkpoint, down to :class:`StoredTensor`.
        hyperparameters: Momentum and eps, which a state dict does not hold.

    Returns:
        One network per container that holds BN layers. The layer names of a single network are relative to its
        container and lack the prefixes of wrappers. The layer names of several networks are full paths in the file.

    Raises:
        PickledModule: If the file holds a pickled ``nn.Module`` and no state to read.
        ValueError: If a tensor cannot be read.
    """
    contents = _Contents()
    for container in containers(tree):
        prefixes = _prefixes(container.children)
        if not prefixes and container.module is None:
            continue
        path = tuple(map(str, keys_of(container.path)))
        if container.module is not None:
            contents.pickled_modules.append((_dotted(path), container.module))
        else:
            _collect(path, container.children, prefixes, hyperparameters, contents)
    if not contents.networks and contents.pickled_modules:
        raise refusal_of_module(contents.pickled_modules[0][1])
    pickled = [
        (name, f"is a pickled module ({kind}), which is never unpickled") for name, kind in contents.pickled_modules
    ]
    left_alone = contents.left_alone + pickled
    incomplete = [(name, half.reason) for name, half in contents.halves if half.is_certain or contents.networks]
    left_alone += [(name, half.reason) for name, half in contents.halves if not half.is_certain and not incomplete]
    return Evidence(distinct(_networks(contents.networks)), tuple(left_alone), tuple(incomplete))


def _dotted(keys: tuple[str, ...]) -> str:
    return ".".join(keys)


def _prefixes(mapping: Mapping[Any, Any]) -> list[str]:
    """Return the prefixes before ``running_mean`` or ``running_var`` among the keys, in file order."""
    ends = ("running_mean", "running_var")
    starts = (key.removesuffix(end) for key in mapping if isinstance(key, str) for end in ends if key.endswith(end))
    return list(dict.fromkeys(start for start in starts if not start or start.endswith(".")))


def _collect(
    path: tuple[str, ...],
    mapping: Mapping[Any, Any],
    prefixes: list[str],
    hyperparameters: Hyperparameters,
    contents: _Contents,
) -> None:
    """Add the BN layers whose tensors are direct entries of one mapping."""
    for prefix in prefixes:
        own = {key: mapping[prefix + key] for key in _OWN_KEYS if mapping.get(prefix + key) is not None}
        own = {key: as_stored_tensor(value) or value for key, value in own.items()}
        half = _half(prefix, own, mapping)
        if half is not None:
            contents.halves.append((_dotted((*path, *([prefix[:-1]] if prefix else []))), half))
            continue
        reason = _not_batch_norm(own) or _something_beside(prefix, own, mapping)
        if reason is not None:
            contents.left_alone.append((_dotted((*path, *([prefix[:-1]] if prefix else []))), reason))
            continue
        if prefix or not path:
            _add(contents, path, _layer(prefix[:-1], own, hyperparameters))
        else:
            # A mapping that is itself one layer, as in {"bn1": {"running_mean": ...}}, belongs to the network around.
            _add(contents, path[:-1], _layer(path[-1], own, hyperparameters)).tensor_names.add(f"{path[-1]}.")
    if path in contents.networks:
        contents.networks[path].tensor_names.update(tensors_in(mapping))


def _add(contents: _Contents, path: tuple[str, ...], layer: LayerState) -> _Network:
    network = contents.networks.setdefault(path, _Network())
    network.layers.append(layer)
    return network


def _not_batch_norm(own: Mapping[str, Any]) -> str | None:
    """Return why tensors with the names of a BN layer are not one, or why they cannot be read; None if they can."""
    for key in ("running_mean", "running_var"):
        if key not in own:
            return f"has no {key}"
    for key in ("running_mean", "running_var", "weight", "bias"):
        if key in own and not isinstance(own[key], StoredTensor):
            return f"{key} is stored as {kind_of(own[key])}, not as an ordinary tensor"
    mean: StoredTensor = own["running_mean"]
    if len(mean.shape) != 1 or not 0 < mean.numel <= MAX_CHANNELS:
        return f"running_mean has the shape {mean.shape}, not the (C,) of a BN layer"
    if mean.dtype not in FLOATING:
        return f"running_mean has the dtype {mean.dtype}"
    for key in ("running_var", "weight", "bias"):
        if key in own and (own[key].shape != mean.shape or own[key].dtype not in FLOATING):
            return f"{key} has the shape {own[key].shape} and dtype {own[key].dtype}, running_mean has {mean.shape}"
    return None


def _half(prefix: str, own: Mapping[str, Any], mapping: Mapping[Any, Any]) -> HalfLayer | None:
    """Return what is missing in a BN layer; None if nothing is, or if it is no BN layer."""
    if half_of(own, ()) is None:
        return None  # before the search through all keys, which is slow
    return half_of(own, _beside(prefix, mapping))


def _something_beside(prefix: str, own: Mapping[str, Any], mapping: Mapping[Any, Any]) -> str | None:
    """Return a reason if statistics without weight or counter have another tensor beside them, as no BN layer has."""
    if own.keys() & {"weight", "num_batches_tracked"}:
        return None
    beside = _beside(prefix, mapping)
    return f"has {beside[0]!r} beside its running_mean, which no BN layer has" if beside else None


def _beside(prefix: str, mapping: Mapping[Any, Any]) -> list[str]:
    """Return the names of the tensors of a layer that no BN layer has."""
    tensors = (key for key, value in mapping.items() if isinstance(key, str) and isinstance(value, StoredTensor))
    return [key for key in _direct_keys(prefix, tensors) if key not in _OWN_KEYS]


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
    """Return the counter from a number or a tensor with one value; averaging weights may have made it a float."""
    if isinstance(stored, StoredTensor) and stored.numel == 1 and stored.dtype in FLOATING | INTEGER:
        stored = stored.read().reshape(()).item()
    if isinstance(stored, float) and stored.is_integer():
        stored = int(stored)
    return stored if isinstance(stored, int) and not isinstance(stored, bool) and abs(stored) < 2**63 else None


def _networks(networks: Mapping[tuple[str, ...], _Network]) -> list[NetworkState]:
    """Return the networks with their names: relative layer names for a single network, full paths for several."""
    parts = [(path, name, part) for path, whole in networks.items() for name, part in _split_averaged(whole).items()]
    if len(parts) == 1:
        return [NetworkState("", _without_wrappers(next(iter(networks.values()))))]
    return [
        NetworkState(
            _dotted((*path, *([name] if name else []))),
            tuple(replace(layer, name=_dotted((*path, layer.name) if layer.name else path)) for layer in part),
        )
        for path, name, part in parts
    ]


def _split_averaged(network: _Network) -> dict[str, list[LayerState]]:
    """Split a flat state dict that holds a network and its average, as in ``model.bn1`` beside ``ema.bn1``.

    The copies must match layer by layer, and one must have the name of an average. Matching layers alone are not
    sufficient, because the blocks of one network may match as well.
    """
    groups: dict[str, list[LayerState]] = {}
    signatures: dict[str, list[tuple[str, int]]] = {}
    for layer, bare in zip(network.layers, _without_wrappers(network), strict=True):
        first, _, rest = bare.name.partition(".")
        groups.setdefault(first, []).append(layer)
        signatures.setdefault(first, []).append((rest, layer.channels))
    expected = next(iter(signatures.values()))
    words = {word for name in groups for word in name.lower().split("_")}
    if len(groups) > 1 and words & _AVERAGED and all(signature == expected for signature in signatures.values()):
        return groups
    return {"": network.layers}


def _without_wrappers(network: _Network) -> tuple[LayerState, ...]:
    prefix = wrapper_prefix(network.tensor_names)
    names = (f"{layer.name}.".removeprefix(prefix).removesuffix(".") for layer in network.layers)
    return tuple(replace(layer, name=name) for layer, name in zip(network.layers, names, strict=True))
