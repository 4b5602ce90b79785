"""Finds BN layers among the tensors of a checkpoint by the names and shapes of their state.

A BN layer is a ``running_mean`` and a ``running_var`` of one shape (C,), with a ``weight``, ``bias`` and
``num_batches_tracked`` of the right shape where they exist. What has such a name and another shape is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bnlab.conventions import wrapper_prefix
from bnlab.observe.evidence import Evidence, Hyperparameters, LayerState, NetworkState, distinct
from bnlab.observe.files.containers import containers, keys_of, kind_of, refusal_of_module, tensors_in
from bnlab.observe.files.numpy_data import as_stored_tensor
from bnlab.observe.files.tensors import FLOATING, INTEGER, MOST_CHANNELS, StoredTensor, coarser, widen

__all__ = ["find_batch_norm"]

_OWN_KEYS = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
_AVERAGED = frozenset({"ema", "swa", "teacher", "averaged", "average", "avg", "shadow", "momentum"})


@dataclass
class _Network:
    """The BN layers that lie in one container, and the names of all tensors beside them."""

    layers: list[LayerState] = field(default_factory=list)
    tensor_names: set[str] = field(default_factory=set)


@dataclass
class _Found:
    """What a walk through the tree has met so far."""

    networks: dict[tuple[str, ...], _Network] = field(default_factory=dict)
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
    for container in containers(tree):
        prefixes = _prefixes(container.children)
        if not prefixes and container.module is None:
            continue
        path = tuple(map(str, keys_of(container.path)))
        if container.module is not None:
            found.pickled_modules.append((_dotted(path), container.module))
        else:
            _collect(path, container.children, prefixes, hyperparameters, found)
    if not found.networks and found.pickled_modules:
        raise refusal_of_module(found.pickled_modules[0][1])
    pickled = [
        (name, f"is a pickled module ({kind}), which is never unpickled") for name, kind in found.pickled_modules
    ]
    return Evidence(distinct(_networks(found.networks)), tuple(found.left_alone + pickled))


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
        if prefix or not path:
            _add(found, path, _layer(prefix[:-1], own, hyperparameters))
        else:
            # A mapping that is itself one layer, as in {"bn1": {"running_mean": ...}}, belongs to the network around.
            _add(found, path[:-1], _layer(path[-1], own, hyperparameters)).tensor_names.add(f"{path[-1]}.")
    if path in found.networks:
        found.networks[path].tensor_names.update(tensors_in(mapping))


def _add(found: _Found, path: tuple[str, ...], layer: LayerState) -> _Network:
    network = found.networks.setdefault(path, _Network())
    network.layers.append(layer)
    return network


def _not_batch_norm(own: Mapping[str, Any]) -> str | None:
    """Return why this is no BN layer although it is named like one, or why it cannot be read, or None."""
    for key in ("running_mean", "running_var"):
        if key not in own:
            return f"has no {key}"
    for key in ("running_mean", "running_var", "weight", "bias"):
        if key in own and not isinstance(own[key], StoredTensor):
            return f"{key} is stored as {kind_of(own[key])}, not as an ordinary tensor"
    mean: StoredTensor = own["running_mean"]
    if len(mean.shape) != 1 or not 0 < mean.numel <= MOST_CHANNELS:
        return f"running_mean has the shape {mean.shape}, that of a BN layer is (C,)"
    if mean.dtype not in FLOATING:
        return f"running_mean has the dtype {mean.dtype}"
    for key in ("running_var", "weight", "bias"):
        if key in own and (own[key].shape != mean.shape or own[key].dtype not in FLOATING):
            return f"{key} has the shape {own[key].shape} and dtype {own[key].dtype}, running_mean has {mean.shape}"
    return None


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


def _networks(found: Mapping[tuple[str, ...], _Network]) -> list[NetworkState]:
    """Name the networks and their layers: relative names for a single network, full paths for several."""
    parts = [(path, name, part) for path, whole in found.items() for name, part in _split_averaged(whole).items()]
    if len(parts) == 1:
        return [NetworkState("", _without_wrappers(next(iter(found.values()))))]
    return [
        NetworkState(
            _dotted((*path, *([name] if name else []))),
            tuple(replace(layer, name=_dotted((*path, layer.name) if layer.name else path)) for layer in part),
        )
        for path, name, part in parts
    ]


def _split_averaged(network: _Network) -> dict[str, list[LayerState]]:
    """Split a flat state dict that holds a network and its average, as in ``model.bn1`` beside ``ema.bn1``.

    The copies must match layer by layer, and one must be called an average: blocks of one network may match as well.
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
