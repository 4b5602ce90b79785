"""Where the values of a tile lie."""

import pytest
import torch
from tests import oracle
from torch.testing import assert_close

pytest.importorskip("triton")

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device import tiles
from bnlab.kernels.backends.triton.geometry import geometry_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")

SHAPES = [
    ((2, 2, 8, 9), "contiguous"),  # planes of whole vectors
    ((1, 2, 17, 17), "contiguous"),  # odd planes
    ((3, 9, 7, 7), "contiguous"),  # segments in two groups
    ((2, 3, 7), "contiguous"),
    ((3, 9, 2, 3), "channels_last"),
    ((5, 40), "contiguous"),
]


@triton.jit
def _survey(x, visits, positions, owners, sums, rows, channels, form: tl.constexpr):
    """Visit all rows of a group; store the position and channel of every value, and the sums of the channels."""
    group = tl.program_id(0)
    channel, exists = tiles.channels_of(group, channels, form)
    total = tiles.zero_lanes(form)
    for first in range(0, rows, form.height):
        value, offset, inside = tiles.load_tile(x, first, rows, group, channels, form)
        row = tiles.rows_of(first, form)
        position = tiles.position_of(row, form)
        tl.store(visits + offset, tl.load(visits + offset, mask=inside, other=0) + 1, mask=inside)
        tl.store(positions + offset, position, mask=inside)
        tl.store(owners + offset, tiles.to_columns(channel, form) + offset * 0, mask=inside)
        total += tiles.to_lanes(value, form)
    tl.store(sums + channel, tiles.sum_by_channel(total, form), mask=exists)


@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=str)
def test_every_value_is_in_one_tile_with_its_channel_and_position(shape, layout):
    x = oracle.LAYOUTS[layout](torch.randint(-8, 9, shape).float())
    geometry = geometry_of(x, 64)
    form = geometry.form(64, 1, 8)
    visits, positions, owners = (torch.zeros_like(x, dtype=dtype) for dtype in (torch.int32, torch.int64, torch.int32))
    sums = torch.zeros(shape[1])
    _survey[(geometry.groups,)](x, visits, positions, owners, sums, geometry.rows, shape[1], form)
    assert bool((visits == 1).all())
    expected = torch.arange(x[:, 0].numel()).view(shape[0], 1, *shape[2:]).expand(shape)
    assert_close(positions, expected, check_stride=False)
    view = (1, -1, *[1] * (len(shape) - 2))
    assert_close(owners, torch.arange(shape[1], dtype=torch.int32).view(view).expand(shape), check_stride=False)
    assert_close(sums, x.sum([0, *range(2, len(shape))]), rtol=0, atol=0)


@triton.jit
def _hide(x, y, form: tl.constexpr):
    at = tl.arange(0, 8)
    tl.store(y + at, tiles.hidden(tl.load(x + at), form))


def test_what_is_hidden_is_the_same():
    x, y = torch.randn(8), torch.zeros(8)
    _hide[(1,)](x, y, geometry_of(x.view(8, 1)).form(8, 1, 8))
    assert_close(x, y, rtol=0, atol=0)
