"""Where the values of a tile lie, and how a tile shrinks to its channels and back.

`form` is a `bnlab.kernels.backends.triton.geometry.TileForm`, a constant of the compiler. A program works on tiles of
`form.height` rows and `form.width` columns of one group of `form.side` channels:

- `PLANES`, contiguous: a group is one channel, and a row is eight neighbouring values of one of its planes.
- `COLUMNS`, channels last and (N, C): a group is `width` channels, and a row is one position.
- `SEGMENTS`, contiguous with small planes: a group is the planes of `side` channels, side by side in memory, and a row
  is one sample.

A program adds up the values of a tile in *lanes*, one for every row of `PLANES` and one for every value otherwise: of
shape (height, 1) or (height, width). Vectors of channels have `form.lanes` elements: 1 for `PLANES`, `width` for
`COLUMNS`, and the next power of two of `side` for `SEGMENTS`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "PLANES",
    "SEGMENTS",
    "all_to_columns",
    "channels_of",
    "hidden",
    "load_tile",
    "members_of",
    "place",
    "position_of",
    "rows_of",
    "sum_by_channel",
    "to_columns",
    "to_lanes",
    "zero_lanes",
]

PLANES = tl.constexpr(0)
SEGMENTS = tl.constexpr(1)


@triton.jit
def rows_of(first, form: tl.constexpr):
    """Return the rows of the tile that begins at row `first`, shape (height, 1)."""
    return first + tl.arange(0, form.height)[:, None]


@triton.jit
def place(row, group, channels, form: tl.constexpr):
    """Return the offsets of the values in rows of a group, int64, and whether their columns exist.

    Args:
        row: Shape (height, 1), int32.
        group: Index of the group of channels.
        channels: C.
        form: The form of the tile.
    """
    column = tl.arange(0, form.width)[None, :]
    if form.layout == PLANES:
        vectors = (form.positions + 7) // 8
        sample = row // vectors
        vector = row - sample * vectors
        plane = sample.to(tl.int64) * channels + group
        if form.even:  # in this form the compiler sees that eight values are aligned
            offset = (plane * vectors + vector) * 8 + column
            exists = (row >= 0) & (column >= 0)
        else:
            offset = plane * form.positions + (vector * 8 + column)
            exists = vector * 8 + column < form.positions
    elif form.layout == SEGMENTS:
        first = group * (form.side * form.positions)
        offset = row.to(tl.int64) * (channels * form.positions) + (first + column)
        exists = (row >= 0) & (column < form.side * form.positions) & (first + column < channels * form.positions)
    else:
        offset = row.to(tl.int64) * channels + (group * form.width + column)
        exists = (row >= 0) & (group * form.width + column < channels)
    return offset, exists


@triton.jit
def load_tile(x, first, end, group, channels, form: tl.constexpr):
    """Return the values of the tile that begins at row `first`, their offsets, and which of them lie before row `end`.

    Values that do not exist are 0.
    """
    row = rows_of(first, form)
    offset, exists = place(row, group, channels, form)
    inside = exists & (row < end)
    return tl.load(x + offset, mask=inside, other=0.0), offset, inside


@triton.jit
def hidden(value, form: tl.constexpr):
    """Return a tile, or an int32, as if nothing was known about it.

    What the compiler computed from it before is then not kept for later: a tile in half precision would stay in
    registers in float32, at twice the size, and the offsets of all tiles would stay there during a loop.
    """
    if form.hides:
        if value.dtype.primitive_bitwidth == 16:
            value = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], value.dtype, is_pure=False, pack=2)
        else:
            value = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], value.dtype, is_pure=False, pack=1)
    return value


@triton.jit
def position_of(row, form: tl.constexpr):
    """Return the index n*S + s of the position of every value that exists, shape (height, width), int64."""
    column = tl.arange(0, form.width)[None, :]
    if form.layout == PLANES:
        vectors = (form.positions + 7) // 8
        sample = row // vectors
        position = sample.to(tl.int64) * form.positions + ((row - sample * vectors) * 8 + column)
    elif form.layout == SEGMENTS:
        position = row.to(tl.int64) * form.positions + column % form.positions
    else:
        position = row.to(tl.int64) + column * 0
    return position


@triton.jit
def channels_of(group, channels, form: tl.constexpr):
    """Return the channels of a group, shape (lanes,), and whether each exists."""
    lane = tl.arange(0, form.lanes)
    channel = group * form.side + lane
    return channel, (lane < form.side) & (channel < channels)


@triton.jit
def members_of(form: tl.constexpr):
    """Return which columns of a tile of `SEGMENTS` belong to which channel, shape (width, lanes)."""
    return tl.arange(0, form.width)[:, None] // form.positions == tl.arange(0, form.lanes)[None, :]


@triton.jit
def to_lanes(values, form: tl.constexpr):
    """Add up the values of a tile that share a lane. A thread holds all eight values of a row of `PLANES`."""
    if form.layout == PLANES:
        values = tl.sum(values, 1)[:, None]
    return values


@triton.jit
def zero_lanes(form: tl.constexpr):
    """Return zeros in the shape of the lanes, float32."""
    if form.layout == PLANES:
        zeros = tl.full((form.height, 1), 0.0, tl.float32)
    else:
        zeros = tl.full((form.height, form.width), 0.0, tl.float32)
    return zeros


@triton.jit
def sum_by_channel(values, form: tl.constexpr):
    """Return the sums of the lanes of each channel, shape (lanes,)."""
    total = tl.sum(values, 0)
    if form.layout == SEGMENTS:
        total = tl.sum(tl.where(members_of(form), total[:, None], 0.0), 0)
    return total


@triton.jit
def to_columns(values, form: tl.constexpr):
    """Return the value of the channel of each column: shape (lanes,) becomes (1, width), or (1, 1) for `PLANES`."""
    if form.layout == SEGMENTS:
        lane = tl.minimum(tl.arange(0, form.width) // form.positions, form.lanes - 1)
        values = tl.gather(values, lane, 0)
    return values[None, :]


@triton.jit
def all_to_columns(unit, pivot, scale, shift, form: tl.constexpr):
    """Return the coefficients of the transform for the columns of a tile; see `to_columns`."""
    return to_columns(unit, form), to_columns(pivot, form), to_columns(scale, form), to_columns(shift, form)
