"""What a BN layer does in eval mode, as numbers: y = activation(scale*x + shift), or why it is not that."""

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

_USUAL_EPS = 1e-5
"""What frozen layers of detection libraries use where they have no attribute for it."""

_CLOSE = 1e-9
"""Largest error of the formula against the layer itself in float64: an eps that is off by 1 % shows."""


@dataclass(frozen=True)
class Folding:
    """A BN layer with fixed statistics.

    Attributes:
        scale: Shape (C,), float64.
        shift: Shape (C,), float64.
        activation: What the layer applies last; None if it is BN alone.
    """

    scale: Tensor
    shift: Tensor
    activation: nn.Module | None = None


def folding_of(layer: nn.Module, spatial: int) -> Folding:
    """Return the numbers of a layer from `any_batch_norm`.

    They come from its attributes, and a copy of the layer in float64 has to agree with them on inputs from far left to
    far right of its statistics: a class may use abs(weight), an eps of its own, or an activation.

    Args:
        layer: Stays as it is.
        spatial: Number of spatial dimensions it was called with.

    Raises:
        Refusal: If it has none, or they are not what it computes with.
    """
    mean, var, weight, bias = (_attribute(layer, name) for name in ("running_mean", "running_var", "weight", "bias"))
    if mean is None or var is None:
        raise Refusal("it has no running statistics: its output in eval mode depends on the batch")
    _require_sound(mean, var, weight, bias)
    eps: object = getattr(layer, "eps", _USUAL_EPS)
    if not isinstance(eps, (int, float)):
        raise Refusal(f"its eps is no number, but a {type(eps).__name__}")
    if bool((widened(var) + eps <= 0).any()):
        raise Refusal("running_var + eps is 0: its scale is infinite")
    scale, shift = scale_and_shift(mean, var, weight, bias, eps)
    return Folding(scale, shift, _activation(layer, _probe(mean, widened(var) + eps, spatial), scale, shift))


def _attribute(layer: nn.Module, name: str) -> Tensor | None:
    value: object = getattr(layer, name, None)
    return value.detach() if isinstance(value, Tensor) else None


def _require_sound(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    named = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != mean.shape:
            raise Refusal(f"its {name} has shape {tuple(tensor.shape)}, not {tuple(mean.shape)}")
        wrong = 0 if tensor is None else int((~tensor.isfinite()).sum())
        if wrong:
            advice = ": recalibrate it first" if name.startswith("running") else ""
            raise Refusal(f"{name} is not finite in {wrong} of {mean.numel()} channels{advice}")
    negative = int((var < 0).sum())
    if negative:
        raise Refusal(f"running_var is negative in {negative} of {var.numel()} channels: recalibrate it first")


def _probe(mean: Tensor, var: Tensor, spatial: int) -> Tensor:
    """Return inputs up to 1e4 standard deviations off, shape (K, C, *[2]*spatial), float64, on the CPU."""
    near = torch.linspace(-6, 6, 25, dtype=torch.float64)
    far = near.new_tensor([-1e4, -1e2, -20, 20, 1e2, 1e4])
    steps = torch.cat([near, far])[torch.randperm(31, generator=torch.Generator().manual_seed(0))]
    x = mean.cpu().double() + steps[:, None] * var.cpu().double().sqrt()
    return x.reshape(*x.shape, *[1] * spatial).repeat(1, 1, *[2] * spatial)


def _activation(layer: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> nn.Module | None:
    """Return the activation that makes the formula agree with the layer; None if it does without."""
    a, b = (per_channel(values.cpu().double(), x) for values in (scale, shift))
    bound = _CLOSE * (a.abs() * x.abs() + b.abs() + torch.finfo(torch.float64).tiny)
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
    raise Refusal(f"its output in eval mode is not scale*x + shift of its running statistics (eps {_shown_eps(layer)})")


def _candidates(layer: nn.Module, wide: nn.Module) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """Yield nothing, then the layer's own submodules, then what bnlab's layers can apply: for keeps, and in float64."""
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


def _shown_eps(layer: nn.Module) -> str:
    return f"{getattr(layer, 'eps', _USUAL_EPS):g}"
