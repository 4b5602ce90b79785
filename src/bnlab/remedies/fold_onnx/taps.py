"""Computes convolutions tap by tap, one matrix product for each position of the kernel.

The memory does not grow with dilation or padding: it is that of a sample, of its output, and of one tap of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["convolve", "convolve_transposed"]

Array = NDArray[Any]
_Slices = tuple[slice, ...]
_Tap = tuple[tuple[int, ...], _Slices, _Slices]
"""The position of a tap in the kernel, and the slices of the two sides that it connects."""


def convolve(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    auto_pad: str | None = None,
    dilations: Sequence[int] | None = None,
    group: int | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Array:
    """Return the output of an ONNX Conv node, in the dtype of the input.

    Source:
        https://onnx.ai/onnx/operators/onnx__Conv.html

    Args:
        x: Shape (N, C, *spatial).
        weight: Shape (C_out, C/group, *kernel).
        bias: Shape (C_out,) or None.
        auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
        dilations: Distance of two taps along each spatial axis.
        group: Number of groups.
        pads: Zeros before and after each spatial axis: all that come before, then all that come after.
        strides: Distance of two outputs along each spatial axis.

    Returns:
        Shape (N, C_out, *positions). Products are summed in float32, or in float64 for a float64 input.

    Raises:
        ValueError: If the shapes and attributes do not fit together.
    """
    rank, groups = weight.ndim - 2, group or 1
    kernel, steps, gaps = weight.shape[2:], [*(strides or [1] * rank)], [*(dilations or [1] * rank)]
    _require_fit(x, weight.shape[1] * groups, rank, (steps, gaps))
    spans = [(side - 1) * gap + 1 for side, gap in zip(kernel, gaps, strict=True)]
    ends = _ends(x.shape[2:], spans, steps, auto_pad, pads)
    sides = [
        (side + before + after - span) // step + 1
        for side, span, step, (before, after) in zip(x.shape[2:], spans, steps, ends, strict=True)
    ]
    if min(sides, default=1) < 1:
        raise ValueError(f"an input of shape {x.shape} must be as large as the kernel, which spans {spans}")
    by_group = weight.reshape(groups, -1, weight.shape[1], *kernel)
    return _summed(
        x,
        by_group,
        bias,
        sides,
        lambda: (
            (tap, window, places) for tap, places, window in _windows(kernel, sides, x.shape[2:], steps, gaps, ends)
        ),
    )


def convolve_transposed(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    auto_pad: str | None = None,
    dilations: Sequence[int] | None = None,
    group: int | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Array:
    """Return the output of an ONNX ConvTranspose node, in the dtype of the input.

    Source:
        https://onnx.ai/onnx/operators/onnx__ConvTranspose.html

    Args:
        x: Shape (N, C, *spatial).
        weight: Shape (C, C_out/group, *kernel).
        bias: Shape (C_out,) or None.
        auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
        dilations: Distance of two taps along each spatial axis.
        group: Number of groups.
        output_padding: Positions that are added after each spatial axis.
        output_shape: Size of each spatial axis of the output, from which the pads follow.
        pads: Positions that are cut off before and after each spatial axis.
        strides: Distance of two inputs in the output.

    Raises:
        ValueError: If the shapes and attributes do not fit together.
    """
    rank, groups = weight.ndim - 2, group or 1
    kernel, steps, gaps = weight.shape[2:], [*(strides or [1] * rank)], [*(dilations or [1] * rank)]
    added = [*(output_padding or [0] * rank)]
    _require_fit(x, weight.shape[0], rank, (steps, gaps, added))
    whole = [
        (side - 1) * step + (width - 1) * gap + 1 + more
        for side, step, width, gap, more in zip(x.shape[2:], steps, kernel, gaps, added, strict=True)
    ]
    cuts = _cuts(x.shape[2:], whole, steps, auto_pad, pads, output_shape)
    sides = [side - before - after for side, (before, after) in zip(whole, cuts, strict=True)]
    if min(sides, default=1) < 1:
        raise ValueError(f"an output must have positive sizes, got {sides}")
    by_group = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
    return _summed(x, by_group, bias, sides, lambda: _windows(kernel, x.shape[2:], sides, steps, gaps, cuts))


def _summed(
    x: Array, weight: Array, bias: Array | None, sides: Sequence[int], taps: Callable[[], Iterator[_Tap]]
) -> Array:
    """Return the sum of the products of all taps, sample by sample.

    Args:
        x: Shape (N, groups * C_in, *spatial).
        weight: Shape (groups, C_out, C_in, *kernel).
        bias: Shape (groups * C_out,) or None.
        sides: The spatial shape of the output.
        taps: Returns the taps, each with the window of the input that it reads and the places that it adds to.
    """
    groups, outputs, inputs = weight.shape[:3]
    wide = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    weights = np.moveaxis(weight.astype(wide), (0, 1, 2), (-3, -2, -1))
    out = np.empty((len(x), groups * outputs, *sides), dtype=x.dtype)
    for sample, result in zip(x, out, strict=True):
        values = sample.astype(wide).reshape(groups, inputs, *x.shape[2:])
        total = np.zeros((groups, outputs, *sides), dtype=wide)
        for tap, window, places in taps():
            part = values[(slice(None), slice(None), *window)]
            product = _product(weights[tap], part.reshape(*part.shape[:2], -1))
            total[(slice(None), slice(None), *places)] += product.reshape(*product.shape[:2], *part.shape[2:])
        result[...] = _with_bias(total.reshape(groups * outputs, *sides), bias)
    return out


def _require_fit(x: Array, channels: int, rank: int, attributes: Sequence[Sequence[int]]) -> None:
    if x.ndim != rank + 2 or x.shape[1] != channels or any(len(values) != rank for values in attributes):
        raise ValueError(f"an input of shape {x.shape} must fit a kernel of {rank} dimensions and {channels} channels")


def _windows(
    kernel: Sequence[int],
    counts: Sequence[int],
    limits: Sequence[int],
    steps: Sequence[int],
    gaps: Sequence[int],
    ends: Sequence[tuple[int, int]],
) -> Iterator[_Tap]:
    """Yield every tap of a kernel, with n and n*step + tap*gap - before along each axis, as far as both lie inside.

    Args:
        kernel: The sides of the kernel.
        counts: How many n each axis has: the outputs of a convolution, the inputs of a transposed one.
        limits: The size of each axis of the other side.
        steps: The strides.
        gaps: The dilations.
        ends: What comes before and after each axis.
    """
    axes = list(zip(counts, limits, steps, gaps, ends, strict=True))
    for tap in itertools.product(*map(range, kernel)):
        ranges = [
            _inside(count, limit, step, index * gap - before)
            for index, (count, limit, step, gap, (before, _)) in zip(tap, axes, strict=True)
        ]
        if all(first < last for first, last, _, _ in ranges):
            yield (
                tap,
                tuple(slice(first, last) for first, last, _, _ in ranges),
                tuple(
                    slice(first * step + offset, (last - 1) * step + offset + 1, step)
                    for first, last, step, offset in ranges
                ),
            )


def _inside(count: int, limit: int, step: int, offset: int) -> tuple[int, int, int, int]:
    """Return the range of n below count for which n*step + offset lies in [0, limit), with step and offset."""
    first = max(0, -(offset // step))
    last = min(count, (limit - 1 - offset) // step + 1)
    return first, last, step, offset


def _product(weight: Array, values: Array) -> Array:
    """Return weight @ values for each group: (groups, out, in) and (groups, in, positions)."""
    product: Array = weight * values if weight.shape[2] == 1 else np.matmul(weight, np.ascontiguousarray(values))
    return product


def _with_bias(values: Array, bias: Array | None) -> Array:
    if bias is None:
        return values
    shifted: Array = values + bias.astype(values.dtype).reshape(-1, *([1] * (values.ndim - 1)))
    return shifted


def _ends(
    sides: Sequence[int], spans: Sequence[int], steps: Sequence[int], auto_pad: str | None, pads: Sequence[int] | None
) -> list[tuple[int, int]]:
    """Return the zeros before and after each spatial axis of a Conv."""
    rank = len(sides)
    if (auto_pad or "NOTSET") == "NOTSET" and pads:
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if (auto_pad or "NOTSET") in ("NOTSET", "VALID"):
        return [(0, 0)] * rank
    missing = [
        max(0, (-(-side // step) - 1) * step + span - side)
        for side, span, step in zip(sides, spans, steps, strict=True)
    ]
    return [_halves(count, more_after=auto_pad == "SAME_UPPER") for count in missing]


def _cuts(
    sides: Sequence[int],
    whole: Sequence[int],
    steps: Sequence[int],
    auto_pad: str | None,
    pads: Sequence[int] | None,
    output_shape: Sequence[int] | None,
) -> list[tuple[int, int]]:
    """Return how many positions a ConvTranspose cuts off before and after each spatial axis: below 0, it adds some."""
    rank, is_same = len(sides), (auto_pad or "NOTSET").startswith("SAME")
    if output_shape or is_same:
        wanted = output_shape or [side * step for side, step in zip(sides, steps, strict=True)]
        return [
            _halves(side - goal, more_after=auto_pad == "SAME_UPPER")
            for side, goal in zip(whole, wanted[-rank:], strict=True)
        ]
    if pads and auto_pad != "VALID":
        return list(zip(pads[:rank], pads[rank:], strict=True))
    return [(0, 0)] * rank


def _halves(count: int, *, more_after: bool) -> tuple[int, int]:
    if count < 0:
        return 0, count
    half = count // 2
    return (half, count - half) if more_after else (count - half, half)
