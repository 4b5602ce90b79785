"""Changes the class of a layer in place.

The layer stays the same object. Every name, list, hook handle and optimizer that refers to the layer or to its tensors
stays valid. torch gives lazy layers their real classes in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.nn.base import BatchNormBase

__all__ = ["change_class", "narrow_statistics"]

_CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def change_class(
    layer: nn.Module,
    template: nn.Module,
    *,
    plain: nn.Module,
    kind: type[nn.Module] | None = None,
    overridden: Collection[str] = (),
    keeps_buffers: bool = True,
    finish: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """Give a layer the class of a template, with the attributes it lacks, and return a function that undoes this.

    The layer keeps its tensors, its mode, its hooks, and every attribute that the user added.

    Args:
        layer: The layer to change.
        template: A fresh layer of the new class.
        plain: A fresh layer of the old class. The layer loses the attributes that this one has and the template lacks.
        kind: The new class, if it is a subclass of the class of the template.
        overridden: Attributes that are taken from the template although the layer has them.
        keeps_buffers: Whether the layer keeps its buffers. Otherwise it gets those of the template.
        finish: A function that is called once the layer has its new class, to set other parts of the change.

    Returns:
        A function that restores the class and the attributes of the layer. It keeps later changes to tensors, to the
        mode, and to settings that both classes have.
    """
    before = _snapshot(layer)
    old_kind, new_kind = type(layer), type(template) if kind is None else kind
    _replace(layer, new_kind, _after(layer, template, plain, overridden, keeps_buffers=keeps_buffers))
    finish()
    after_change = _snapshot(layer)

    def undo() -> None:
        now = vars(layer)
        changed = {
            key: value
            for key, value in now.items()
            if key not in _CONTAINERS and (key not in after_change or after_change[key] is not value)
            if key in before or key not in after_change
        }
        stashed = _on_device_of(layer, {key: value for key, value in before.items() if key not in now})
        _replace(layer, old_kind, {**before, **stashed, **changed, **_tensors(layer, before, now)})
        narrow_statistics(layer)

    return undo


def _after(
    layer: nn.Module, template: nn.Module, plain: nn.Module, overridden: Collection[str], *, keeps_buffers: bool
) -> dict[str, Any]:
    """Return the attributes that the layer has after the change to the class of the template."""
    before = _snapshot(layer)
    after = {key: value for key, value in before.items() if key in vars(template) or key not in vars(plain)}
    fresh = {key: value for key, value in vars(template).items() if key not in after or key in overridden}
    after |= _on_device_of(layer, fresh)
    after["_parameters"] = _merged(before["_parameters"], plain._parameters, template._parameters)  # noqa: SLF001
    kept = before["_buffers"] if keeps_buffers else {}
    after["_buffers"] = _merged(kept, plain._buffers, _on_device_of(layer, template._buffers))  # noqa: SLF001
    after["_non_persistent_buffers_set"] = {
        name
        for name in (*before["_non_persistent_buffers_set"], *template._non_persistent_buffers_set)  # noqa: SLF001
        if name in after["_buffers"]
    }
    return after


def _snapshot(layer: nn.Module) -> dict[str, Any]:
    return {key: value.copy() if key in _CONTAINERS else value for key, value in vars(layer).items()}


def _tensors(layer: nn.Module, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parameters and buffers for the old class: the current tensors where they exist, else the old ones."""
    tensors = {}
    for kind in ("_parameters", "_buffers"):
        current = {name: value for name, value in now[kind].items() if value is not None}
        stashed = _on_device_of(layer, before[kind])
        tensors[kind] = {name: current.get(name, value) for name, value in stashed.items()}
    return tensors


def _replace(layer: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    layer.__class__ = kind
    vars(layer).clear()
    vars(layer).update(attributes)


def _merged(own: dict[str, Any], plain: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """Return a tensor for each fresh name, from the layer where it has one, and the tensors that the user added."""
    added = {name: value for name, value in own.items() if name not in plain and name not in fresh}
    return {name: own.get(name, value) for name, value in fresh.items()} | added


def _on_device_of(layer: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
    """Return attributes with tensors on the device of the layer, except for those without values."""
    own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    device = next((tensor.device for tensor in sorted(own, key=lambda tensor: tensor.is_meta)), None)
    return {
        name: value.to(device) if isinstance(value, Tensor) and not value.is_meta and device is not None else value
        for name, value in attributes.items()
    }


def narrow_statistics(layer: nn.Module) -> None:
    """Cast the running statistics of a layer of torch to the dtype of its weight, because torch requires it.

    Layers of bnlab keep running statistics in float32 when the weight is in half precision.
    """
    weight: object = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(layer, BatchNormBase):
        return
    for name in ("running_mean", "running_var"):
        buffer = layer._buffers.get(name)  # noqa: SLF001
        if buffer is not None and buffer.dtype != weight.dtype and _needs_narrowing(weight, buffer):
            layer._buffers[name] = buffer.to(weight.dtype)  # noqa: SLF001


def _needs_narrowing(weight: Tensor, buffer: Tensor) -> bool:
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return half or (weight.dtype == torch.float64 and buffer.dtype == torch.float32)
