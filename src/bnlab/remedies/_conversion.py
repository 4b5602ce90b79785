"""The record that a conversion leaves on a layer. Pickled models refer to this module by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["Origin", "origin_of"]


@dataclass(frozen=True)
class Origin:
    """A record of what a converted layer was before. The layer keeps it as `converted_from`, to convert back.

    Attributes:
        kind: The class of the layer, if that was a subclass of a layer of torch.
        activation: The activation that this class applies.
        required_grad: Parameters that required a gradient before the layer was frozen.
        modules: Names of the submodules that this class runs after BN.
    """

    kind: type[nn.Module] | None = None
    activation: str | None = None
    required_grad: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


def origin_of(layer: nn.Module) -> Origin:
    """Return the record of earlier conversions of a layer. It is empty if the layer was never converted."""
    origin = vars(layer).get("converted_from")
    return origin if isinstance(origin, Origin) else Origin()
