"""How the kernels see a tensor: as groups of channels, each with rows, and tiles of rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from bnlab.kernels.request import is_channels_last

__all__ = ["COLUMNS", "PLANES", "SEGMENTS", "Geometry", "TileForm", "geometry_of", "merging_form"]

PLANES, SEGMENTS, COLUMNS = 0, 1, 2
"""The layouts of `device.tiles`."""

_VECTOR = 8
"""Values that a thread reads at once: 16 bytes in half precision."""

_SMALL_PLANE = 256
"""Planes of fewer values lie side by side in a tile, unless they consist of whole vectors."""

_SMALLEST_PLANE = 64


class TileForm(NamedTuple):
    """The form of a tile: constants of the compiled kernels.

    Attributes:
        layout: `PLANES`, `SEGMENTS` or `COLUMNS`.
        side: Channels in a group.
        height: Rows, a power of two.
        width: Columns, a power of two of at least 8.
        lanes: Elements of a vector of channels, a power of two.
        even: Whether every column exists.
        tiles: Tiles that a program reads before it uses them.
        at_once: Parts that a program merges at once, a power of two.
        positions: S, the product of the spatial sizes, which the kernels divide by; 0 for `COLUMNS`, which do not.
        hides: Whether `device.tiles.hidden` hides values from the compiler, in NVIDIA's assembly.
    """

    layout: int
    side: int
    height: int
    width: int
    lanes: int
    even: bool
    tiles: int
    at_once: int
    positions: int
    hides: bool = False

    @property
    def values(self) -> int:
        """Values in a tile."""
        return self.height * self.width


@dataclass(frozen=True)
class Geometry:
    """A tensor of shape (N, C, S) as the kernels see it.

    Attributes:
        layout: `PLANES`, `SEGMENTS` or `COLUMNS`.
        channels: C.
        positions: S, the product of the spatial sizes; 1 for (N, C).
        side: Channels in a group.
        width: Columns of a tile.
        rows: Rows of a group.
        count: Values per channel, N*S.
        elements: Values of the tensor.
        element_size: Bytes of a value.
    """

    layout: int
    channels: int
    positions: int
    side: int
    width: int
    rows: int
    count: int
    elements: int
    element_size: int = 4

    @property
    def groups(self) -> int:
        """Number of groups of channels."""
        return -(-self.channels // self.side)

    @property
    def values_in_row(self) -> int:
        """Values of a row that exist, at most `width`."""
        return {PLANES: _VECTOR, SEGMENTS: self.side * self.positions, COLUMNS: self.width}[self.layout]

    @property
    def bytes_for_bits(self) -> int:
        """Size of one bit per element, with the bits of a plane or row in whole bytes."""
        if self.layout == PLANES:
            return self.rows * self.channels
        row = self.channels * (self.positions if self.layout == SEGMENTS else 1)
        return self.rows * -(-row // 8)

    def form(self, values: int, tiles: int, merged: int) -> TileForm:
        """Return the form of a tile.

        Args:
            values: About the number of its values.
            tiles: Tiles that a program reads at a time.
            merged: Parts times channels that a program merges at once, a power of two.
        """
        height = max(1, min(values // self.width, _power_of_two(self.rows)))
        lanes = {PLANES: 1, SEGMENTS: _power_of_two(self.side), COLUMNS: self.width}[self.layout]
        even = {
            PLANES: self.positions % _VECTOR == 0,
            SEGMENTS: False,
            COLUMNS: self.channels % self.width == 0,
        }[self.layout]
        positions = 0 if self.layout == COLUMNS else self.positions
        at_once = max(1, merged // lanes)
        return TileForm(self.layout, self.side, height, self.width, lanes, even, tiles, at_once, positions)


def geometry_of(x: Tensor, tile: int = 2048) -> Geometry:
    """Return how the kernels see a tensor of shape (N, C, *spatial) that is contiguous or channels_last.

    Args:
        x: The tensor.
        tile: Values of a tile.
    """
    samples, channels = x.size(0), x.size(1)
    positions = math.prod(x.shape[2:])
    count = samples * positions
    if positions == 1 or (not x.is_contiguous() and is_channels_last(x)):
        width = min(max(_VECTOR, _power_of_two(channels)), 128 // x.element_size())
        return Geometry(COLUMNS, channels, positions, width, width, count, count, x.numel(), x.element_size())
    side = _planes_side_by_side(positions, tile)
    if side:
        width = max(_VECTOR, _power_of_two(side * positions))
        return Geometry(SEGMENTS, channels, positions, side, width, samples, count, x.numel(), x.element_size())
    rows = samples * -(-positions // _VECTOR)
    return Geometry(PLANES, channels, positions, 1, _VECTOR, rows, count, x.numel(), x.element_size())


def merging_form(tile: int = 2048) -> TileForm:
    """Return a form for kernels that only merge parts, for a few channels a program."""
    return TileForm(COLUMNS, _VECTOR, 1, _VECTOR, _VECTOR, True, 1, max(1, tile // 2 // _VECTOR), 0)


def _planes_side_by_side(positions: int, tile: int) -> int:
    """Return the number of channels whose planes lie side by side in a tile, or 0 to take each plane by itself.

    The planes of a group consist of whole vectors of eight, so that every group starts at one. They fill a tile of an
    eighth or a quarter of its size in one row as far as possible.
    """
    if not positions or positions >= _SMALL_PLANE or (positions >= _SMALLEST_PLANE and positions % _VECTOR == 0):
        return 0
    step = _VECTOR // math.gcd(positions, _VECTOR)
    sides = {width: width // positions // step * step for width in (tile // 8, tile // 4)}
    fullest = max(sides, key=lambda width: sides[width] * positions / width)
    return sides[fullest] or step


def _power_of_two(number: int) -> int:
    """Return the smallest power of two of at least `number`."""
    return 1 << max(0, number - 1).bit_length()
