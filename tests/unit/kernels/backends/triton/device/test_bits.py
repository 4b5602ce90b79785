"""One bit per element goes to memory and comes back."""

import pytest
import torch
from tests import oracle
from torch.testing import assert_close

pytest.importorskip("triton")

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device.bits import load_bits, store_bits
from bnlab.kernels.backends.triton.device.tiles import load_tile
from bnlab.kernels.backends.triton.geometry import geometry_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")


@triton.jit
def _keep(x, bits, rows, channels, form: tl.constexpr):
    group = tl.program_id(0)
    for first in range(0, rows, form.height):
        value, _, _ = load_tile(x, first, rows, group, channels, form)
        store_bits(bits, value > 0, first, rows, group, channels, form)


@triton.jit
def _recall(x, bits, y, rows, channels, form: tl.constexpr):
    group = tl.program_id(0)
    for first in range(0, rows, form.height):
        _, offset, inside = load_tile(x, first, rows, group, channels, form)
        tl.store(y + offset, load_bits(bits, first, rows, group, channels, form), mask=inside)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 2, 8, 9), "contiguous"),
        ((1, 2, 17, 17), "contiguous"),
        ((3, 9, 7, 7), "contiguous"),
        ((3, 9, 2, 3), "channels_last"),
        ((5, 40), "contiguous"),
    ],
    ids=str,
)
def test_bits_come_back_and_stay_in_their_bytes(shape, layout):
    x = oracle.LAYOUTS[layout](torch.randn(shape))
    geometry = geometry_of(x, 64)
    size, y = geometry.bytes_for_bits, torch.zeros_like(x, dtype=torch.bool)
    bits = torch.full((size + 8,), 77, dtype=torch.uint8)
    _keep[(geometry.groups,)](x, bits, geometry.rows, shape[1], geometry.form(64, 1, 8))
    assert_close(bits[size:], torch.full((8,), 77, dtype=torch.uint8))
    # Another form of the tile reads the same bits.
    _recall[(geometry.groups,)](x, bits, y, geometry.rows, shape[1], geometry.form(16, 1, 8))
    assert_close(y, x > 0)
    assert size * 8 >= x.numel()
