"""Groups layer classes into families that differ only by the number of spatial dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

import bnlab.nn as bnlab_nn
from bnlab.nn.base import BatchNormBase
from bnlab.nn.frozen_batch_norm import FrozenBatchNorm

__all__ = ["FAMILIES", "FROZEN", "GROUP", "RANKS", "Family", "class_name", "family_of"]

RANKS = (1, 2, 3)


@dataclass(frozen=True)
class Family:
    """Classes that differ only by the number of spatial dimensions.

    Attributes:
        classes: The class per number of spatial dimensions. The class for 1 takes (N, C) too.
        is_plain: Whether the classes compute plain BN in either mode.
        keeps_statistics: Whether the classes have the running statistics of a BN layer. GroupNorm and InstanceNorm do
            not have them.
    """

    classes: Mapping[int, type[nn.Module]]
    is_plain: bool = False
    keeps_statistics: bool = True

    @property
    def has_ranks(self) -> bool:
        """Whether each rank has its own class."""
        return len(set(self.classes.values())) > 1

    @property
    def is_bnlab_class(self) -> bool:
        """Whether the classes are those of bnlab, which take an activation, a residual and a mask."""
        return issubclass(self.classes[1], BatchNormBase)

    @property
    def freezes(self) -> bool:
        """Whether the classes normalise with running statistics in either mode."""
        return issubclass(self.classes[1], FrozenBatchNorm)

    def rank_of(self, kind: type) -> int | None:
        """Return the number of spatial dimensions of a class, or None if the class accepts any."""
        return next((rank for rank in RANKS if self.has_ranks and issubclass(kind, self.classes[rank])), None)


def _family(module: object, name: str, *, is_plain: bool = False, keeps_statistics: bool = True) -> Family:
    classes = {rank: getattr(module, f"{name}{rank}d") for rank in RANKS}
    return Family(classes, is_plain, keeps_statistics)


FROZEN = _family(bnlab_nn, "FrozenBatchNorm")
GROUP = Family(dict.fromkeys(RANKS, nn.GroupNorm), keeps_statistics=False)
FAMILIES = (
    _family(bnlab_nn, "BatchNorm", is_plain=True),
    FROZEN,
    _family(bnlab_nn, "GhostBatchNorm"),
    _family(bnlab_nn, "BatchRenorm"),
    _family(nn, "BatchNorm", is_plain=True),
    Family(dict.fromkeys(RANKS, nn.SyncBatchNorm), is_plain=True),
    GROUP,
    _family(nn, "InstanceNorm", keeps_statistics=False),
)


def family_of(kind: type) -> tuple[Family, type[nn.Module]] | None:
    """Return the family of a class, and the class of the family that it is or derives from; None if there is none."""
    for base in kind.__mro__:
        for family in FAMILIES:
            if base in family.classes.values():
                return family, base
    return None


def class_name(kind: type) -> str:
    """Return the name of a class as users write it."""
    for package in ("torch.nn", "bnlab.nn"):
        if kind.__module__.startswith(package):
            return f"{package}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
