"""Sorts the BN layers of a file into networks, and names them as a user would."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from bnlab.conventions import bare_names
from bnlab.observe.evidence import LayerState, NetworkState
from bnlab.observe.files.houses import path_parts

__all__ = ["Network", "Whereabouts", "dotted", "named_networks"]

_AVERAGED = frozenset({"ema", "swa", "teacher", "averaged", "average", "avg", "shadow", "momentum", "target"})
_AVERAGED_INSIDE = frozenset({"ema", "swa", "teacher", "target"})
"""Words in the names of averages that are sure enough one level below the root, where blocks have names as well."""

Layer = tuple[list[str], LayerState]
"""A layer, and the parts of its path without wrappers."""


@dataclass(frozen=True)
class Whereabouts:
    """Where a network lies in a file.

    Attributes:
        path: The keys that lead to the container of its tensors.
        member: The index in a stacked ensemble, such as "[0]"; "" for a network that is not stacked.
    """

    path: tuple[str, ...]
    member: str = ""


@dataclass
class Network:
    """The BN layers of one network, and the names of all tensors beside them.

    Attributes:
        layers: The layers.
        tensor_names: The names of all tensors.
        is_module: Whether the names are those of a module, in which no wrapper hides.
    """

    layers: list[LayerState] = field(default_factory=list)
    tensor_names: set[str] = field(default_factory=set)
    is_module: bool = False


def dotted(keys: Iterable[str]) -> str:
    """Return a path as one string."""
    return ".".join(keys)


def named_networks(networks: Mapping[Whereabouts, Network]) -> list[NetworkState]:
    """Return the networks with their names: relative layer names for a single network, full paths for several."""
    bare_names_of = {place: _bare(network) for place, network in networks.items()}
    parts = [
        (place, name, part)
        for place, network in networks.items()
        for name, part in _split(network, bare_names_of[place])
    ]
    if len(parts) == 1 and not parts[0][0].member:
        ((place, network),) = networks.items()
        bare = bare_names_of[place]
        return [NetworkState("", tuple(_renamed(layer, bare[layer.name]) for layer in network.layers))]
    return [
        NetworkState(
            dotted((*place.path, *([name] if name else []))) + place.member,
            tuple(_renamed(layer, _full_name(place, layer.name)) for layer in part),
        )
        for place, name, part in parts
    ]


def _renamed(layer: LayerState, name: str) -> LayerState:
    return layer if name == layer.name else replace(layer, name=name)


def _full_name(place: Whereabouts, name: str) -> str:
    return dotted((*place.path, name) if name else place.path) + place.member


def _bare(network: Network) -> dict[str, str]:
    """Return the layer names without what wrappers put into them, by their names in the file."""
    if network.is_module:
        return {layer.name: layer.name for layer in network.layers}
    names = [f"{layer.name}." for layer in network.layers]
    bare = bare_names({*network.tensor_names, *names})
    return {name[:-1]: bare[name].removesuffix(".") for name in names}


def _split(network: Network, bare: Mapping[str, str]) -> list[tuple[str, list[LayerState]]]:
    """Split a flat state dict that holds a network and its average, as in ``model.bn1`` beside ``ema.bn1``.

    The layers of the average must be those of a sibling, one by one, and it must have the name of an average. Matching
    layers alone are not sufficient, because the blocks of one network may match as well.

    Args:
        network: The network.
        bare: Its layer names without wrappers, by their names in the file.
    """
    layers = [(path_parts(bare[layer.name]), layer) for layer in network.layers]
    groups = _grouped(layers, 0)
    copies = _copies(groups, 1, _AVERAGED)
    parts = [(name, groups.pop(name)) for name in list(groups) if name in copies]
    for name in [name for name in groups if len(groups[name]) > 1 and _words(name) & _AVERAGED_INSIDE]:
        inner = _grouped(groups[name], 1)
        inside = _copies(inner, 2, _AVERAGED_INSIDE)
        parts += [(f"{name}.{key}", inner[key]) for key in inner if key in inside]
        groups[name] = [layer for key, part in inner.items() if key not in inside for layer in part]
    rest = [layer for group in groups.values() for layer in group]
    whole = [("", rest)] if rest else []
    return [(name, [layer for _, layer in part]) for name, part in [*whole, *parts]]


def _grouped(layers: list[Layer], depth: int) -> dict[str, list[Layer]]:
    groups: dict[str, list[Layer]] = {}
    for parts, layer in layers:
        groups.setdefault(parts[depth] if depth < len(parts) else "", []).append((parts, layer))
    return groups


def _copies(groups: Mapping[str, list[Layer]], depth: int, words: frozenset[str]) -> set[str]:
    """Return the names of the groups that are an average or the network of which it is one."""
    signatures = {
        name: {(tuple(parts[depth:]), layer.channels) for parts, layer in group} for name, group in groups.items()
    }
    copies: set[str] = set()
    for average in [name for name in groups if name and _words(name) & words]:
        originals = [name for name in groups if name != average and signatures[average] <= signatures[name]]
        copies.update([average, *originals] if originals else [])
    return copies


def _words(name: str) -> set[str]:
    return set(name.lower().split("_"))
