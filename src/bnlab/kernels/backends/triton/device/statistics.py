"""The first pass of the forward direction: moments of parts of every channel."""

from __future__ import annotations

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device.moments import (
    NARROWING,
    are_finite,
    centred,
    merged,
    moments_by_channel,
    moments_of_parts,
)
from bnlab.kernels.backends.triton.device.running import divisor_of
from bnlab.kernels.backends.triton.device.tiles import (
    PLANES,
    channels_of,
    hidden,
    load_tile,
    place,
    position_of,
    rows_of,
    sum_by_channel,
    to_lanes,
    zero_lanes,
)

__all__ = ["load_tiles", "merge_kernel", "moments_of_tiles", "statistics_kernel", "store_part"]


@triton.jit
def load_tiles(x, first, end, group, channels, number: tl.constexpr, form: tl.constexpr):
    """Return `number` tiles that follow each other from row `first` on, as a tuple."""
    tiles = ()
    for index in tl.static_range(number):
        value, _, _ = load_tile(x, first + index * form.height, end, group, channels, form)
        tiles = tiles + (value,)  # type: ignore[assignment]
    return tiles


@triton.jit
def _weights_of_tile(weights, first, end, group, channels, form: tl.constexpr):
    """Return the weight of every value of a tile in the statistics: 0 where it does not exist. Broadcasts to the tile.

    Columns that do not exist count too, unless positions have weights: they belong to no channel, and hold zeros.
    """
    row = rows_of(first, form)
    if weights is not None:
        _, exists = place(row, group, channels, form)
        inside = exists & (row < end)
        weight = tl.load(weights + position_of(row, form), mask=inside, other=0.0)
    elif form.layout == PLANES and not form.even:
        _, exists = place(row, group, channels, form)
        weight = tl.where(exists & (row < end), 1.0, 0.0)
    else:
        weight = tl.where(row < end, 1.0, 0.0)
    return weight


@triton.jit
def _count_of_lanes(weight, form: tl.constexpr):
    """Return the sum of the weights of a tile in every lane."""
    if form.layout == PLANES and weight.shape[1] == 1:
        count = weight * form.width
    else:
        count = to_lanes(weight, form)
    return count


@triton.jit
def _sums_of_lanes(tiles, number: tl.constexpr, weights, first, end, group, channels, unit, pivot, form: tl.constexpr):
    """Return count, sum and sum of squares of every lane, relative to the pivot, over tiles from row `first` on."""
    count = zero_lanes(form)
    total = zero_lanes(form)
    squares = zero_lanes(form)
    for index in tl.static_range(number):
        weight = _weights_of_tile(weights, first + index * form.height, end, group, channels, form)
        deviation = tl.where(weight > 0, centred(hidden(tiles[index], form), unit, pivot, form), 0.0)
        weighted = deviation if weights is None else deviation * weight
        count += _count_of_lanes(weight, form)
        total += to_lanes(weighted, form)
        squares += to_lanes(weighted * deviation, form)
    return count, total, squares


@triton.jit
def _pivot_of(tiles, number: tl.constexpr, unit, first, end, group, channels, form: tl.constexpr):
    """Return the mean of every channel over `number` tiles in float32, a pivot near the data. Shape (lanes,)."""
    count = zero_lanes(form)
    total = zero_lanes(form)
    for index in tl.static_range(number):
        weight = _weights_of_tile(None, first + index * form.height, end, group, channels, form)
        count += _count_of_lanes(weight, form)
        total += to_lanes(tl.where(weight > 0, hidden(tiles[index], form).to(tl.float32) * unit, 0.0), form)
    counts = sum_by_channel(count, form)
    return sum_by_channel(total, form) / tl.where(counts > 0, counts, 1.0)


@triton.jit
def moments_of_tiles(x, tiles, start, end, group, channels, form: tl.constexpr):
    """Return the moments of the tiles that a program keeps.

    They are count, mean and m2 of every channel, shape (lanes,), float64. Where float32 overflows, they come from
    memory again.
    """
    number: tl.constexpr = form.tiles
    _, exists = channels_of(group, channels, form)
    unit = tl.full((), 1.0, tl.float32)
    pivot = _pivot_of(tiles, number, unit, start, end, group, channels, form)
    counts, totals, squares = _sums_of_lanes(tiles, number, None, start, end, group, channels, unit, pivot, form)
    count = sum_by_channel(counts, form)
    total = sum_by_channel(totals, form)
    mean = total / tl.where(count > 0, count, 1.0)  # nearly 0, so that the difference of squares does not cancel
    m2 = sum_by_channel(squares, form) - total * mean
    units = tl.full((form.lanes,), 1.0, tl.float32)
    if are_finite(mean, m2, exists) == 0:
        count, mean, m2, units, pivot = _narrowed(
            count, mean, m2, pivot, x, None, start, end, group, channels, unit * NARROWING, form
        )
    return _widened(count, mean, m2, units, pivot)


@triton.jit
def _narrowed(count, mean, m2, pivot, x, weights, start, end, group, channels, unit, form: tl.constexpr):
    """Read rows again in a narrow unit, for the channels whose moments are not finite: others would underflow in it.

    Returns:
        count, mean, m2, unit and pivot of every channel, shape (lanes,), float32.
    """
    total = mean + m2
    is_kept = total - total == 0
    counts, means, m2s, pivots = _moments_in_readings(x, weights, 2, start, end, group, channels, unit, 1, form)
    return (
        tl.where(is_kept, count, counts),
        tl.where(is_kept, mean, means),
        tl.where(is_kept, m2, m2s),
        tl.where(is_kept, 1.0, unit),
        tl.where(is_kept, pivot, pivots),
    )


@triton.jit
def _widened(count, mean, m2, unit, pivot):
    """Return moments in float64 and in the unit of the input. All arguments have the shape (lanes,)."""
    unit = unit.to(tl.float64)
    m2 = tl.where(m2 < 0, 0.0, m2)  # rounding may have left it below 0
    return count.to(tl.float64), (pivot.to(tl.float64) + mean.to(tl.float64)) / unit, m2.to(tl.float64) / (unit * unit)


@triton.jit
def _pass_over_rows(x, weights, start, end, group, channels, unit, pivot, number: tl.constexpr, form: tl.constexpr):
    count = zero_lanes(form)
    mean = zero_lanes(form)
    m2 = zero_lanes(form)
    for first in range(start, end, form.height * number):
        tiles = load_tiles(x, first, end, group, channels, number, form)
        counts, totals, squares = _sums_of_lanes(tiles, number, weights, first, end, group, channels, unit, pivot, form)
        means = totals / tl.where(counts > 0, counts, 1.0)
        # Far from the pivot, the difference may be off by the rounding of the squares, in either direction.
        count, mean, m2 = merged(count, mean, m2, counts, means, squares - totals * means)
    return moments_by_channel(count, mean, m2, form)


@triton.jit
def _moments_in_readings(
    x, weights, readings, start, end, group, channels, unit, number: tl.constexpr, form: tl.constexpr
):
    """Read rows more than once, first relative to 0, then relative to the mean of the reading before.

    Returns:
        count, mean and m2 of every channel in float32, in the unit and relative to the pivot; and that pivot.
    """
    zeros = tl.full((form.lanes,), 0.0, tl.float32)
    count, mean, m2, pivot = zeros, zeros, zeros, zeros
    for _ in range(readings):
        pivot += mean
        count, mean, m2 = _pass_over_rows(x, weights, start, end, group, channels, unit, pivot, number, form)
    return count, mean, m2, pivot


