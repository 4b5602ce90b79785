"""Moments of the values of a program, and how the moments of several programs merge."""

from __future__ import annotations

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device.tiles import SEGMENTS, members_of, to_columns

__all__ = [
    "are_finite",
    "centred",
    "merged",
    "moments_by_channel",
    "moments_of_parts",
    "sums_of_parts",
]

NARROWING = tl.constexpr(2.0**-96)
"""A unit in which the squares of all float32 values are finite."""


@triton.jit
def merged(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Return the count, mean and sum of squared deviations of two sets of values (Chan et al. 1983, equation 2.1)."""
    count = count_a + count_b
    share = tl.where(count > 0, count_b / tl.where(count > 0, count, 1.0), 0.0)
    difference = mean_b - mean_a
    return count, mean_a + difference * share, m2_a + m2_b + difference * difference * count_a * share


@triton.jit
def centred(x, unit, pivot, form: tl.constexpr):
    """Return x*unit - pivot in float32; `unit` is a power of two, and `pivot` of shape (lanes,) is in this unit."""
    return x.to(tl.float32) * unit - to_columns(pivot, form)


@triton.jit
def moments_by_channel(count, mean, m2, form: tl.constexpr):
    """Merge the moments of lanes to those of channels, shape (lanes,), in a fixed order."""
    count, mean, m2 = tl.reduce((count, mean, m2), 0, merged)
    if form.layout == SEGMENTS:
        member = members_of(form)
        of_channels = (
            tl.where(member, count[:, None], 0.0),
            tl.where(member, mean[:, None], 0.0),
            tl.where(member, m2[:, None], 0.0),
        )
        count, mean, m2 = tl.reduce(of_channels, 0, merged)
    return count, mean, m2


@triton.jit
def are_finite(mean, m2, exists):
    """Return 1 if the moments of all channels that exist are finite, else 0."""
    total = mean + m2
    return tl.min((total - total == 0).to(tl.int32) | (exists == 0).to(tl.int32), 0)


@triton.jit
def moments_of_parts(parts, number, channel, exists, channels, form: tl.constexpr):
    """Merge the parts of the given channels in a fixed order. Return count, mean and m2, shape (lanes,), float64.

    `parts` has the shape (3, number, channels).
    """
    count = tl.full((form.at_once, form.lanes), 0.0, tl.float64)
    mean = tl.full((form.at_once, form.lanes), 0.0, tl.float64)
    m2 = tl.full((form.at_once, form.lanes), 0.0, tl.float64)
    plane = tl.full((), number, tl.int64) * channels
    for first in range(0, number, form.at_once):
        part = first + tl.arange(0, form.at_once)[:, None]
        at = parts + part.to(tl.int64) * channels + channel[None, :]
        inside = (part < number) & exists[None, :]
        # Other programs may have written the parts during this launch: the first-level cache would not know.
        count_of_part = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        mean_of_part = tl.load(at + plane, mask=inside, other=0.0, cache_modifier=".cg")
        m2_of_part = tl.load(at + 2 * plane, mask=inside, other=0.0, cache_modifier=".cg")
        count, mean, m2 = merged(count, mean, m2, count_of_part, mean_of_part, m2_of_part)
    return tl.reduce((count, mean, m2), 0, merged)


@triton.jit
def sums_of_parts(parts, quantity: tl.constexpr, number, channel, exists, channels, form: tl.constexpr):
    """Return the sum of one quantity over the parts of the given channels, shape (lanes,), float64."""
    total = tl.full((form.at_once, form.lanes), 0.0, tl.float64)
    start = parts + tl.full((), quantity, tl.int64) * number * channels
    for first in range(0, number, form.at_once):
        part = first + tl.arange(0, form.at_once)[:, None]
        at = start + part.to(tl.int64) * channels + channel[None, :]
        total += tl.load(at, mask=(part < number) & exists[None, :], other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)
