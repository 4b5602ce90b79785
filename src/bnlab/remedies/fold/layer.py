"""Expresses a BN layer in eval mode as y = activation(scale*x + shift), or states why this is impossible."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnlab.functional.activations import ACTIVATIONS
from bnlab.functional.folding import scale_and_shift
from bnlab.functional.moments import per_channel, widened
from bnlab.remedies.refusal import Refusal

__all__ = ["Folding", "folding_of"]

_DEFAULT_EPS = 1e-5
"""The eps of frozen layers in detection libraries that have no attribute for it."""

_MAX_ERROR = 1e-9
"""Largest relative error of the formula against the layer in float64. An eps that is wrong by 1 % exceeds it."""


@dataclass(frozen=True)
class Folding:
    """A BN layer with fixed statistics, as a scale and a shift.

    Attributes:
        scale: Shape (C,), float64.
        shift: Shape (C,), float64.
        activation: The activation that the layer applies after BN, or None.
    """

    scale: Tensor
    shift: Tensor
    activation: nn.Module | None = None


def folding_of(layer: nn.Module, spatial: int) -> Folding:
    """Return the scale, the shift and the activation of a layer from `any_batch_norm`.

    They are computed from the attributes of the layer. A class may use abs(weight), another eps, or an activation, so a
    copy of the layer in float64 must give the same output, on inputs up to 1e6 standard deviations from its mean.

    Args:
        layer: The layer. It does not change.
        spatial: The number of spatial dimensions of its input.

    Raises:
        Refusal: If the layer has no such attributes, or computes its output from other numbers.
    """
    mean, var, weight, bias = (_attribute(layer, name) for name in ("running_mean", "running_var", "weight", "bias"))
    if mean is None or var is None:
        raise Refusal("it has no running statistics: its output in eval mode depends on the batch")
    _require_valid(mean, var, weight, bias)
    eps: object = getattr(layer, "eps", _DEFAULT_EPS)
    if not isinstance(eps, (int, float)):
        raise Refusal(f"its eps is not a number, but a {type(eps).__name__}")
    if bool((widened(var) + eps <= 0).any()):
        raise Refusal("running_var + eps is 0: its scale is infinite")
    scale, shift = scale_and_shift(mean, var, weight, bias, eps)
    return Folding(scale, shift, _activation(layer, _probe(mean, widened(var) + eps, spatial), scale, shift))


def _attribute(layer: nn.Module, name: str) -> Tensor | None:
    value: object = getattr(layer, name, None)
    return value.detach() if isinstance(value, Tensor) else None


def _require_valid(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    named = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != mean.shape:
            raise Refusal(f"its {name} has shape {tuple(tensor.shape)}, not {tuple(mean.shape)}")
        not_finite = 0 if tensor is None else int((~tensor.isfinite()).sum())
        if not_finite:
            advice = ": recalibrate it first" if name.startswith("running") else ""
            raise Refusal(f"{name} is not finite in {not_finite} of {mean.numel()} channels{advice}")
    negative = int((var < 0).sum())
    if negative:
        raise Refusal(f"running_var is negative in {negative} of {var.numel()} channels: recalibrate it first")


def _probe(mean: Tensor, var: Tensor, spatial: int) -> Tensor:
    """Return inputs up to 1e6 standard deviations from the mean. Shape (K, C, *[2]*spatial), float64, on the CPU."""
    near = torch.linspace(-6, 6, 25, dtype=torch.float64)
    far = near.new_tensor([-1e6, -1e4, -1e2, -20, 20, 1e2, 1e4, 1e6])
    steps = torch.cat([near, far])[torch.randperm(33, generator=torch.Generator().manual_seed(0))]
    x = mean.cpu().double() + steps[:, None] * var.cpu().double().sqrt()
    return x.reshape(*x.shape, *[1] * spatial).repeat(1, 1, *[2] * spatial)


def _activation(layer: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> nn.Module | None:
    """Return the activation with which the formula agrees with the layer, or None if it agrees without one."""
    a, b = (per_channel(values.cpu().double(), x) for values in (scale, shift))
    bound = _MAX_ERROR * (a.abs() * x.abs() + b.abs() + torch.finfo(torch.float64).tiny)
    try:
        wide = copy.deepcopy(layer).cpu().double().eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            y: object = wide(x.clone())
    except Exception as error:
        raise Refusal(f"it does not run in float64: {type(error).__name__}") from error
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise Refusal("its output has another shape than its input")
    for kept, function in _candidates(layer, wide):
        expected = _applied(function, a * x + b)
        if expected is not None and bool(((y - expected).abs() <= bound).all()):
            return kept
    raise Refusal(f"its output in eval mode is not scale*x + shift of its running statistics (eps {_eps_text(layer)})")


def _candidates(layer: nn.Module, wide: nn.Module) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """Yield each candidate for the activation, as the module to keep and in float64.

    The candidates are no activation, the submodules of the layer, and the activations of bnlab.
    """
    yield None, nn.Identity()
    for own, own_wide in zip(layer.modules(), wide.modules(), strict=True):
        if own is not layer:
            yield copy.deepcopy(own).eval(), own_wide
    for form in ACTIVATIONS.values():
        yield form.module(), form.module()


def _applied(function: nn.Module, x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            y: object = function(x.clone())
    except Exception:
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape else None


def _eps_text(layer: nn.Module) -> str:
    return f"{getattr(layer, 'eps', _DEFAULT_EPS):g}"
