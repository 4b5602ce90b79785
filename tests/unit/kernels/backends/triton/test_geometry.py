"""How the kernels see a tensor, against a model in numpy of where `device.tiles.place` and `device.bits` look."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bnlab.kernels.backends.triton.geometry import COLUMNS, PLANES, SEGMENTS, geometry_of, merging_form

DTYPES = {2: torch.bfloat16, 4: torch.float32}


def empty(shape, channels_last=False, size=4):
    x = torch.empty(shape, dtype=DTYPES[size], device="meta")
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.to(memory_format=formats[len(shape)]) if channels_last else x


@pytest.mark.parametrize(
    ("shape", "channels_last", "layout"),
    [
        ((8, 5), False, COLUMNS),
        ((8, 5, 1), False, COLUMNS),
        ((8, 5, 1, 1), False, COLUMNS),
        ((2, 8, 4, 4), True, COLUMNS),
        ((2, 8, 4, 4, 4), True, COLUMNS),
        ((2, 8, 4, 4), False, SEGMENTS),
        ((2, 8, 7, 7), False, SEGMENTS),
        ((2, 8, 14, 14), False, SEGMENTS),  # 196 values are no whole vectors
        ((2, 8, 8, 8), False, PLANES),
        ((2, 8, 16, 16), False, PLANES),
        ((2, 8, 17, 17), False, PLANES),
        ((2, 1, 56, 56), False, PLANES),
    ],
)
def test_the_layout_of_a_tensor(shape, channels_last, layout):
    assert geometry_of(empty(shape, channels_last)).layout == layout


def test_a_tensor_that_is_in_both_layouts_counts_as_contiguous():
    x = empty((2, 1, 56, 56), channels_last=True)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert geometry_of(x).layout == PLANES


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 5, 5), (3, 4, 0), (3, 0, 5), (0, 0)])
def test_a_tensor_without_values_has_none(shape):
    geometry = geometry_of(empty(shape))
    assert (geometry.elements, geometry.channels) == (0, shape[1])


def places(geometry, form):
    """Return group, row, column and offset of every value that exists, as `device.tiles.place` computes them."""
    group, row, column = (
        axis.ravel() for axis in np.mgrid[: geometry.groups, : geometry.rows, : form.width].astype(np.int64)
    )
    channels, positions = geometry.channels, form.positions
    if form.layout == PLANES:
        vectors = -(-positions // 8)
        sample, vector = row // vectors, row % vectors
        inside = np.full(row.shape, True) if form.even else vector * 8 + column < positions
        offset = (sample * channels + group) * positions + vector * 8 + column
    elif form.layout == SEGMENTS:
        start = group * form.side * positions
        inside = (column < form.side * positions) & (start + column < channels * positions)
        offset = row * channels * positions + start + column
    else:
        inside = group * form.width + column < channels
        offset = row * channels + group * form.width + column
    return tuple(part[inside] for part in (group, row, column, offset))


def lanes_of(form, column):
    """Return the lane of the channel of a column, as `device.tiles.to_columns` has it."""
    return {PLANES: column * 0, SEGMENTS: column // max(form.positions, 1), COLUMNS: column}[form.layout]


def indices_in_memory(shape, channels_last):
    """Return the sample, channel and position of every value in the order in memory."""
    samples, channels, positions = shape[0], shape[1], math.prod(shape[2:])
    sample, channel, position = np.mgrid[:samples, :channels, :positions]
    return [(np.moveaxis(part, 1, 2) if channels_last else part).ravel() for part in (sample, channel, position)]


SIZES = st.integers(1, 20)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 80)),
    st.tuples(st.integers(1, 5), SIZES, st.integers(1, 400)),
    st.tuples(st.integers(1, 5), SIZES, SIZES, SIZES),
    st.tuples(st.integers(1, 3), SIZES, st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
)


@given(SHAPES, st.booleans(), st.sampled_from([2, 4]), st.sampled_from([128, 2048]))
@example((2, 9, 7, 7), False, 2, 2048)
@example((2, 3, 17, 17), False, 2, 2048)
@example((3, 65), False, 2, 2048)
def test_every_value_is_covered_once_by_its_own_channel(shape, channels_last, size, tile):
    channels_last = channels_last and len(shape) > 3 and not empty(shape, True).is_contiguous()
    geometry = geometry_of(empty(shape, channels_last, size), tile)
    form = geometry.form(tile, 2, tile // 2)
    group, row, column, offset = places(geometry, form)
    assert np.array_equal(np.sort(offset), np.arange(math.prod(shape)))
    sample, channel, position = indices_in_memory(shape, channels_last or len(shape) == 2)
    lane = lanes_of(form, column)
    assert np.array_equal(group * form.side + lane, channel[offset])
    assert (lane < min(form.side, form.lanes)).all()
    total = math.prod(shape[2:])
    where = {
        PLANES: lambda: row // -(-total // 8) * total + row % -(-total // 8) * 8 + column,
        SEGMENTS: lambda: row * total + column % total,
        COLUMNS: lambda: row,
    }[form.layout]()
    assert np.array_equal(where, sample[offset] * total + position[offset])
    if form.even:
        assert len(offset) == geometry.groups * geometry.rows * form.width


@given(SHAPES, st.booleans(), st.sampled_from([128, 2048]))
@example((3, 65, 1, 1), False, 2048)
def test_the_bits_have_a_byte_each_and_fit(shape, channels_last, tile):
    geometry = geometry_of(empty(shape, channels_last and len(shape) > 3), tile)
    form = geometry.form(tile, 2, tile // 2)
    group, row, column, offset = places(geometry, form)
    byte = column // 8
    if form.layout == PLANES:
        vectors = -(-form.positions // 8)
        at = (row // vectors * geometry.channels + group) * vectors + row % vectors + byte
    else:
        length = geometry.channels * (form.positions or 1)
        per_group = -(-form.side * form.positions // 8) if form.layout == SEGMENTS else form.width // 8
        at = row * -(-length // 8) + group * per_group + byte
    assert at.max() < geometry.bytes_for_bits
    assert len(np.unique(at * 8 + column % 8)) == len(offset)


@given(SHAPES, st.booleans(), st.sampled_from([128, 2048]), st.sampled_from([1, 2, 4]))
def test_the_sizes_of_a_tile_are_powers_of_two(shape, channels_last, tile, tiles):
    geometry = geometry_of(empty(shape, channels_last and len(shape) > 3), tile)
    form = geometry.form(tile, tiles, tile // 2)
    for size in (form.height, form.width, form.lanes, form.at_once):
        assert size > 0
        assert size & (size - 1) == 0
    assert form.width >= 8
    assert form.values <= max(tile, form.width)
    assert form.height < 2 * geometry.rows
    assert form.lanes >= form.side
    assert geometry.values_in_row <= form.width
    assert geometry.count == math.prod(shape) // shape[1]


@pytest.mark.parametrize("positions", range(2, 256))
def test_a_group_of_planes_starts_at_a_whole_vector(positions):
    geometry = geometry_of(empty((2, 64, positions)))
    if geometry.layout == SEGMENTS:
        assert geometry.side * positions % 8 == 0
        assert geometry.values_in_row <= geometry.width <= 2048


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("channels", [64, 256, 2048])
def test_a_row_of_many_channels_is_a_line_of_memory(size, channels):
    assert geometry_of(empty((2, channels, 4, 4), True, size)).width * size == 128


def test_merging_takes_eight_channels():
    form = merging_form()
    assert (form.layout, form.side, form.lanes, form.at_once) == (COLUMNS, 8, 8, 128)
