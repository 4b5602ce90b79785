"""One bit per element: whether the activation passed it."""

from __future__ import annotations

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device.tiles import PLANES, SEGMENTS, rows_of

__all__ = ["load_bits", "store_bits"]


@triton.jit
def _place(row, group, channels, form: tl.constexpr):
    """Return the offsets of the bytes of rows, and whether each byte exists."""
    byte = tl.arange(0, form.width // 8)[None, :]
    if form.layout == PLANES:
        vectors = (form.positions + 7) // 8
        sample = row // vectors
        plane = sample.to(tl.int64) * channels + group
        offset = plane * vectors + (row - sample * vectors) + byte
        exists = (row >= 0) & (byte >= 0)
    elif form.layout == SEGMENTS:
        row_bytes = (channels * form.positions + 7) // 8
        group_bytes = (form.side * form.positions + 7) // 8
        column = group * group_bytes + byte
        offset = row.to(tl.int64) * row_bytes + column
        exists = (row >= 0) & (byte < group_bytes) & (column < row_bytes)
    else:
        row_bytes = (channels + 7) // 8
        column = group * (form.width // 8) + byte
        offset = row.to(tl.int64) * row_bytes + column
        exists = (row >= 0) & (column < row_bytes)
    return offset, exists


@triton.jit
def store_bits(bits, passed, first, end, group, channels, form: tl.constexpr):
    """Store whether each value of the tile that begins at row `first` passed."""
    row = rows_of(first, form)
    offset, exists = _place(row, group, channels, form)
    bit = tl.reshape(passed.to(tl.int32), (form.height, form.width // 8, 8)) << tl.arange(0, 8)[None, None, :]
    tl.store(bits + offset, tl.sum(bit, 2).to(tl.uint8), mask=exists & (row < end))


@triton.jit
def load_bits(bits, first, end, group, channels, form: tl.constexpr):
    """Return whether each value of the tile that begins at row `first` passed."""
    row = rows_of(first, form)
    offset, exists = _place(row, group, channels, form)
    byte = tl.load(bits + offset, mask=exists & (row < end), other=0).to(tl.int32)
    bit = (tl.reshape(byte, (form.height, form.width // 8, 1)) >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bit, (form.height, form.width)) > 0
