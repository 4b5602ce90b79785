"""The stored BN state that the checks judge, in one form for checkpoints and models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bnlab.conventions import TORCH_EPS, TORCH_MOMENTUM
from bnlab.observe.graph_state import unique_names

if TYPE_CHECKING:
    from bnlab.observe.graph_state import GraphState, NodeMode

__all__ = ["Evidence", "Floats", "Hyperparameters", "LayerState", "Masks", "NetworkState", "Pruned", "distinct"]

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class Hyperparameters:
    """Momentum and eps of a layer. They are the defaults of a library where they are not known.

    Attributes:
        momentum: Weight of the new batch; None for a cumulative average.
        eps: The constant added to the variance, in squared input units.
        assumed: The names of those that neither the caller nor the target states, and that have the default of `house`.
        house: The library whose defaults are assumed.
    """

    momentum: float | None = TORCH_MOMENTUM
    eps: float = TORCH_EPS
    assumed: tuple[str, ...] = ("momentum", "eps")
    house: str = "torch"

    def stating(self, **known: float | None) -> Hyperparameters:
        """Return these hyperparameters with the known values of those that are assumed; the others are stated already.

        Args:
            known: The values of `momentum`, `eps`, both or none.
        """
        new = {name: value for name, value in known.items() if name in self.assumed}
        assumed = tuple(name for name in self.assumed if name not in new)
        return replace(self, **new, assumed=assumed) if new else self  # type: ignore[arg-type]

    def of_house(self, house: str, momentum: float, eps: float) -> Hyperparameters:
        """Return these hyperparameters with the defaults of a library in place of those that are assumed."""
        defaults = {"momentum": momentum, "eps": eps}
        return replace(self, house=house, **{name: defaults[name] for name in self.assumed})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Pruned:
    """The channels of a BN layer whose input is the same for all data, because the weights that compute it are 0.

    Attributes:
        channels: The channels.
        producers: The paths of the layers with these weights.
    """

    channels: tuple[int, ...]
    producers: tuple[str, ...]

    @classmethod
    def of(cls, mask: Masks, producers: tuple[str, ...]) -> Pruned:
        """Return the channels of a mask of shape (C,)."""
        return cls(tuple(np.flatnonzero(mask).tolist()), producers)

    def mask(self, channels: int) -> Masks:
        """Return the mask of shape (C,) of a layer with this number of channels."""
        mask = np.zeros(channels, dtype=np.bool_)
        mask[list(self.channels)] = True
        return mask


_NOTHING = Pruned((), ())


@dataclass(frozen=True, kw_only=True)
class LayerState:
    """The stored numbers of one BN layer, widened to float64 without loss.

    Attributes:
        name: Layer path.
        running_mean: Shape (C,), input units.
        running_var: Shape (C,), squared input units, unbiased where torch wrote it.
        weight: Shape (C,), or None for a layer without a weight.
        bias: Shape (C,), or None for a layer without a bias.
        num_batches_tracked: The counter, or None for a layer without one.
        dtype: Stored dtype of the running statistics.
        affine_dtype: Stored dtype of weight and bias.
        hyperparameters: Momentum and eps.
        settled: Whether a pass over data showed that the running statistics agree with the data.
        trained_with: Whether the loss on data showed that the weights were trained with these statistics.
        pruned: The pruned channels; None where there are none, or where no pass showed which they are.
        filter_norms: The norms of the filters that compute the channels, shape (C,); None where no pass showed them.
        mode: Which statistics the node of a graph uses; None where only numbers are stored.
        kind: The class of the layer, where the file stores the whole module; else None.
        training: Whether it was saved in train mode; None where that is not stored.
    """

    name: str
    running_mean: Floats
    running_var: Floats
    weight: Floats | None
    bias: Floats | None
    num_batches_tracked: int | None
    dtype: str
    affine_dtype: str
    hyperparameters: Hyperparameters
    settled: bool = False
    trained_with: bool = False
    pruned: Pruned | None = None
    filter_norms: Floats | None = None
    mode: NodeMode | None = None
    kind: str | None = None
    training: bool | None = None

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.running_mean)


@dataclass(frozen=True)
class NetworkState:
    """The BN layers of one network, and their channels as columns.

    A column holds one value per channel, layer after layer. With columns a check judges every channel of a network in
    one expression, and `where` maps the channels back to their layers. A missing weight counts as 1 and a missing bias
    as 0.
    """

    name: str
    layers: tuple[LayerState, ...]

    @cached_property
    def running_mean(self) -> Floats:
        """Column, input units."""
        return self._column(lambda layer: layer.running_mean)

    @cached_property
    def running_var(self) -> Floats:
        """Column, squared input units."""
        return self._column(lambda layer: layer.running_var)

    @cached_property
    def weight(self) -> Floats:
        """Column, output units."""
        return self._column(lambda layer: np.ones(layer.channels) if layer.weight is None else layer.weight)

    @cached_property
    def bias(self) -> Floats:
        """Column, output units."""
        return self._column(lambda layer: np.zeros(layer.channels) if layer.bias is None else layer.bias)

    @cached_property
    def eps(self) -> Floats:
        """Column, squared input units."""
        return self.spread([layer.hyperparameters.eps for layer in self.layers])

    @cached_property
    def inv_std(self) -> Floats:
        """Column 1/sqrt(running_var + eps); NaN where that is not a positive finite number."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            total = self.running_var + self.eps
            return np.where(np.isfinite(total) & (total > 0), 1 / np.sqrt(total), np.nan)

    @cached_property
    def gain(self) -> Floats:
        """Column abs(weight)/sqrt(running_var + eps), output per input unit; NaN where it is undefined."""
        with np.errstate(invalid="ignore", over="ignore"):
            return np.abs(self.weight) * self.inv_std

    @cached_property
    def pruned(self) -> Masks:
        """Column: whether the input of a channel is the same for all data."""
        return np.concatenate([(layer.pruned or _NOTHING).mask(layer.channels) for layer in self.layers])

    @cached_property
    def filter_norms(self) -> Floats:
        """Column: the norm of the filter that computes a channel; 1 in layers where it is not known."""
        return self._column(lambda layer: np.ones(layer.channels) if layer.filter_norms is None else layer.filter_norms)

    def spread(self, per_layer: list[float]) -> Floats:
        """Turn one value per layer into a column."""
        return np.repeat(np.asarray(per_layer, dtype=np.float64), self._widths)

    def ranges(self, column: Floats) -> list[tuple[float, float, float] | None]:
        """Return the smallest, median and largest finite value of each layer, or None where no value is finite."""
        return [_range(np.sort(column[part])) for part in self._parts]

    def where(self, mask: Masks) -> Iterator[tuple[LayerState, slice, tuple[int, ...]]]:
        """Yield the layer, its slice of a column, and the masked channels for every layer with a channel in `mask`."""
        if not mask.any():
            return
        for layer, part in zip(self.layers, self._parts, strict=True):
            channels = np.flatnonzero(mask[part])
            if len(channels):
                yield layer, part, tuple(channels.tolist())

    @cached_property
    def _widths(self) -> list[int]:
        return [layer.channels for layer in self.layers]

    @cached_property
    def _parts(self) -> list[slice]:
        ends = np.cumsum(self._widths).tolist()
        return [slice(end - width, end) for end, width in zip(ends, self._widths, strict=True)]

    def _column(self, values: Callable[[LayerState], Floats]) -> Floats:
        return np.concatenate([values(layer) for layer in self.layers])


