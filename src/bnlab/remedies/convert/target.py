"""The target of a conversion."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError
from bnlab.remedies.convert.families import GROUP, Family, family_of

__all__ = ["ConversionTarget"]

_KEPT = ("num_features", "num_channels", "eps", "momentum", "affine", "bias", "track_running_stats", "device", "dtype")
_USUAL_GROUPS = 32


@dataclass(frozen=True)
class ConversionTarget:
    """A family of layer classes, with arguments for the new layers.

    Attributes:
        family: The family.
        rank: The number of spatial dimensions of the class that the user passed; None if it accepts any.
        arguments: Positional arguments, such as the number of groups of a GroupNorm.
        options: Keyword arguments.
    """

    family: Family
    rank: int | None
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, to: object) -> ConversionTarget:
        """Create a target from a class, or from a `functools.partial` of one.

        Raises:
            UsageError: If `to` is neither of these, or sets an argument that each layer keeps.
        """
        kind = to.func if isinstance(to, functools.partial) else to
        arguments, options = (to.args, to.keywords) if isinstance(to, functools.partial) else ((), {})
        family_and_class = family_of(kind) if isinstance(kind, type) else None
        if family_and_class is None or family_and_class[1] is not kind:
            raise UsageError(
                f"convert: to must be a BN layer class of bnlab.nn or torch.nn, GroupNorm or InstanceNorm, got {to!r}."
            )
        family = family_and_class[0]
        fixed = [key for key in _KEPT if key in options] or [repr(value) for value in arguments]
        if fixed and not (family is GROUP and len(arguments) == len(fixed) == 1):
            raise UsageError(f"convert: to must not set what every layer keeps, got {fixed[0]}. Leave it out.")
        return cls(family, family.rank_of(family_and_class[1]), arguments, options)

    def fresh(self, layer: _BatchNorm, rank: int) -> nn.Module:
        """Return a new layer with the settings of `layer`. Its class may raise any error."""
        kind: Callable[..., nn.Module] = self.family.classes[rank]
        options = dict(self.options)
        if self.family is GROUP:
            arguments = self.arguments if self.arguments or "num_groups" in options else (_groups(layer.num_features),)
            options["num_channels"] = layer.num_features
        else:
            arguments = (layer.num_features,)
            options["momentum"] = layer.momentum
            options["track_running_stats"] = self.family.keeps_statistics and layer.track_running_stats
        if self.family.is_bnlab_class and _has_narrow_statistics(layer):
            options.setdefault("statistics_dtype", None)
        return kind(*arguments, eps=layer.eps, affine=layer.affine, **options)


def _groups(channels: int) -> int:
    """Return 32, as in Wu and He 2018 (arXiv:1803.08494), or the largest smaller number that divides the channels."""
    return max(groups for groups in range(1, min(_USUAL_GROUPS, channels) + 1) if channels % groups == 0)


def _has_narrow_statistics(layer: _BatchNorm) -> bool:
    mean: torch.Tensor | None = layer.running_mean
    return mean is not None and torch.finfo(mean.dtype).eps > torch.finfo(torch.float32).eps
