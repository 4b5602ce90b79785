"""Finds BN layers among the tensors of a checkpoint by the names and shapes of their state.

A BN layer of torch has a ``running_mean`` and a ``running_var`` of one shape (C,). Its ``weight``, ``bias`` and
``num_batches_tracked``, where they exist, have matching shapes. Other libraries have other names (``houses``). Tensors
with these names and other shapes are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bnlab.errors import NoBatchNorm
from bnlab.observe.evidence import Evidence, Hyperparameters, LayerState, NetworkState, distinct
from bnlab.observe.files.budget import Budget
from bnlab.observe.files.containers import Container, containers, keys_of, refusal_of_module, tensors_in
from bnlab.observe.files.half_layers import HalfLayer, flat_parameters, half_of
from bnlab.observe.files.houses import Place, path_parts, places
from bnlab.observe.files.jax_trees import with_joined_trees
from bnlab.observe.files.networks import Network, Whereabouts, dotted, named_networks
from bnlab.observe.files.stored_layer import StoredLayer
from bnlab.observe.files.tensors import StoredTensor
from bnlab.observe.graph_state import GraphState, UntrackedLayer

__all__ = ["PossibleLayer", "find_batch_norm", "optimizer_part", "possible_layers"]

_OPTIMIZERS = frozenset(
    {
        *("optimizer", "optimizers", "optimizer_state", "optimizer_states", "optimizer_state_dict"),
        *("optimizer_weights", "opt_state", "slots", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"),
    }
)
"""Parts of a path below which an optimizer keeps one moving average for each tensor, under the name of that tensor."""


@dataclass
class _Contents:
    """The networks and other entries that the walk through the tree has collected so far."""

    hyperparameters: Hyperparameters
    budget: Budget
    networks: dict[Whereabouts, Network] = field(default_factory=dict)
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    halves: list[tuple[str, HalfLayer]] = field(default_factory=list)
    unreadable_modules: list[str] = field(default_factory=list)
    untracked: list[tuple[tuple[str, ...], UntrackedLayer]] = field(default_factory=list)
    programs: int = 0

    def add(self, path: tuple[str, ...], member: str, layer: LayerState) -> Network:
        """Add a layer to its network, and return the network."""
        network = self.networks.setdefault(Whereabouts(path, member), Network())
        network.layers.append(layer)
        return network


def find_batch_norm(tree: object, hyperparameters: Hyperparameters, budget: Budget | None = None) -> Evidence:
    """Return the BN layers in nested dicts, lists and foreign containers of unread tensors.

    Args:
        tree: The contents of a checkpoint, down to :class:`StoredTensor`.
        hyperparameters: Momentum and eps, which a state dict does not hold.
        budget: The work on the file so far; None for a tree that is no file.

    Returns:
        One network per container that holds BN layers, and one per member of a stacked ensemble. The layer names of a
        single network are relative to its container and lack the prefixes of wrappers. The layer names of several
        networks are full paths in the file.

    Raises:
        NoBatchNorm: If the file holds a program without BN.
        PickledModule: If the file holds a pickled ``nn.Module`` of which no tensor can be read, and no BN layer.
        TooMuchWork: If the layers have more channels than the budget allows.
        ValueError: If a tensor cannot be read.
    """
    contents = _Contents(hyperparameters, budget or Budget())
    for container in with_joined_trees(containers(tree, contents.budget)):
        where = places(container.children)
        module = container.module
        if not where and module is None:
            continue
        path = tuple(map(str, keys_of(container.path)))
        if module is not None:
            contents.programs += module.is_program
            contents.untracked += [(path, layer) for layer in module.untracked(hyperparameters)]
            contents.unreadable_modules += [] if module.is_readable else [module.kind]
        _collect(path, container, where, contents)
    if not (contents.networks or contents.untracked or contents.programs) and contents.unreadable_modules:
        raise refusal_of_module(contents.unreadable_modules[0])
    left_alone = contents.left_alone
    incomplete = [(name, half.reason) for name, half in contents.halves if half.is_certain or contents.networks]
    left_alone += [(name, half.reason) for name, half in contents.halves if not half.is_certain and not incomplete]
    if contents.programs and not (contents.networks or contents.untracked or left_alone or incomplete):
        raise NoBatchNorm("program must hold BN, got none: it was folded, or it was never there.")
    networks = distinct(named_networks(contents.networks))
    return Evidence(networks, tuple(left_alone), tuple(incomplete), graph=_graph(networks, contents.untracked))


def _graph(
    networks: tuple[NetworkState, ...], untracked: list[tuple[tuple[str, ...], UntrackedLayer]]
) -> GraphState | None:
    """Return the layers of pickled modules; None where the file holds none."""
    if not (untracked or any(layer.kind is not None for network in networks for layer in network.layers)):
        return None
    are_relative = len({path for path, _ in untracked}) == 1 and len(networks) < 2
    layers = [layer if are_relative else replace(layer, name=dotted((*path, layer.name))) for path, layer in untracked]
    names = [layer.name for network in networks for layer in network.layers]
    return GraphState((*names, *layers), len(names) + len(layers), is_pickled=True)


@dataclass(frozen=True)
class PossibleLayer:
    """Tensors with the names of a BN layer, and what speaks against it.

    Attributes:
        place: Where they lie in their container.
        stored: What is stored there.
        path: The keys that lead to the container, and the name inside it, as one string.
        half: What is missing; None if nothing is.
        objection: Why it is no BN layer that can be read, or None.
    """

    place: Place
    stored: StoredLayer
    path: str
    half: HalfLayer | None
    objection: str | None


def possible_layers(path: tuple[str, ...], container: Container, where: list[Place]) -> Iterator[PossibleLayer]:
    """Yield what may be BN layers among the direct entries of one container.

    Args:
        path: The keys that lead to the container.
        container: The container.
        where: Its places, in their order.
    """
    module = container.module
    beside = _Beside(container.children)
    for place in where:
        if module is not None and place.name in module.again:
            continue
        stated = None if module is None else module.layers.get(place.name)
        layer = StoredLayer.at(place)
        full = dotted((*path, *([place.name] if place.name else [])))
        owner = _owner(path, place)
        half = half_of(layer.own, ()) if owner is None else None
        half = half_of(layer.own, beside.of(place)) if half is not None else None
        reason = None
        if half is None:
            reason = owner or (stated and stated.objection) or layer.objection() or beside.objection(place)
        yield PossibleLayer(place, layer, full, half, reason)


def _collect(path: tuple[str, ...], container: Container, where: list[Place], contents: _Contents) -> None:
    """Add the BN layers whose tensors are direct entries of one container."""
    mapping, module = container.children, container.module
    names = tensors_in(mapping).keys()
    contents.halves += [(dotted((*path, name)), flat) for name, flat in flat_parameters(mapping)]
    for possible in possible_layers(path, container, where):
        contents.budget.check_time()
        place, half = possible.place, possible.half
        if half is not None:
            contents.halves.append((possible.path, replace(half, reason=place.house.in_own_names(half.reason))))
            continue
        if possible.objection is not None:
            contents.left_alone.append((possible.path, possible.objection))
            continue
        stated = None if module is None else module.layers.get(place.name)
        is_inside = bool(place.name) or not path
        for member, state in possible.stored.states(
            place.name if is_inside else path[-1],
            contents.hyperparameters if stated is None else stated.stated(contents.hyperparameters),
            contents.budget,
        ):
            if stated is not None:
                state = replace(state, mode=stated.mode, kind=stated.kind, training=stated.training)
            # A mapping that is itself one layer, as in {"bn1": {"running_mean": ...}}, belongs to the network around.
            network = contents.add(path if is_inside else path[:-1], member, state)
            network.is_module = module is not None
            if not is_inside:
                network.tensor_names.add(f"{path[-1]}.")
            elif not network.tensor_names:
                network.tensor_names.update(names)


def optimizer_part(parts: Iterable[str]) -> str | None:
    """Return the part of a path below which an optimizer keeps its own tensors; None if no optimizer does."""
    return min(_OPTIMIZERS.intersection(parts), default=None)


def _owner(path: tuple[str, ...], place: Place) -> str | None:
    """Return a reason if an optimizer keeps these tensors."""
    part = optimizer_part((*path, *path_parts(place.start)))
    return None if part is None else f"lies below {part!r}, in the state of an optimizer"


class _Beside:
    """The tensors of a mapping by what stands before the last part of their names."""

    def __init__(self, mapping: Mapping[Any, Any]) -> None:
        self._mapping = mapping
        self._tensors: dict[str, list[str]] | None = None

    def of(self, place: Place) -> list[str]:
        """Return the names of the tensors beside the statistics that no BN layer has."""
        if self._tensors is None:
            self._tensors = {}
            for key, value in self._mapping.items():
                if isinstance(key, str) and isinstance(value, StoredTensor):
                    start = key[: max(key.rfind("."), key.rfind("/")) + 1]
                    self._tensors.setdefault(start, []).append(key)
        names = (key.removeprefix(place.start).split(":")[0] for key in self._tensors.get(place.start, ()))
        return [name for name in names if name not in place.house.names]

    def objection(self, place: Place) -> str | None:
        """Return a reason if statistics without weight or counter have another tensor beside them."""
        if place.entries.keys() & {"weight", "num_batches_tracked"}:
            return None
        beside = self.of(place)
        return f"has {beside[0]!r} beside its {place.house.mean}, which no BN layer has" if beside else None
