"""How a batch moves the running statistics and the counters, without a word to the host."""

from __future__ import annotations

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device.moments import are_finite
from bnlab.kernels.backends.triton.device.transform import from_parts

__all__ = ["count_batch", "divisor_of", "move_channels", "move_everything"]

_BLOCK = tl.constexpr(128)


@triton.jit
def divisor_of(batches):
    """Return the number of batches, this one included, in float64; 1 if nobody counts."""
    if batches is None:
        divisor = tl.full((), 1.0, tl.float64)
    else:
        divisor = (tl.load(batches) + 1).to(tl.float64)
    return divisor


@triton.jit
def _move(buffer, channel, exists, new, weight):
    """Store old + weight*(new - old). A finite value beyond the range of the buffer becomes its largest value."""
    before = tl.load(buffer + channel, mask=exists, other=0.0)
    old = before.to(tl.float64)
    value = old + weight * (new - old)
    if before.dtype == tl.float32:
        largest = tl.full(channel.shape, 3.4028234663852886e38, tl.float64)
        clamped = tl.minimum(tl.maximum(value, -largest), largest)
        value = tl.where(value - value == 0, clamped, value)
    tl.store(buffer + channel, value.to(before.dtype), mask=exists)


@triton.jit
def move_channels(channel, exists, mean, var, count, divisor, running_mean, running_var, momentum_high, momentum_low):
    """Move the running statistics of channels towards a mean and the unbiased variance.

    Args:
        channel: Shape (lanes,).
        exists: Whether each channel exists and its statistics may be updated.
        mean: Batch means, float64.
        var: Biased batch variances, float64.
        count: Values per channel, float64.
        divisor: The number of batches; 1/divisor is the weight of the new batch where momentum is below 0.
        running_mean: Buffer, float32 or float64.
        running_var: Buffer, float32 or float64.
        momentum_high: Momentum as two float32.
        momentum_low: The rest of it.
    """
    momentum = from_parts(momentum_high, momentum_low)
    weight = tl.where(momentum < 0, 1.0 / divisor, momentum)
    _move(running_mean, channel, exists, mean, weight)
    _move(running_var, channel, exists, var * (count / (count - 1.0)), weight)


@triton.jit
def count_batch(is_used, batches, skipped):
    """Count a batch that was used (1) or skipped (0)."""
    if batches is not None:
        tl.store(batches, tl.load(batches) + is_used.to(tl.int64))
    tl.store(skipped, tl.load(skipped) + (1 - is_used).to(tl.int64))


@triton.jit
def move_everything(
    moments,
    channels,
    count,
    running_mean,
    running_var,
    batches,
    skipped,
    momentum_high,
    momentum_low,
    skips: tl.constexpr,
):
    """Update the running statistics of all channels and the counters from `moments` of shape (2, channels)."""
    is_used = tl.full((), 1, tl.int32)
    if skips:
        for first in range(0, channels, _BLOCK):
            channel = first + tl.arange(0, _BLOCK)
            exists = channel < channels
            mean = tl.load(moments + channel, mask=exists, other=0.0, cache_modifier=".cg")
            var = tl.load(moments + channels + channel, mask=exists, other=0.0, cache_modifier=".cg")
            is_used = tl.minimum(is_used, are_finite(mean, var, exists))
    divisor = divisor_of(batches)
    for first in range(0, channels, _BLOCK):
        channel = first + tl.arange(0, _BLOCK)
        exists = channel < channels
        mean = tl.load(moments + channel, mask=exists, other=0.0, cache_modifier=".cg")
        var = tl.load(moments + channels + channel, mask=exists, other=0.0, cache_modifier=".cg")
        move_channels(
            channel,
            exists & (is_used > 0),
            mean,
            var,
            count,
            divisor,
            running_mean,
            running_var,
            momentum_high,
            momentum_low,
        )
    tl.debug_barrier()  # a warp may still have to read the counter from which the divisor comes
    count_batch(is_used, batches, skipped)
