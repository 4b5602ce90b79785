"""Puts a tensor together from pieces that lie in several files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlab.observe.files.tensors import MAX_RANK, StoredTensor

__all__ = ["Piece", "SplitTensor"]


@dataclass(frozen=True)
class Piece:
    """A block of a tensor.

    Attributes:
        offset: The position of its first value in the whole tensor, one number per dimension.
        tensor: The values.
    """

    offset: tuple[int, ...]
    tensor: StoredTensor


@dataclass(frozen=True)
class SplitTensor:
    """A tensor of which only pieces are at hand.

    Attributes:
        dtype: The torch name of the dtype.
        shape: The shape of the whole tensor.
        pieces: The pieces, in any order. A piece may occur several times, because ranks may hold copies of it.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        """Refuse pieces that are no blocks of the tensor."""
        if not all(map(_is_count, self.shape)) or len(self.shape) > MAX_RANK:
            raise ValueError(f"a tensor in pieces has the shape {self.shape[:MAX_RANK]}")
        if not all(self._holds(piece) for piece in self.pieces):
            raise ValueError(f"a piece lies outside its tensor of shape {self.shape}")

    @classmethod
    def joined(cls, parts: Sequence[SplitTensor]) -> SplitTensor:
        """Return one tensor with the pieces of all parts.

        Raises:
            ValueError: If the parts describe different tensors.
        """
        kinds = list(dict.fromkeys((part.dtype, part.shape) for part in parts))
        if len(kinds) > 1:
            (dtype, shape), (other_dtype, other_shape) = kinds[:2]
            raise ValueError(f"pieces of one tensor belong to {dtype} {shape} and to {other_dtype} {other_shape}")
        return cls(*kinds[0], tuple(piece for part in parts for piece in part.pieces))

    def coverage(self) -> tuple[int, int]:
        """Return how many values are at hand, and how many the whole tensor has."""
        return sum(piece.tensor.numel for piece in self._distinct()), math.prod(self.shape)

    def missing(self) -> str:
        """Name the values that are not at hand, as in "values 5 to 8 of the 9"."""
        values, numel = self.coverage()
        if len(self.shape) != 1 or not values:
            return f"{max(numel - values, 0)} of the {numel} values"
        blocks = sorted((piece.offset[0], piece.offset[0] + piece.tensor.numel) for piece in self._distinct())
        ends = list(itertools.accumulate((end for _, end in blocks), max, initial=0))
        begins = [begin for begin, _ in blocks] + [numel]
        first, behind = next((end, begin) for end, begin in zip(ends, begins, strict=True) if begin > end)
        return f"values {first} to {behind - 1} of the {numel}"

    def whole(self) -> StoredTensor | None:
        """Return the tensor, which is not read yet; None if values are missing."""
        values, numel = self.coverage()
        return StoredTensor(self.dtype, self.shape, self._bits) if values >= numel else None

    def _holds(self, piece: Piece) -> bool:
        """Return whether a piece is a block of this tensor."""
        sizes = piece.tensor.shape
        if len(piece.offset) != len(self.shape) or len(sizes) != len(self.shape) or piece.tensor.dtype != self.dtype:
            return False
        blocks = zip(piece.offset, sizes, self.shape, strict=True)
        return all(_is_count(at) and at + size <= length for at, size, length in blocks)

    def _distinct(self) -> list[Piece]:
        return list({(piece.offset, piece.tensor.shape): piece for piece in reversed(self.pieces)}.values())

    def _bits(self) -> NDArray[Any]:
        """Return the values of the whole tensor.

        Raises:
            ValueError: If pieces overlap, so that values are missing elsewhere.
        """
        parts = [(piece, piece.tensor.bits()) for piece in self._distinct() if piece.tensor.numel]
        if not parts:
            return np.empty(self.shape, dtype=np.uint8 if not self.pieces else self.pieces[0].tensor.bits().dtype)
        values = np.empty(self.shape, dtype=parts[0][1].dtype)
        covered = np.zeros(self.shape, dtype=np.bool_)
        for piece, bits in parts:
            block = tuple(slice(at, at + size) for at, size in zip(piece.offset, piece.tensor.shape, strict=True))
            values[block] = bits
            covered[block] = True
        if not covered.all():
            raise ValueError(f"the pieces of a tensor of shape {self.shape} overlap and leave values out")
        return values


def _is_count(value: object) -> bool:
    """Return whether a number from a file, which may be anything, is a length or a position."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
