"""The record that `freeze` leaves on a layer, and the state of the layer that freezing changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError
from bnlab.nn.frozen_batch_norm import FrozenBatchNorm

__all__ = ["FrozenFrom", "Switches", "affine_parameters", "frozen_from", "keeps_statistics", "moves_statistics"]

_AFFINE = ("weight", "bias")


@dataclass(frozen=True)
class Switches:
    """Which parts of a layer are frozen.

    Attributes:
        normaliser: Whether the layer normalises with the running statistics in either mode.
        buffers: Whether running statistics and num_batches_tracked stay as they are.
        affine: Whether weight and bias require no gradient.

    Raises:
        UsageError: If one of them is not a bool, or if none is True.
    """

    normaliser: bool
    buffers: bool
    affine: bool

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool):
                raise UsageError(f"freeze: {name} must be True or False, got {value!r}.")
        if not any(vars(self).values()):
            raise UsageError(
                "freeze: one of normaliser, buffers and affine must be True, got none. Call unfreeze to lift a freeze."
            )

    def hold_for(self, layer: _BatchNorm) -> bool:
        """Return whether every part of the layer that these switches freeze is frozen already."""
        return not (
            (self.normaliser and not isinstance(layer, FrozenBatchNorm))
            or (self.buffers and moves_statistics(layer))
            or (self.affine and any(parameter.requires_grad for parameter in affine_parameters(layer).values()))
        )


@dataclass(frozen=True)
class FrozenFrom:
    """A record of what a layer was before the first `freeze`. The layer keeps it as `frozen_from`, for `unfreeze`.

    Attributes:
        switches: The switches of the last call.
        kind: The class of the layer, if freezing changed it.
        settings: Attributes that the frozen class does not have.
        activation: The activation of the layer right after it was frozen.
        converted_from: The record of a conversion before the freeze.
        restored: Attributes that freezing changed, with the values they had before.
        required_grad: Names of the parameters that required a gradient.
    """

    switches: Switches
    kind: type[nn.Module] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    activation: str | None = None
    converted_from: object = None
    restored: Mapping[str, Any] = field(default_factory=dict)
    required_grad: tuple[str, ...] = ()


def frozen_from(layer: nn.Module) -> FrozenFrom | None:
    """Return the record of `freeze` on a layer. It is None if `freeze` left none, or if the class has changed since."""
    memory = vars(layer).get("frozen_from")
    if not isinstance(memory, FrozenFrom) or (memory.kind is not None and not isinstance(layer, FrozenBatchNorm)):
        return None
    return memory


def keeps_statistics(layer: _BatchNorm) -> bool:
    """Return whether a layer has running statistics."""
    return layer.running_mean is not None and layer.running_var is not None


def moves_statistics(layer: _BatchNorm) -> bool:
    """Return whether a layer in train mode updates its running statistics."""
    moves = layer.moves_statistics if isinstance(layer, FrozenBatchNorm) else True
    return moves and layer.track_running_stats and keeps_statistics(layer)


def affine_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return weight and bias by name. For a parametrized layer these are the parameters they are computed from."""
    made_of = tuple(f"parametrizations.{name}." for name in _AFFINE)
    return {name: p for name, p in layer.named_parameters() if name in _AFFINE or name.startswith(made_of)}
