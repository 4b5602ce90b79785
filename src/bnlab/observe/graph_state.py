"""What the graph in a file says beside the stored numbers: which statistics a BN node uses, and what folding left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["GraphState", "LinearNode", "NodeMode", "UntrackedLayer", "unique_names"]


@dataclass(frozen=True)
class NodeMode:
    """The setting of a BN node that decides which statistics it uses.

    Attributes:
        setting: Its name, such as "training_mode".
        value: Its value in the file.
        inference: The value with which the node uses running statistics.
    """

    setting: str
    value: int
    inference: int

    @property
    def uses_batch(self) -> bool:
        """Whether the node normalises with batch statistics."""
        return self.value != self.inference


@dataclass(frozen=True)
class UntrackedLayer:
    """A BN layer of a graph that has no running statistics, and normalises with batch statistics.

    Attributes:
        name: Layer path.
        channels: C; 0 where the file does not say it.
        is_affine: Whether it has a weight or a bias other than 1 and 0.
        momentum: Weight of the new batch; None for a cumulative average.
        eps: Added to the variance, squared input units.
    """

    name: str
    channels: int
    is_affine: bool
    momentum: float | None
    eps: float


@dataclass(frozen=True)
class LinearNode:
    """A convolution or matrix product of a graph, with what is wrong with its stored weights and bias.

    Attributes:
        name: Name of the node.
        operator: Its operator, such as "Conv".
        channels: Number of output channels; 0 where the file does not say it.
        tensor: Name of the tensor with values that are not finite; None where all are finite.
        value: The first value that is not finite; None where all are finite.
        bad_channels: The output channels with such values.
        unread: Why its values were not read; None if they were.
    """

    name: str
    operator: str
    channels: int
    tensor: str | None = None
    value: float | None = None
    bad_channels: tuple[int, ...] = ()
    unread: str | None = None


@dataclass(frozen=True)
class GraphState:
    """What the graph in a file says beside the stored numbers.

    Attributes:
        batch_norms: Its BN layers in the order of the graph: the names of those with stored numbers, and the others.
        batch_norm_nodes: Number of BN nodes, also of those that are not read as layers.
        layers: The convolutions and matrix products with constant weights; none where the graph has BN nodes.
        is_pickled: Whether it is the tree of a pickled module, which holds layers and no nodes.
    """

    batch_norms: tuple[str | UntrackedLayer, ...]
    batch_norm_nodes: int
    layers: tuple[LinearNode, ...] = ()
    is_pickled: bool = False

    @property
    def is_folded(self) -> bool:
        """Whether the graph has no BN node, because BN was folded or was never there."""
        return self.batch_norm_nodes == 0


def unique_names(names: Iterable[str]) -> list[str]:
    """Return the names with a number added to every name that occurs more than once, as in "bn#2"."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique
