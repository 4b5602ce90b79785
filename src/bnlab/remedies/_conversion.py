"""What a conversion leaves on a layer. Pickled models name this module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["Origin", "origin_of"]


@dataclass(frozen=True)
class Origin:
    """What a converted layer was: kept on the layer as `converted_from`, for the way back.

    Attributes:
        kind: Its class, if that is a subclass of a layer of torch.
        activation: The activation inside it.
        required_grad: Parameters that required a gradient before the layer was frozen.
    """

    kind: type[nn.Module] | None = None
    activation: str | None = None
    required_grad: tuple[str, ...] = ()


def origin_of(layer: nn.Module) -> Origin:
    """Return what conversions remember of a layer; nothing if it was never converted."""
    origin = vars(layer).get("converted_from")
    return origin if isinstance(origin, Origin) else Origin()
