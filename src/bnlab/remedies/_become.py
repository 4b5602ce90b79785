"""Turning a layer into one of another class, in place.

The object stays the same, so that every name, list, hook handle and optimizer that refers to it or to its tensors still
does: torch turns lazy layers into their real classes in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

__all__ = ["become"]

_TENSORS = ("_parameters", "_buffers")


def become(
    layer: nn.Module,
    template: nn.Module,
    *,
    plain: nn.Module,
    kind: type[nn.Module] | None = None,
    overridden: Collection[str] = (),
    keeps_buffers: bool = True,
) -> Callable[[], None]:
    """Give a layer the class of a template, and the attributes it lacks; return what takes that back.

    Kept are tensors, mode, hooks, and every attribute the user added.

    Args:
        layer: The layer to turn.
        template: A fresh layer of the new class.
        plain: A fresh layer of the old one: what it has and the template has not is dropped.
        kind: The new class, if it is not that of the template but a subclass.
        overridden: Attributes that are taken from the template although the layer has them.
        keeps_buffers: Whether the layer keeps its buffers; else it gets those of the template.

    Returns:
        A function that gives the layer its class and attributes back. Tensors and mode stay as they are by then: what
        was trained meanwhile is not lost.
    """
    before: dict[str, Any] = {key: dict(value) if key in _TENSORS else value for key, value in vars(layer).items()}
    old_kind = type(layer)
    after = {key: value for key, value in before.items() if key in vars(template) or key not in vars(plain)}
    after |= {key: value for key, value in vars(template).items() if key not in after or key in overridden}
    after["_parameters"] = _merged(before["_parameters"], plain._parameters, template._parameters)  # noqa: SLF001
    kept = before["_buffers"] if keeps_buffers else {}
    after["_buffers"] = _merged(kept, plain._buffers, _beside(layer, template._buffers))  # noqa: SLF001
    after["_non_persistent_buffers_set"] = {
        name
        for name in (*before["_non_persistent_buffers_set"], *template._non_persistent_buffers_set)  # noqa: SLF001
        if name in after["_buffers"]
    }

    def undo() -> None:
        now = vars(layer)
        restored = {**before, "training": layer.training}
        for tensors in _TENSORS:
            here = _beside(layer, before[tensors])
            current = {name: value for name, value in now[tensors].items() if value is not None}
            restored[tensors] = {name: current.get(name, value) for name, value in here.items()}
        _replace(layer, old_kind, restored)

    _replace(layer, type(template) if kind is None else kind, after)
    return undo


def _replace(layer: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    layer.__class__ = kind
    vars(layer).clear()
    vars(layer).update(attributes)


def _merged(own: dict[str, Any], plain: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """Return the fresh names with the layer's own tensors where it has them, and what the user added."""
    added = {name: value for name, value in own.items() if name not in plain and name not in fresh}
    return {name: own.get(name, value) for name, value in fresh.items()} | added


def _beside(layer: nn.Module, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return tensors on the device of the layer's own."""
    own = next((t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))), None)
    moved = {name: None if t is None or own is None else t.to(own.device) for name, t in tensors.items()}
    return tensors if own is None else moved
