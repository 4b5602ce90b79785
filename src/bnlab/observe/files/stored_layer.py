"""Judges whether tensors with the names of a BN layer are one, and reads their numbers.

A layer has statistics of shape (C,), perhaps with axes of length 1 kept around it, as (1, C, 1, 1). A stacked ensemble,
as ``torch.func.stack_module_state`` makes it, has leading axes: (M, C) for M members. It counts as one only if its
counters are stacked in the same way, or its weight or bias, because a codebook has the shape (K, D) as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnlab.conventions import momentum_from_decay
from bnlab.observe.evidence import Hyperparameters, LayerState
from bnlab.observe.files.budget import Budget
from bnlab.observe.files.containers import kind_of
from bnlab.observe.files.houses import TORCH, House, Place
from bnlab.observe.files.numpy_data import as_stored_tensor
from bnlab.observe.files.tensors import FLOATING, INTEGER, MAX_CHANNELS, StoredTensor, coarser, widen

__all__ = ["StoredLayer"]

_VECTORS = ("running_mean", "running_var", "weight", "bias")
_COUNTER = "num_batches_tracked"
_MOST_MEMBERS = 4096


@dataclass(frozen=True)
class StoredLayer:
    """What a file holds of one BN layer, or of one layer in every member of an ensemble.

    Attributes:
        house: The house whose names it has.
        names: Its names in the file by their names in torch.
        own: What is stored under these names.
    """

    house: House
    names: Mapping[str, str]
    own: Mapping[str, Any]

    @classmethod
    def at(cls, place: Place) -> StoredLayer:
        """Return what is stored at a place of a mapping."""
        own = {role: as_stored_tensor(value) or value for role, (_, value) in place.entries.items()}
        return cls(place.house, {role: name for role, (name, _) in place.entries.items()}, own)

    def objection(self) -> str | None:
        """Return why the tensors are no BN layer, or why they cannot be read; None if they can."""
        for role, name in (("running_mean", self.house.mean), ("running_var", self.house.var)):
            if role not in self.own:
                return f"has no {name}"
        for role in _VECTORS:
            if role in self.own and not isinstance(self.own[role], StoredTensor):
                return f"{self.names[role]} is stored as {kind_of(self.own[role])}, not as an ordinary tensor"
        mean: StoredTensor = self.own["running_mean"]
        if not 0 < mean.numel <= MAX_CHANNELS or self._members() is None:
            return f"{self.house.mean} has the shape {mean.shape}, not the (C,) of a BN layer"
        if mean.dtype not in FLOATING:
            return f"{self.house.mean} has the dtype {mean.dtype}"
        return self._misfit(mean)

    def states(self, name: str, known: Hyperparameters, budget: Budget) -> Iterator[tuple[str, LayerState]]:
        """Yield the index of each member with its layer; the index is "" where the layer is not stacked."""
        mean: StoredTensor = self.own["running_mean"]
        members = self._members() or ()
        count = math.prod(members)
        budget.spend("channels", mean.numel)
        rows = {role: widen(self.own[role].read()).reshape(count, -1) for role in _VECTORS if role in self.own}
        counters = self._counters(count)
        hyperparameters = self._hyperparameters(known)
        for row, index in enumerate(np.ndindex(*members)):
            yield (
                f"[{','.join(map(str, index))}]" if members else "",
                LayerState(
                    name=name,
                    running_mean=rows["running_mean"][row],
                    running_var=rows["running_var"][row],
                    weight=rows["weight"][row] if "weight" in rows else None,
                    bias=rows["bias"][row] if "bias" in rows else None,
                    num_batches_tracked=counters[row],
                    dtype=coarser(mean.dtype, self.own["running_var"].dtype),
                    affine_dtype=self.own.get("weight", self.own["running_var"]).dtype,
                    hyperparameters=hyperparameters,
                ),
            )

    def _misfit(self, mean: StoredTensor) -> str | None:
        for role in _VECTORS[1:]:
            other = self.own.get(role)
            if other is not None and (other.shape != mean.shape or other.dtype not in FLOATING):
                return (
                    f"{self.names[role]} has the shape {other.shape} and dtype {other.dtype}, "
                    f"{self.house.mean} has {mean.shape}"
                )
        return None

    def _members(self) -> tuple[int, ...] | None:
        """Return the leading axes of an ensemble, () for a layer that is not stacked, None for other shapes."""
        shape: tuple[int, ...] = self.own["running_mean"].shape
        if len(shape) == 1:
            return ()
        affine = [self.own[role].shape for role in ("weight", "bias") if isinstance(self.own.get(role), StoredTensor)]
        counter = self.own.get(_COUNTER)
        has_counters = isinstance(counter, StoredTensor) and counter.shape == shape[:-1]
        if not shape or not (has_counters or shape in affine):
            return None
        if not has_counters and sum(length != 1 for length in shape) <= 1:
            return ()
        return shape[:-1] if math.prod(shape[:-1]) <= _MOST_MEMBERS else None

    def _counters(self, count: int) -> list[int | None]:
        stored = self.own.get(_COUNTER)
        if isinstance(stored, StoredTensor):
            if stored.numel not in (1, count) or stored.dtype not in FLOATING | INTEGER:
                return [None] * count
            values = np.broadcast_to(stored.read().reshape(-1), count) if count else np.empty(0)
            return [_whole_number(value) for value in values.tolist()]
        return [_whole_number(stored)] * count

    def _hyperparameters(self, known: Hyperparameters) -> Hyperparameters:
        """Return momentum and eps: what the caller states, else what the file states, else those of the house."""
        if self.house is not TORCH:
            known = known.of_house(self.house.name, self.house.momentum, self.house.eps)
        decay, eps = self.own.get("momentum"), self.own.get("epsilon")
        stated: dict[str, float | None] = {}
        if isinstance(decay, float) and 0 <= decay <= 1:
            stated["momentum"] = momentum_from_decay(decay)
        if isinstance(eps, float) and 0 <= eps < math.inf:
            stated["eps"] = eps
        return known.stating(**stated)


def _whole_number(value: object) -> int | None:
    """Return a counter; averaging the weights of networks may have made it a float."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None
