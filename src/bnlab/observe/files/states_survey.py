"""Reads the BN statistics of several states of one network, and refuses states that do not fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath

import numpy as np
import torch
from torch import Tensor

from bnlab.errors import NoBatchNorm, UsageError
from bnlab.kernels.compiled.sharding import is_sharded
from bnlab.observe.files.checkpoint import named_errors
from bnlab.observe.files.load import as_tensor
from bnlab.observe.files.split_tensor import SplitTensor
from bnlab.observe.files.state_leaves import Leaf, Path, StateLeaves, StatisticsPaths
from bnlab.observe.files.tensors import StoredTensor, item_bytes
from bnlab.wording import listed

__all__ = ["FEW", "StatesSurvey", "values_of"]

FEW = 3
"""Number of names in a message."""


@dataclass
class StatesSurvey:
    """What the statistics of the states are like, before any are pooled.

    Attributes:
        labels: What messages call the states.
        counters: For each BN layer by the path of its mean: the counter of each state, float64, which broadcasts to the
            statistics; None for a state without one.
        idle: For each BN layer by the path of its mean: whether each state never updated it. The statistics are then 0
            and 1, and the counter is 0.
    """

    labels: Sequence[str]
    counters: dict[Path, list[Tensor | None]] = field(default_factory=dict)
    idle: dict[Path, list[bool]] = field(default_factory=dict)
    _first: StateLeaves | None = None

    @property
    def first(self) -> StateLeaves:
        """The tensors of the first state."""
        assert self._first is not None
        return self._first

    @property
    def first_label(self) -> str:
        """What the middle of a message calls the first state."""
        return self.labels[0].removeprefix("pool: ")

    def add(self, index: int, leaves: StateLeaves) -> None:
        """Take in the next state.

        Raises:
            NoBatchNorm: If it is the first and holds no BN layer.
            UsageError: If it does not fit the first, or its statistics cannot be pooled.
        """
        label = self.labels[index]
        if self._first is None:
            if not leaves.layers:
                raise NoBatchNorm(_no_layer(label, leaves))
            self._first = leaves
        self._require_layers(label, leaves)
        for layer in self.first.layers:
            mean, var = (self._statistic(label, leaves, layer, path) for path in (layer.mean, layer.var))
            _require_finite(label, layer, mean, var)
            counter = None if layer.counter is None else leaves.tensors.get(layer.counter)
            weight = None if counter is None else _counter_weight(values_of(counter, label, layer.name), mean)
            is_idle = weight is not None and not weight.any() and not mean.any() and bool((var == 1).all())
            self.counters.setdefault(layer.mean, []).append(weight)
            self.idle.setdefault(layer.mean, []).append(is_idle)

    def _require_layers(self, label: str, leaves: StateLeaves) -> None:
        """Refuse a state that lacks a layer of the first one, or has one that the first lacks."""
        own = {layer.mean for layer in leaves.layers}
        missing = [layer.name for layer in self.first.layers if layer.mean not in own]
        if missing:
            raise UsageError(
                f"{label}: state must have the BN layers of {self.first_label}, got none at {listed(missing, FEW)}. "
                "Pool states of one architecture, or rename the layers."
            )
        known = {layer.mean for layer in self.first.layers}
        extra = [layer.name for layer in leaves.layers if layer.mean not in known]
        if extra:
            raise UsageError(
                f"{label}: state must have the BN layers of {self.first_label} only, got {listed(extra, FEW)} as well. "
                "Pool states of one architecture, or drop these layers."
            )

    def _statistic(self, label: str, leaves: StateLeaves, layer: StatisticsPaths, path: Path) -> Tensor:
        """Return a statistic in float64, and refuse one of another shape than in the first state."""
        shape, wanted = tuple(leaves.tensors[path].shape), tuple(self.first.tensors[path].shape)
        if shape != wanted:
            raise UsageError(
                f"{label}: {layer.name} must have statistics of shape {wanted} as in {self.first_label}, "
                f"got {shape}. Pool states of one architecture."
            )
        values = values_of(leaves.tensors[path], label, layer.name)
        if values is None:
            raise UsageError(f"{label}: {layer.name} must have ordinary dense tensors, got others. Save it as float32.")
        return values.to(torch.float64)


def values_of(leaf: Leaf, label: str, name: str) -> Tensor | None:
    """Return the values of a tensor on the CPU, in its dtype; None if it is sparse, quantized or of a foreign dtype.

    Args:
        leaf: The tensor.
        label: What messages call its state.
        name: What messages call the tensor.

    Raises:
        UsageError: If this process does not hold all values.
    """
    if isinstance(leaf, SplitTensor) or (isinstance(leaf, Tensor) and is_sharded(leaf)):
        raise UsageError(
            f"{label}: {name} must be a whole tensor, got a part of one. Gather it first: "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict with StateDictOptions(full_state_dict=True)."
        )
    if isinstance(leaf, StoredTensor):
        with named_errors(FilePath(label)):
            return None if item_bytes(leaf.dtype) is None else as_tensor(leaf)
    if isinstance(leaf, np.ndarray):
        try:
            return torch.from_numpy(np.array(leaf))  # a copy: torch warns about arrays that are read-only
        except TypeError:
            return None
    if leaf.is_meta:
        raise UsageError(
            f"{label}: {name} must have values, got a tensor on the meta device. Load it with map_location='cpu'."
        )
    return leaf.detach().cpu() if leaf.layout == torch.strided and not leaf.is_quantized else None


def _no_layer(label: str, leaves: StateLeaves) -> str:
    if not leaves.left_alone:
        return f"{label}: state must hold BN layers, got none among {len(leaves.tensors)} tensors."
    name, reason = leaves.left_alone[0]
    return (
        f"{label}: state must hold BN layers, got none that can be pooled: {name} {reason}. Pool what "
        "model.state_dict() returns."
    )


def _require_finite(label: str, layer: StatisticsPaths, mean: Tensor, var: Tensor) -> None:
    """Refuse statistics that are not finite, and negative variances."""
    for what, values, is_wrong in (
        ("running mean", mean, ~mean.isfinite()),
        ("running variance", var, ~var.isfinite() | (var < 0)),
    ):
        if is_wrong.any():
            channel = int(is_wrong.flatten().nonzero()[0])
            rule = "finite" if what == "running mean" else "finite and not negative"
            raise UsageError(
                f"{label}: {what} of {layer.name} must be {rule}, got {float(values.flatten()[channel]):g} in channel "
                f"{channel}. Leave the state out, or recompute it first: bnlab.recalibrate(model, data)."
            )


def _counter_weight(counter: Tensor | None, mean: Tensor) -> Tensor | None:
    """Return a counter as a weight that broadcasts to statistics; None if it is no counter of this layer.

    The counters of a stacked ensemble have the leading axes of its statistics.
    """
    if counter is None or counter.is_complex() or counter.dtype == torch.bool:
        return None
    weight = counter.to(torch.float64)
    if weight.numel() == 1:
        return weight.reshape(())
    return weight.unsqueeze(-1) if weight.shape == mean.shape[:-1] else None
