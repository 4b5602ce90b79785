"""Groups the layers of a drawing: many layers share a column, and layers under one path share a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

__all__ = ["Block", "Span", "blocks", "leaves", "spans"]


@dataclass(frozen=True)
class Span:
    """Consecutive layers that are drawn as one column.

    Attributes:
        first: Index of the first layer.
        last: Index of the last layer.
        shown: Index of the worst layer, which is the one that is drawn.
    """

    first: int
    last: int
    shown: int


@dataclass(frozen=True)
class Block:
    """Consecutive layers under one path; "" for layers without a common path."""

    path: str
    first: int
    last: int


def spans(count: int, limit: int, badness: Callable[[int], float]) -> list[Span]:
    """Return at most `limit` spans of equal length, each with its worst layer."""
    size = max(1, -(-count // limit))
    layer_spans = []
    for first in range(0, count, size):
        last = min(first + size, count) - 1
        layer_spans.append(Span(first, last, max(range(first, last + 1), key=badness)))
    return layer_spans


def blocks(names: Sequence[str]) -> list[Block]:
    """Return the layers grouped by the first part of their path that differs between layers."""
    paths = [name.split(".") for name in names]
    depth = _shared(paths)
    keys = [".".join(path[: depth + 1]) if len(path) > depth + 1 else "" for path in paths]
    layer_blocks, first = [], 0
    for key, group in groupby(keys):
        last = first + len(list(group)) - 1
        layer_blocks.append(Block(key, first, last))
        first = last + 1
    return layer_blocks


def leaves(names: Sequence[str], within: Sequence[Block]) -> list[str]:
    """Return the rest of each path below the path of its block."""
    short_names = []
    for block in within:
        skipped = len(block.path) + 1 if block.path else 0
        short_names += [name[skipped:] for name in names[block.first : block.last + 1]]
    return short_names


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """Return the number of leading parts that all paths share, not counting the last part of a path."""
    if not paths:
        return 0
    depth = 0
    shortest = min(map(len, paths)) - 1
    while depth < shortest and len({path[depth] for path in paths}) == 1:
        depth += 1
    return depth