@triton.jit
def _moments_of_rows(x, weights, start, end, group, channels, form: tl.constexpr):
    """Return the moments of rows, which are read again where float32 overflows.

    The pivot is the mean of the first tile. Under weights that tile may have none, and where float32 overflows it says
    nothing: there a first reading with the pivot 0 finds the pivot of the second.
    """
    tiles_at_once: tl.constexpr = form.tiles
    _, exists = channels_of(group, channels, form)
    unit = tl.full((), 1.0, tl.float32)
    if weights is None:
        tile, _, _ = load_tile(x, start, end, group, channels, form)
        pivot = _pivot_of((tile,), 1, unit, start, end, group, channels, form)
        count, mean, m2 = _pass_over_rows(x, None, start, end, group, channels, unit, pivot, tiles_at_once, form)
    else:
        count, mean, m2, pivot = _moments_in_readings(
            x, weights, 2, start, end, group, channels, unit, tiles_at_once, form
        )
    units = tl.full((form.lanes,), 1.0, tl.float32)
    if are_finite(mean, m2, exists) == 0:
        count, mean, m2, units, pivot = _narrowed(
            count, mean, m2, pivot, x, weights, start, end, group, channels, unit * NARROWING, form
        )
    return _widened(count, mean, m2, units, pivot)


@triton.jit
def store_part(parts, index, number, channel, exists, channels, count, mean, m2):
    """Store the moments of one program as part `index` of `number`. `parts` has the shape (3, number, channels)."""
    at = parts + tl.full((), index, tl.int64) * channels + channel
    plane = tl.full((), number, tl.int64) * channels
    tl.store(at, count, mask=exists)
    tl.store(at + plane, mean, mask=exists)
    tl.store(at + 2 * plane, m2, mask=exists)


@triton.jit
def statistics_kernel(x, weights, parts, notes, batches, rows, channels, chunk, number, form: tl.constexpr):
    """Store the moments of `chunk` rows of one group of channels.

    Args:
        x: Values; any dtype that the kernels support.
        weights: Weight of every position, shape (N*S,), float32, or None.
        parts: Receives count, mean and m2, shape (3, number, channels), float64.
        notes: Receives 1 for every program whose moments are finite, and 0 otherwise; then the number of batches, this
            one included. Float64. None if the caller updates no running statistics.
        batches: The counter of batches, int64, or None.
        rows: Rows of a group.
        channels: C.
        chunk: Rows of a program.
        number: Programs of a group.
        form: The form of a tile.
    """
    program = tl.program_id(0)
    group = program // number
    index = program - group * number
    channel, exists = channels_of(group, channels, form)
    start = index * chunk
    end = tl.minimum(start + chunk, rows)
    count, mean, m2 = _moments_of_rows(x, weights, start, end, group, channels, form)
    store_part(parts, index, number, channel, exists, channels, count, mean, m2)
    if notes is not None:
        tl.store(notes + program, are_finite(mean, m2, exists).to(tl.float64))
        if program == 0:
            tl.store(notes + tl.num_programs(0), divisor_of(batches))


@triton.jit
def merge_kernel(parts, merged_parts, moments, total, channels, number, form: tl.constexpr):
    """Merge the parts of every channel.

    Args:
        parts: Shape (3, number, channels), float64.
        merged_parts: Receives count, mean and m2, shape (3, channels), float64, or None.
        moments: Receives the mean and the biased variance, shape (2, channels), float64, or None.
        total: Receives the sum of the weights of the values of a channel, float64, or None.
        channels: C.
        number: Parts of a channel.
        form: A form of `COLUMNS`, of which the lanes and `at_once` count.
    """
    channel, exists = channels_of(tl.program_id(0), channels, form)
    count, mean, m2 = moments_of_parts(parts, number, channel, exists, channels, form)
    if merged_parts is not None:
        store_part(merged_parts, 0, 1, channel, exists, channels, count, mean, m2)
    if moments is not None:
        tl.store(moments + channel, mean, mask=exists)
        tl.store(moments + channels + channel, m2 / tl.where(count > 0, count, 1.0), mask=exists)
    if total is not None:
        tl.store(total + channel * 0, count, mask=exists & (channel == 0))
