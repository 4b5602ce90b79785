"""The gradients: sums over parts of every channel, then dx; or both in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device.barrier import leave, wait_for_team
from bnlab.kernels.backends.triton.device.bits import load_bits
from bnlab.kernels.backends.triton.device.moments import sums_of_parts
from bnlab.kernels.backends.triton.device.statistics import load_tiles
from bnlab.kernels.backends.triton.device.tiles import (
    all_to_columns,
    channels_of,
    hidden,
    load_tile,
    place,
    position_of,
    rows_of,
    sum_by_channel,
    to_columns,
    to_lanes,
    zero_lanes,
)
from bnlab.kernels.backends.triton.device.transform import IDENTITY, RELU, folded, from_parts, parameter, passes

__all__ = ["backward_kernel", "gradient_kernel", "gradient_sums_kernel", "merge_sums_kernel"]


@triton.jit
def _coefficients(moments, weight, bias, channel, exists, channels, eps_high, eps_low):
    """Return the coefficients of the forward pass, 1/sqrt(var + eps) and the mean, for every channel of a group."""
    means = tl.load(moments + channel, mask=exists, other=0.0)
    variances = tl.load(moments + channels + channel, mask=exists, other=1.0)
    weights = parameter(weight, channel, exists, 1.0)
    biases = parameter(bias, channel, exists, 0.0)
    unit, pivot, scale, shift, inv_std = folded(means, variances, weights, biases, from_parts(eps_high, eps_low))
    return unit, pivot, scale, shift, inv_std, means


@triton.jit
def _through_activation(
    dy,
    deviation,
    bits,
    first,
    end,
    group,
    channels,
    scale,
    shift,
    slope,
    form: tl.constexpr,
    activation: tl.constexpr,
):
    """Return the gradient before the activation, float32."""
    gradient = dy.to(tl.float32)
    if activation != IDENTITY:
        if bits is not None:
            passed = load_bits(bits, first, end, group, channels, form)
        else:
            passed = passes(deviation * scale + shift)
        gradient = tl.where(passed, gradient, 0.0 if activation == RELU else gradient * slope)
    return gradient


@triton.jit
def _sums_by_channel(gradient_sum, product_sum, form: tl.constexpr):
    return sum_by_channel(gradient_sum, form).to(tl.float64), sum_by_channel(product_sum, form).to(tl.float64)


@triton.jit
def _parameter_gradients(gradient_sum, product_sum, unit, pivot, mean, inv_std):
    """Return dgamma and dbeta, float64, from the sums of dy and dy*(x*unit - pivot)."""
    width = unit.to(tl.float64)
    rest = pivot.to(tl.float64) / width - mean
    return inv_std * (product_sum / width + rest * gradient_sum), gradient_sum


@triton.jit
def _folded_gradient(dgamma, dbeta, unit, pivot, scale, mean, inv_std, count, form: tl.constexpr):
    """Return scale, slope and shift of dx = dy*scale + (x*unit - pivot)*slope + shift for the columns of a tile."""
    width = unit.to(tl.float64)
    gain = scale.to(tl.float64) * width
    share = gain / tl.where(count > 0, count, 1.0)
    slope = -share * inv_std * dgamma
    shift = -share * dbeta - slope * (mean - pivot.to(tl.float64) / width)
    return (
        to_columns(gain.to(tl.float32), form),
        to_columns((slope / width).to(tl.float32), form),
        to_columns(shift.to(tl.float32), form),
    )


@triton.jit
def _store_parameter_gradients(dweight, dbias, channel, exists, dgamma, dbeta):
    if dweight is not None:
        tl.store(dweight + channel, dgamma.to(dweight.dtype.element_ty), mask=exists)
    if dbias is not None:
        tl.store(dbias + channel, dbeta.to(dbias.dtype.element_ty), mask=exists)


@triton.jit
def _store_sums(parts, index, number, channel, exists, channels, gradient_sum, product_sum):
    at = parts + tl.full((), index, tl.int64) * channels + channel
    tl.store(at, gradient_sum, mask=exists)
    tl.store(at + tl.full((), number, tl.int64) * channels, product_sum, mask=exists)


@triton.jit
def gradient_sums_kernel(
    dy,
    x,
    bits,
    weights,
    moments,
    weight,
    bias,
    parts,
    dx,
    dresidual,
    rows,
    channels,
    chunk,
    number,
    eps_high,
    eps_low,
    slope,
    form: tl.constexpr,
    activation: tl.constexpr,
):
    """Store the sums of dy and dy*(x*unit - pivot) over `chunk` rows of a group, and of the weights of positions.

    With fixed statistics dx needs no sums: if `dx` or `dresidual` is not None, this kernel stores it.

    Args:
        dy: Gradient of the output, in the layout of `x`.
        x: Input of the forward pass.
        bits: What the activation passed, or None to find out from `x`.
        weights: Weight of every position, shape (N*S,), float32, or None.
        moments: Mean and biased variance of the forward pass, shape (2, C), float64.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        parts: Receives the sums, shape (2, number, channels), or (3, number, channels) with weights, float64.
        dx: Receives the gradient of `x` under fixed statistics, or None.
        dresidual: Receives the gradient of the residual under fixed statistics, or None.
        rows: Rows of a group.
        channels: C.
        chunk: Rows of a program.
        number: Programs of a group.
        eps_high: eps as two float32.
        eps_low: The rest of it.
        slope: Slope of the leaky ReLU.
        form: The form of a tile.
        activation: The activation.
    """
    tiles_at_once: tl.constexpr = form.tiles
    program = tl.program_id(0)
    group = program // number
    index = program - group * number
    channel, exists = channels_of(group, channels, form)
    unit, pivot, scale, shift, _, _ = _coefficients(moments, weight, bias, channel, exists, channels, eps_high, eps_low)
    units, pivots, scales, shifts = all_to_columns(unit, pivot, scale, shift, form)
    gradient_sum = zero_lanes(form)
    product_sum = zero_lanes(form)
    weight_sum = zero_lanes(form)
    start = index * chunk
    end = tl.minimum(start + chunk, rows)
    for block in range(start, end, form.height * form.tiles):
        values = load_tiles(x, block, end, group, channels, tiles_at_once, form)
        gradients = load_tiles(dy, block, end, group, channels, tiles_at_once, form)
        for tile in tl.static_range(tiles_at_once):
            first = block + tile * form.height
            deviation = values[tile].to(tl.float32) * units - pivots
            gradient = _through_activation(
                gradients[tile],
                deviation,
                bits,
                first,
                end,
                group,
                channels,
                scales,
                shifts,
                slope,
                form,
                activation,
            )
            gradient_sum += to_lanes(gradient, form)
            row = rows_of(first, form)
            offset, column_exists = place(row, group, channels, form)
            inside = column_exists & (row < end)
            # Where a batch is not finite, the pivot is not either, and a product with an absent value would be NaN.
            product_sum += to_lanes(tl.where(inside, gradient * deviation, 0.0), form)
            if weights is not None:
                weight_sum += to_lanes(tl.load(weights + position_of(row, form), mask=inside, other=0.0), form)
            if dx is not None:
                # (x*unit - pivot)*scale has the derivative scale*unit.
                tl.store(dx + offset, (gradient * (scales * units)).to(values[tile].dtype), mask=inside)
            if dresidual is not None:
                tl.store(dresidual + offset, gradient.to(values[tile].dtype), mask=inside)
    gradient_part, product_part = _sums_by_channel(gradient_sum, product_sum, form)
    _store_sums(parts, index, number, channel, exists, channels, gradient_part, product_part)
    if weights is not None:
        at = parts + tl.full((), 2 * number + index, tl.int64) * channels + channel
        tl.store(at, sum_by_channel(weight_sum, form).to(tl.float64), mask=exists)


@triton.jit
def merge_sums_kernel(
    parts,
    merged_parts,
    moments,
    weight,
    bias,
    dweight,
    dbias,
    channels,
    number,
    eps_high,
    eps_low,
    quantities: tl.constexpr,
    form: tl.constexpr,
):
    """Add up the parts of every channel.

    Args:
        parts: Shape (quantities, number, channels), float64.
        merged_parts: Receives the sums, shape (quantities, channels), float64, or None.
        moments: Mean and biased variance of the forward pass, shape (2, C), float64.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        dweight: Receives dgamma, or None.
        dbias: Receives dbeta, or None.
        channels: C.
        number: Parts of a channel.
        eps_high: eps as two float32.
        eps_low: The rest of it.
        quantities: 2, or 3 with weights of positions.
        form: A form of `COLUMNS`, of which the lanes and `at_once` count.
    """
    channel, exists = channels_of(tl.program_id(0), channels, form)
    gradient_sum = sums_of_parts(parts, 0, number, channel, exists, channels, form)
    product_sum = sums_of_parts(parts, 1, number, channel, exists, channels, form)
    if merged_parts is not None:
        tl.store(merged_parts + channel, gradient_sum, mask=exists)
        tl.store(merged_parts + channels + channel, product_sum, mask=exists)
        if quantities == 3:
            total = sums_of_parts(parts, 2, number, channel, exists, channels, form)
            tl.store(merged_parts + 2 * channels + channel, total, mask=exists)
    if dweight is not None or dbias is not None:
        unit, pivot, _, _, inv_std, means = _coefficients(
            moments, weight, bias, channel, exists, channels, eps_high, eps_low
        )
        dgamma, dbeta = _parameter_gradients(gradient_sum, product_sum, unit, pivot, means, inv_std)
        _store_parameter_gradients(dweight, dbias, channel, exists, dgamma, dbeta)


@triton.jit
def _store_gradient_tile(
    gradient,
    deviation,
    offset,
    inside,
    weights,
    first,
    dx,
    dresidual,
    scale,
    slope,
    shift,
    form: tl.constexpr,
):
    """Store dx = dy*scale + w*((x*unit - pivot)*slope + shift), and the gradient of the residual."""
    if dx is not None:
        through_statistics = deviation * slope + shift
        if weights is not None:
            weight = tl.load(weights + position_of(rows_of(first, form), form), mask=inside, other=0.0)
            through_statistics = tl.where(weight > 0, weight * through_statistics, 0.0)
        tl.store(dx + offset, (gradient * scale + through_statistics).to(dx.dtype.element_ty), mask=inside)
    if dresidual is not None:
        tl.store(dresidual + offset, gradient.to(dresidual.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(
    dy,
    x,
    bits,
    weights,
    moments,
    weight,
    bias,
    parts,
    dx,
    dresidual,
    dweight,
    dbias,
    rows,
    channels,
    chunk,
    number,
    number_of_parts,
    count,
    eps_high,
    eps_low,
    slope,
    form: tl.constexpr,
    activation: tl.constexpr,
):
    """Store dx and the gradient of the residual for `chunk` rows of a group, from the sums of `gradient_sums_kernel`.

    `count` is the number of values per channel; with weights of positions the third sum takes its place. The first
    program of a group stores dgamma and dbeta.
    """
    program = tl.program_id(0)
    group = program // number
    index = program - group * number
    channel, exists = channels_of(group, channels, form)
    gradient_sum = sums_of_parts(parts, 0, number_of_parts, channel, exists, channels, form)
    product_sum = sums_of_parts(parts, 1, number_of_parts, channel, exists, channels, form)
    values_per_channel = tl.full((form.lanes,), count, tl.float64)
    if weights is not None:
        values_per_channel = sums_of_parts(parts, 2, number_of_parts, channel, exists, channels, form)
    unit, pivot, scale, shift, inv_std, means = _coefficients(
        moments, weight, bias, channel, exists, channels, eps_high, eps_low
    )
    dgamma, dbeta = _parameter_gradients(gradient_sum, product_sum, unit, pivot, means, inv_std)
    if index == 0:
        _store_parameter_gradients(dweight, dbias, channel, exists, dgamma, dbeta)
    gains, slopes, shifts = _folded_gradient(
        dgamma, dbeta, unit, pivot, scale, means, inv_std, values_per_channel, form
    )
    units, pivots, forward_scales, forward_shifts = all_to_columns(unit, pivot, scale, shift, form)
    start = index * chunk
    end = tl.minimum(start + chunk, rows)
    for block in range(start, end, form.height * form.tiles):
        tiles_at_once: tl.constexpr = form.tiles
        for tile in tl.static_range(tiles_at_once):
            first = block + tile * form.height
            value, offset, inside = load_tile(x, first, end, group, channels, form)
            incoming, _, _ = load_tile(dy, first, end, group, channels, form)
            deviation = value.to(tl.float32) * units - pivots
            gradient = _through_activation(
                incoming,
                deviation,
                bits,
                first,
                end,
                group,
                channels,
                forward_scales,
                forward_shifts,
                slope,
                form,
                activation,
            )
            _store_gradient_tile(
                gradient,
                deviation,
                offset,
                inside,
                weights,
                first,
                dx,
                dresidual,
                gains,
                slopes,
                shifts,
                form,
            )


@triton.jit(do_not_specialize=["groups", "number", "teams", "count"])
def backward_kernel(
    dy,
    x,
    bits,
    moments,
    weight,
    bias,
    parts,
    counters,
    dx,
    dresidual,
    dweight,
    dbias,
    rows,
    channels,
    groups,
    number,
    teams,
    count,
    eps_high,
    eps_low,
    slope,
    form: tl.constexpr,
    activation: tl.constexpr,
    alone: tl.constexpr,
):
    """Compute all gradients through batch statistics in one launch, in teams as `forward.train_kernel` does."""
    tiles_at_once: tl.constexpr = form.tiles
    program = tl.program_id(0)
    team = program // number
    index = program - team * number
    meeting = 0
    for group in range(team, groups, teams):
        start = hidden(index, form) * (form.height * form.tiles)
        end = tl.minimum(start + form.height * form.tiles, rows)
        channel, exists = channels_of(group, channels, form)
        values = load_tiles(x, start, end, group, channels, tiles_at_once, form)
        incoming = load_tiles(dy, start, end, group, channels, tiles_at_once, form)
        unit, pivot, scale, shift, inv_std, means = _coefficients(
            moments, weight, bias, channel, exists, channels, eps_high, eps_low
        )
        units, pivots, forward_scales, forward_shifts = all_to_columns(unit, pivot, scale, shift, form)
        gradient_lanes = zero_lanes(form)
        product_lanes = zero_lanes(form)
        for tile in tl.static_range(tiles_at_once):
            first = start + tile * form.height
            deviation = hidden(values[tile], form).to(tl.float32) * units - pivots
            gradient = _through_activation(
                hidden(incoming[tile], form),
                deviation,
                bits,
                first,
                end,
                group,
                channels,
                forward_scales,
                forward_shifts,
                slope,
                form,
                activation,
            )
            row = rows_of(first, form)
            _, column_exists = place(row, group, channels, form)
            gradient_lanes += to_lanes(gradient, form)
            product_lanes += to_lanes(tl.where(column_exists & (row < end), gradient * deviation, 0.0), form)
        gradient_sum, product_sum = _sums_by_channel(gradient_lanes, product_lanes, form)
        if not alone:
            _store_sums(parts, index, number, channel, exists, channels, gradient_sum, product_sum)
            wait_for_team(counters + 2 * team, number, meeting)
            gradient_sum = sums_of_parts(parts, 0, number, channel, exists, channels, form)
            product_sum = sums_of_parts(parts, 1, number, channel, exists, channels, form)
        dgamma, dbeta = _parameter_gradients(gradient_sum, product_sum, unit, pivot, means, inv_std)
        if index == 0:
            _store_parameter_gradients(dweight, dbias, channel, exists, dgamma, dbeta)
        # Coefficients that are read again keep the compiler from keeping what it computed from the first ones.
        unit, pivot, scale, shift, inv_std, means = _coefficients(
            moments, weight, bias, channel, exists, channels, eps_high, eps_low
        )
        units, pivots, forward_scales, forward_shifts = all_to_columns(unit, pivot, scale, shift, form)
        values_per_channel = tl.full((form.lanes,), count, tl.float64)
        gains, slopes, shifts = _folded_gradient(
            dgamma, dbeta, unit, pivot, scale, means, inv_std, values_per_channel, form
        )
        for tile in tl.static_range(tiles_at_once):
            first = start + tile * form.height
            row = rows_of(first, form)
            offset, column_exists = place(row, group, channels, form)
            deviation = hidden(values[tile], form).to(tl.float32) * units - pivots
            gradient = _through_activation(
                hidden(incoming[tile], form),
                deviation,
                bits,
                first,
                end,
                group,
                channels,
                forward_scales,
                forward_shifts,
                slope,
                form,
                activation,
            )
            _store_gradient_tile(
                gradient,
                deviation,
                offset,
                column_exists & (row < end),
                None,
                first,
                dx,
                dresidual,
                gains,
                slopes,
                shifts,
                form,
            )
        meeting += 1
    if not alone:
        leave(counters + 2 * team, counters + 2 * team + 1, number)
