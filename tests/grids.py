"""Grids of parameters of which a part runs every day: every value of every axis once, and the other cells in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

__all__ = ["grid"]


def grid(*axes: Iterable[object]) -> list[Any]:
    """Return every combination of the values of some axes, as parameters of a test.

    The cells on a diagonal, which hold every value of every axis at least once, run by default; the others are slow.
    """
    values: list[Sequence[object]] = [list(axis) for axis in axes]
    longest = max(map(len, values))
    diagonal = {tuple(number % len(axis) for axis in values) for number in range(longest)}
    return [
        pytest.param(
            *(axis[place] for axis, place in zip(values, places, strict=True)),
            id="-".join(str(axis[place]) for axis, place in zip(values, places, strict=True)),
            marks=() if places in diagonal else pytest.mark.slow,
        )
        for places in itertools.product(*(range(len(axis)) for axis in values))
    ]
