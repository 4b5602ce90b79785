"""Normalise, add a residual, activate: the second pass of the forward direction, and both passes in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device.barrier import is_last, leave, wait_for_team
from bnlab.kernels.backends.triton.device.bits import store_bits
from bnlab.kernels.backends.triton.device.moments import moments_of_parts
from bnlab.kernels.backends.triton.device.running import count_batch, move_channels, move_everything
from bnlab.kernels.backends.triton.device.statistics import load_tiles, moments_of_tiles, store_part
from bnlab.kernels.backends.triton.device.tiles import (
    all_to_columns,
    channels_of,
    hidden,
    load_tile,
    place,
    rows_of,
)
from bnlab.kernels.backends.triton.device.transform import activated, folded, from_parts, parameter, passes

__all__ = ["normalise_kernel", "train_kernel"]

_BLOCK = tl.constexpr(128)


@triton.jit
def _columns_of(mean, var, weight, bias, channel, exists, eps, form: tl.constexpr):
    """Return unit, pivot, scale and shift for the columns of a tile."""
    weights = parameter(weight, channel, exists, 1.0)
    biases = parameter(bias, channel, exists, 0.0)
    unit, pivot, scale, shift, _ = folded(mean, var, weights, biases, eps)
    return all_to_columns(unit, pivot, scale, shift, form)


@triton.jit
def _transform_tile(
    value,
    offset,
    inside,
    residual,
    y,
    bits,
    first,
    end,
    group,
    channels,
    unit,
    pivot,
    scale,
    shift,
    slope,
    form: tl.constexpr,
    activation: tl.constexpr,
):
    """Store act((value*unit - pivot)*scale + shift + residual), and one bit for each value that passes."""
    result = (value.to(tl.float32) * unit - pivot) * scale + shift
    if residual is not None:
        result += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    if bits is not None:
        store_bits(bits, passes(result), first, end, group, channels, form)
    tl.store(y + offset, activated(result, activation, slope).to(value.dtype), mask=inside)


@triton.jit
def _are_all_finite(notes, number):
    """Return 1 if the moments of every program are finite, else 0."""
    finite = tl.full((), 1, tl.int32)
    for first in range(0, number, _BLOCK):
        index = first + tl.arange(0, _BLOCK)
        finite = tl.minimum(finite, tl.min(tl.load(notes + index, mask=index < number, other=1.0).to(tl.int32), 0))
    return finite


@triton.jit
def normalise_kernel(
    x,
    residual,
    y,
    bits,
    parts,
    notes,
    fixed_mean,
    fixed_var,
    moments,
    weight,
    bias,
    running_mean,
    running_var,
    batches,
    skipped,
    rows,
    channels,
    chunk,
    number,
    number_of_parts,
    number_of_notes,
    eps_high,
    eps_low,
    momentum_high,
    momentum_low,
    slope,
    form: tl.constexpr,
    activation: tl.constexpr,
    skips: tl.constexpr,
):
    """Normalise `chunk` rows of one group with the moments of parts, or with fixed statistics where there are no parts.

    The first program of a group stores the moments and moves the running statistics of its channels.
    """
    program = tl.program_id(0)
    group = program // number
    index = program - group * number
    channel, exists = channels_of(group, channels, form)
    if parts is not None:
        count, mean, m2 = moments_of_parts(parts, number_of_parts, channel, exists, channels, form)
        var = m2 / tl.where(count > 0, count, 1.0)
    else:
        mean = tl.load(fixed_mean + channel, mask=exists, other=0.0).to(tl.float64)
        var = tl.load(fixed_var + channel, mask=exists, other=1.0).to(tl.float64)
    if index == 0:
        if moments is not None:
            tl.store(moments + channel, mean, mask=exists)
            tl.store(moments + channels + channel, var, mask=exists)
        if parts is not None and running_mean is not None:
            is_used = tl.full((), 1, tl.int32)
            if skips:
                is_used = _are_all_finite(notes, number_of_notes)
            move_channels(
                channel,
                exists & (is_used > 0),
                mean,
                var,
                count,
                tl.load(notes + number_of_notes),
                running_mean,
                running_var,
                momentum_high,
                momentum_low,
            )
            if group == 0:
                count_batch(is_used, batches, skipped)
    unit, pivot, scale, shift = _columns_of(
        mean, var, weight, bias, channel, exists, from_parts(eps_high, eps_low), form
    )
    start = index * chunk
    end = tl.minimum(start + chunk, rows)
    for block in range(start, end, form.height * form.tiles):
        tiles_at_once: tl.constexpr = form.tiles
        for tile in tl.static_range(tiles_at_once):
            first = block + tile * form.height
            value, offset, inside = load_tile(x, first, end, group, channels, form)
            _transform_tile(
                value,
                offset,
                inside,
                residual,
                y,
                bits,
                first,
                end,
                group,
                channels,
                unit,
                pivot,
                scale,
                shift,
                slope,
                form,
                activation,
            )


@triton.jit(do_not_specialize=["groups", "number", "teams", "count"])
def train_kernel(
    x,
    residual,
    y,
    bits,
    parts,
    counters,
    moments,
    weight,
    bias,
    running_mean,
    running_var,
    batches,
    skipped,
    rows,
    channels,
    groups,
    number,
    teams,
    count,
    eps_high,
    eps_low,
    momentum_high,
    momentum_low,
    slope,
    form: tl.constexpr,
    activation: tl.constexpr,
    skips: tl.constexpr,
    alone: tl.constexpr,
):
    """Normalise with batch statistics in one launch: the tiles of a program stay in registers between the passes.

    A team of `number` programs does a group of channels at a time. All programs must be resident: launch this kernel
    cooperatively, or with `alone`, where a program is a team. `counters`, int32, is 0 before and after: two counters a
    team, and one for all groups. `count` is the number of values per channel.
    """
    tiles_at_once: tl.constexpr = form.tiles
    program = tl.program_id(0)
    team = program // number
    index = program - team * number
    meeting = 0
    for group in range(team, groups, teams):
        start = hidden(index, form) * (form.height * form.tiles)
        end = tl.minimum(start + form.height * form.tiles, rows)
        channel, exists = channels_of(group, channels, form)
        tiles = load_tiles(x, start, end, group, channels, tiles_at_once, form)
        values, mean, m2 = moments_of_tiles(x, tiles, start, end, group, channels, form)
        if not alone:
            store_part(parts, index, number, channel, exists, channels, values, mean, m2)
            wait_for_team(counters + 2 * team, number, meeting)
            values, mean, m2 = moments_of_parts(parts, number, channel, exists, channels, form)
        var = m2 / tl.where(values > 0, values, 1.0)
        if index == 0:
            tl.store(moments + channel, mean, mask=exists)
            tl.store(moments + channels + channel, var, mask=exists)
        unit, pivot, scale, shift = _columns_of(
            mean, var, weight, bias, channel, exists, from_parts(eps_high, eps_low), form
        )
        for tile in tl.static_range(tiles_at_once):
            first = start + tile * form.height
            row = rows_of(first, form)
            offset, column_exists = place(row, group, channels, form)
            _transform_tile(
                hidden(tiles[tile], form),
                offset,
                column_exists & (row < end),
                residual,
                y,
                bits,
                first,
                end,
                group,
                channels,
                unit,
                pivot,
                scale,
                shift,
                slope,
                form,
                activation,
            )
        if running_mean is not None:
            if index == 0:  # last, where no tile is in registers any more
                if is_last(counters + 2 * teams, groups):
                    move_everything(
                        moments,
                        channels,
                        tl.full((), count, tl.float64),
                        running_mean,
                        running_var,
                        batches,
                        skipped,
                        momentum_high,
                        momentum_low,
                        skips,
                    )
        meeting += 1
    if not alone:
        leave(counters + 2 * team, counters + 2 * team + 1, number)
