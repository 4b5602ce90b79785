"""Which layers stand together in a drawing: in one column if there are many, under one label if a path unites them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

__all__ = ["Block", "Span", "blocks", "leaves", "spans"]


@dataclass(frozen=True)
class Span:
    """Consecutive layers that are drawn as one.

    Attributes:
        first: Index of the first layer.
        last: Index of the last layer.
        shown: Index of the layer that is drawn, the worst of them.
    """

    first: int
    last: int
    shown: int


@dataclass(frozen=True)
class Block:
    """Consecutive layers under one path, "" for those that stand alone."""

    path: str
    first: int
    last: int


def spans(count: int, limit: int, badness: Callable[[int], float]) -> list[Span]:
    """Return at most `limit` spans of equal length, each with its worst layer."""
    size = max(1, -(-count // limit))
    found = []
    for first in range(0, count, size):
        last = min(first + size, count) - 1
        found.append(Span(first, last, max(range(first, last + 1), key=badness)))
    return found


def blocks(names: Sequence[str]) -> list[Block]:
    """Return the layers by the first part of their path that tells them apart."""
    paths = [name.split(".") for name in names]
    depth = _shared(paths)
    keys = [".".join(path[: depth + 1]) if len(path) > depth + 1 else "" for path in paths]
    found, first = [], 0
    for key, group in groupby(keys):
        last = first + len(list(group)) - 1
        found.append(Block(key, first, last))
        first = last + 1
    return found


def leaves(names: Sequence[str], within: Sequence[Block]) -> list[str]:
    """Return what is left of each path once that of its block is said."""
    found = []
    for block in within:
        skipped = len(block.path) + 1 if block.path else 0
        found += [name[skipped:] for name in names[block.first : block.last + 1]]
    return found


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """Return how many leading parts all paths have in common, their last part left out."""
    if not paths:
        return 0
    depth = 0
    shortest = min(map(len, paths)) - 1
    while depth < shortest and len({path[depth] for path in paths}) == 1:
        depth += 1
    return depth
