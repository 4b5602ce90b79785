"""BN as (x*unit - pivot)*scale + shift: coefficients in float64, arithmetic in float32."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["IDENTITY", "RELU", "activated", "folded", "from_parts", "parameter", "passes"]

IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)

_LARGE = tl.constexpr(1e18)
_STEEP = tl.constexpr(1e30)
_SMALLER = tl.constexpr(2.0**-64)
_LARGER = tl.constexpr(2.0**64)


@triton.jit
def from_parts(high, low):
    """Return a float64 that was passed as two float32, because Triton rounds floating-point arguments to float32."""
    return tl.full((), high, tl.float64) + tl.full((), low, tl.float64)


@triton.jit
def parameter(values, channel, exists, otherwise: tl.constexpr):
    """Return a parameter of the given channels in float64, or a constant if the layer has no such parameter."""
    if values is None:
        result = tl.full(channel.shape, otherwise, tl.float64)
    else:
        result = tl.load(values + channel, mask=exists, other=otherwise).to(tl.float64)
    return result


@triton.jit
def folded(mean, var, weight, bias, eps):
    """Fold statistics and parameters, float64, into the coefficients of y = (x*unit - pivot)*scale + shift.

    The pivot is the mean, rounded to float32: x - pivot is exact near the mean, and the shift contains the rounding
    error. The unit is 1, or a power of two if float32 would overflow otherwise.

    Returns:
        unit, pivot, scale and shift in float32, and 1/sqrt(var + eps) in float64; each of the shape of `mean`.
    """
    inv_std = 1.0 / tl.sqrt(var + eps)
    gain = weight * inv_std
    is_large = (tl.abs(mean) >= _LARGE) | (var >= 1e36)
    one = tl.full(mean.shape, 1.0, tl.float64)
    unit = tl.where(is_large, one * _SMALLER, tl.where(tl.abs(gain) >= _STEEP, one * _LARGER, one))
    pivot = (mean * unit).to(tl.float32)
    shift = bias - (mean - pivot.to(tl.float64) / unit) * gain
    return unit.to(tl.float32), pivot, (gain / unit).to(tl.float32), shift.to(tl.float32), inv_std


@triton.jit
def passes(y):
    """Whether an activation passes values on unchanged. It passes NaN."""
    return (y <= 0) == 0


@triton.jit
def activated(y, activation: tl.constexpr, slope):
    """Return act(y) in float32."""
    if activation == RELU:
        y = tl.where(passes(y), y, 0.0)
    elif activation != IDENTITY:
        y = tl.where(passes(y), y, y * slope)
    return y
