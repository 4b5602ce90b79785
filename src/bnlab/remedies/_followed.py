"""BN layers that run submodules of their own after BN. Pickled models refer to this module by name.

A subclass of a BN layer may apply an activation that no layer of bnlab has, such as a LeakyReLU of another slope. Its
converted layer keeps the submodule and runs it after BN.
"""

from __future__ import annotations

import copyreg
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

__all__ = ["FollowedType", "followed_by", "followed_class"]


class FollowedType(type):
    """The class of the generated classes. It lets pickles rebuild them."""

    followed: type[nn.Module]


@lru_cache(maxsize=64)
def followed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a BN class of bnlab that runs the submodules in its attribute `followed_by` after BN."""
    if isinstance(kind, FollowedType):
        return kind

    def forward(
        self: nn.Module, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        y: Tensor = kind.forward(self, input, residual, mask=mask)
        for name in followed_by(self):
            y = self.get_submodule(name)(y)
        return y

    attributes = {"forward": forward, "followed": kind, "followed_by": (), "__module__": kind.__module__}
    return FollowedType(kind.__name__, (kind,), attributes)  # type: ignore[return-value]


def followed_by(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the submodules that a layer of a generated class runs after BN, in order."""
    names = vars(layer).get("followed_by", ())
    return names if isinstance(type(layer), FollowedType) and isinstance(names, tuple) else ()


def _reduced(kind: FollowedType) -> tuple[Any, ...]:
    return followed_class, (kind.followed,)


copyreg.pickle(FollowedType, _reduced)
