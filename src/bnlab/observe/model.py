"""Reads BN evidence from a live model: the numbers of its checkpoint, and the momentum and eps of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from bnlab.observe.evidence import Evidence, Floats, Hyperparameters, LayerState, NetworkState
from bnlab.observe.files.tensors import coarser
from bnlab.observe.programs.graph_layers import INSTANCE_NORM

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
    layers: list[LayerState] = []
    left_alone: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        if not hasattr(module, "running_mean") or not hasattr(module, "running_var"):
            continue
        reason = _unreadable(module)
        if reason is None:
            layers.append(_layer(name, module, hyperparameters))
        else:
            left_alone.append((name, reason))
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
    reasons = [*evidence.left_alone, *left_alone]
    for name, module in stored.items():
        reason = _unreadable(module)
        if reason is None:
            own.append(_layer(name, module, hyperparameters))
        else:
            reasons.append((name, reason))
    return Evidence((NetworkState("", tuple(own)),) if own else (), tuple(reasons))


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


def _layer(name: str, module: nn.Module, known: Hyperparameters) -> LayerState:
    counter = getattr(module, "num_batches_tracked", None)
    weight = getattr(module, "weight", None)
    own = {key: getattr(module, key) for key in ("momentum", "eps") if hasattr(module, key)}
    return LayerState(
        name=name,
        running_mean=_float64(module.running_mean),
        running_var=_float64(module.running_var),
        weight=_float64(weight) if _is_values(weight) else None,
        bias=_float64(module.bias) if _is_values(getattr(module, "bias", None)) else None,
        num_batches_tracked=int(counter) if _is_values(counter) and counter.numel() == 1 else None,
        dtype=coarser(_dtype(module.running_mean), _dtype(module.running_var)),
        affine_dtype=_dtype(weight if _is_values(weight) else module.running_var),
        hyperparameters=known.stating(**own),
    )


def _float64(value: object) -> Floats:
    assert isinstance(value, torch.Tensor)  # checked by _unreadable
    gather: Callable[[], torch.Tensor] = getattr(value, "full_tensor", lambda: value)  # a DTensor holds a part of it
    values: Floats = gather().detach().to("cpu", torch.float64).numpy().copy()
    return values


def _dtype(value: object) -> str:
    return str(getattr(value, "dtype", "")).removeprefix("torch.")