def distinct(networks: Iterable[NetworkState]) -> tuple[NetworkState, ...]:
    """Return the networks with a number added to every name that occurs more than once, as in "bn#2"."""
    networks = list(networks)
    names = iter(unique_names(layer.name for network in networks for layer in network.layers))
    return tuple(
        NetworkState(network.name, tuple(_named(layer, next(names)) for layer in network.layers))
        for network in networks
    )


def _named(layer: LayerState, name: str) -> LayerState:
    return layer if layer.name == name else replace(layer, name=name)


def _range(ordered: Floats) -> tuple[float, float, float] | None:
    """Return the range of sorted values: -inf comes first, then the finite values, then inf and NaN."""
    first, end = ordered.searchsorted(-np.inf, side="right"), ordered.searchsorted(np.inf, side="left")
    if first == end:
        return None
    below, above = float(ordered[(first + end - 1) // 2]), float(ordered[(first + end) // 2])
    # divides before it adds: the sum of two values near the largest float64 would be inf
    return float(ordered[first]), below if below == above else below / 2 + above / 2, float(ordered[end - 1])


@dataclass(frozen=True)
class Evidence:
    """Everything that was read from one target.

    Attributes:
        networks: The networks of the target, each with at least one BN layer.
        left_alone: Name and reason for everything that looks like a BN layer and is not read as one.
        incomplete: Name and reason for every BN layer or part of a network of which something is missing in the target.
        way_to_the_rest: A sentence on how to check the incomplete layers; "" for the usual one.
        graph: What the graph in the file says beside the numbers; None for a file that holds no graph.
    """

    networks: tuple[NetworkState, ...]
    left_alone: tuple[tuple[str, str], ...] = ()
    incomplete: tuple[tuple[str, str], ...] = ()
    way_to_the_rest: str = ""
    graph: GraphState | None = None
