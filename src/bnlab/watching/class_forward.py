"""Replaces the forward of the classes of some layers, for these layers alone.

The layers themselves stay as they are: copies, pickles and state dicts of them hold nothing new. The hooks of other
tools see their layers as without the replacement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.uninterrupted import restores

__all__ = ["Forward", "Runs", "replaced_forward", "replacement_of"]

Forward = Callable[..., Tensor]
"""The forward of a class: receives the layer and the arguments of the call."""


class Runs(Protocol):
    """What runs in the place of the forward of a layer."""

    def run(self, forward: Forward, args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        """Return the output of the layer. A forward that calls that of its base class leads to a second call inside."""


@dataclass
class _ChangedClass:
    """A class with another forward: its own one, and the layers for which it is another one."""

    own: Forward
    layers: set[int] = field(default_factory=set)


_replacements: dict[int, Runs] = {}
"""What runs for each layer, by the identity of the layer. The block keeps the layers alive."""

_changed: dict[type, _ChangedClass] = {}


def replacement_of(layer: nn.Module) -> Runs | None:
    """Return what runs in the place of the forward of a layer at the moment, or None."""
    return _replacements.get(id(layer))


@restores
def replaced_forward(replacements: Iterable[tuple[nn.Module, Runs]]) -> Iterator[None]:
    """Let something else run in the place of the forward of each layer inside the block.

    Args:
        replacements: The layers, none of which has a replacement so far, with what runs for each.
    """
    layers = {id(layer): (layer, runs) for layer, runs in replacements}
    try:
        for identity, (layer, runs) in layers.items():
            _replacements[identity] = runs
            for kind in _kinds_with_forward(type(layer)):
                _change(kind).layers.add(identity)
        yield
    finally:
        for identity in layers:
            _replacements.pop(identity, None)
        for kind in list(_changed):
            _changed[kind].layers -= layers.keys()
            if not _changed[kind].layers:
                kind.forward = _changed.pop(kind).own  # type: ignore[attr-defined]


def _kinds_with_forward(kind: type) -> list[type]:
    """Return the BN classes that define the forward of a class, or a forward that it may call."""
    return [base for base in kind.__mro__ if issubclass(base, _BatchNorm) and "forward" in vars(base)]


def _change(kind: type) -> _ChangedClass:
    if kind not in _changed:
        own: Forward = vars(kind)["forward"]
        _changed[kind] = _ChangedClass(own)
        kind.forward = _choosing(own)  # type: ignore[attr-defined]
    return _changed[kind]


def _choosing(own: Forward) -> Forward:
    @functools.wraps(own)
    def forward(layer: nn.Module, *args: Any, **keywords: Any) -> Tensor:  # noqa: ANN401 - those of the layer
        runs = _replacements.get(id(layer))
        return own(layer, *args, **keywords) if runs is None else runs.run(own, args, keywords)

    return forward
