"""Reads BN evidence from a live model: the numbers of its checkpoint, and the momentum and eps of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from bnlab.observe.evidence import Evidence, Floats, Hyperparameters, LayerState, NetworkState
from bnlab.observe.files.tensors import coarser
from bnlab.observe.programs.graph_layers import INSTANCE_NORM
from bnlab.observe.transfers import to_host

__all__ = ["read_model", "with_stored_layers"]


def read_model(model: nn.Module, hyperparameters: Hyperparameters) -> Evidence:
    """Return the BN layers of a model: every module with 1-d buffers `running_mean` and `running_var`.

    Args:
        model: Any module. The function neither changes nor runs it.
        hyperparameters: Momentum and eps where the caller states them. Otherwise each layer has its own.

    Returns:
        One network, with the layer names of ``named_modules()``. Layers without running statistics are listed as left
        alone, with the reason.
    """
    named = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "running_mean") and hasattr(module, "running_var")
    ]
    readable, left_alone = _readable_layers(named)
    layers = _layers(readable, hyperparameters)
    networks = (NetworkState("", tuple(layers)),) if layers else ()
    return Evidence(networks, tuple(left_alone))


def with_stored_layers(
    evidence: Evidence,
    stored: Mapping[str, nn.Module],
    left_alone: Sequence[tuple[str, str]],
    hyperparameters: Hyperparameters,
) -> Evidence:
    """Return evidence with the layers of a graph whose numbers alone are known.

    Args:
        evidence: The evidence on the other layers.
        stored: The modules that hold the numbers, by path.
        left_alone: Name and reason of what is not read as a BN layer.
        hyperparameters: Momentum and eps, which such modules do not have.
    """
    own = [layer for network in evidence.networks for layer in network.layers]
    readable, reasons = _readable_layers(stored.items())
    own += _layers(readable, hyperparameters)
    reasons = [*evidence.left_alone, *left_alone, *reasons]
    return Evidence((NetworkState("", tuple(own)),) if own else (), tuple(reasons))


def _readable_layers(named: Iterable[tuple[str, nn.Module]]) -> tuple[dict[str, nn.Module], list[tuple[str, str]]]:
    """Return the modules that are read as BN layers, and the reason against each of the others."""
    reasons = [(name, module, _unreadable(module)) for name, module in named]
    readable = {name: module for name, module, reason in reasons if reason is None}
    return readable, [(name, reason) for name, _, reason in reasons if reason is not None]


def _unreadable(module: nn.Module) -> str | None:
    mean: object = module.running_mean
    var: object = module.running_var
    if isinstance(module, _InstanceNorm):
        return INSTANCE_NORM if isinstance(mean, torch.Tensor) else "is instance normalization"
    if mean is None and var is None:
        return "keeps no running statistics"
    if not (_is_values(mean) and _is_values(var)):
        return "has running statistics without values (lazy, on the meta device, or not tensors)"
    if not (mean.is_floating_point() and var.is_floating_point()):
        return f"running statistics have the dtypes {_dtype(mean)} and {_dtype(var)}"
    if mean.dim() != 1 or mean.shape != var.shape or mean.numel() == 0:
        return f"running_mean has the shape {tuple(mean.shape)}, not the (C,) of a BN layer"
    for key in ("weight", "bias"):
        value = getattr(module, key, None)
        if _is_values(value) and value.shape != mean.shape:
            return f"{key} has the shape {tuple(value.shape)}, running_mean has {tuple(mean.shape)}"
    return None


def _is_values(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and not is_lazy(value) and not value.is_meta


_NUMBERS = ("running_mean", "running_var", "weight", "bias", "num_batches_tracked")


def _layers(modules: Mapping[str, nn.Module], hyperparameters: Hyperparameters) -> list[LayerState]:
    """Return the numbers of layers that can be read, for which the host reads a device once."""
    tensors = {
        (name, key): _whole(value)
        for name, module in modules.items()
        for key in _NUMBERS
        if _is_values(value := getattr(module, key, None)) and (key != _NUMBERS[-1] or value.numel() == 1)
    }
    values = dict(zip(tensors, to_host([*tensors.values()]), strict=True))
    return [
        _layer(name, module, {key: values.get((name, key)) for key in _NUMBERS}, hyperparameters)
        for name, module in modules.items()
    ]


def _layer(
    name: str, module: nn.Module, values: Mapping[str, torch.Tensor | None], known: Hyperparameters
) -> LayerState:
    weight, counter = getattr(module, "weight", None), values["num_batches_tracked"]
    own = {key: getattr(module, key) for key in ("momentum", "eps") if hasattr(module, key)}
    mean, var, *affine = (_float64(values[key]) for key in _NUMBERS[:4])
    assert mean is not None  # checked by _unreadable
    assert var is not None
    return LayerState(
        name=name,
        running_mean=mean,
        running_var=var,
        weight=affine[0],
        bias=affine[1],
        num_batches_tracked=None if counter is None else int(counter.to(torch.int64).numpy().item()),
        dtype=coarser(_dtype(module.running_mean), _dtype(module.running_var)),
        affine_dtype=_dtype(weight if _is_values(weight) else module.running_var),
        hyperparameters=known.stating(**own),
    )


def _whole(value: torch.Tensor) -> torch.Tensor:
    gather: Callable[[], torch.Tensor] = getattr(value, "full_tensor", lambda: value)  # a DTensor holds a part of it
    return gather().detach()


def _float64(value: torch.Tensor | None) -> Floats | None:
    if value is None:
        return None
    values: Floats = value.to(torch.float64).numpy().copy()
    return values


def _dtype(value: object) -> str:
    return str(getattr(value, "dtype", "")).removeprefix("torch.")
