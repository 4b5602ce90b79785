"""Prepares the table of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bnlab.records import LayerRecord, Range
from bnlab.report.html.escaping import number
from bnlab.report.html.layer_data import between
from bnlab.report.html.markers import LayerFindings
from bnlab.report.rows import layers_to_show, root_gap

__all__ = ["Cell", "LayerRow", "headers", "rows"]

_MAX_ROWS = 2_000


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and the number to sort by if it differs from the text."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """A layer: its index in the record, its path, its cells, and the codes of its findings."""

    index: int
    name: str
    cells: tuple[Cell, ...]
    codes: str


def headers(layers: Sequence[LayerRecord]) -> list[str]:
    """Return the column headers; the gap has a column only if it was measured."""
    names = ["channels", "dtype", "batches", "momentum", "eps", "running_mean", "running_var", "gain"]
    return names + (["gap, std"] if _has_gaps(layers) else [])


def rows(layers: Sequence[LayerRecord], marked: Sequence[LayerFindings]) -> list[LayerRow]:
    """Return the rows in execution order. If there are too many, layers with findings take precedence."""
    has_gaps = _has_gaps(layers)
    return [
        LayerRow(index, layers[index].name, _cells(layers[index], has_gaps=has_gaps), " ".join(marked[index].codes))
        for index in layers_to_show([bool(mark.findings) for mark in marked], _MAX_ROWS)
    ]


def _has_gaps(layers: Sequence[LayerRecord]) -> bool:
    return any(layer.gap is not None for layer in layers)


def _cells(layer: LayerRecord, *, has_gaps: bool) -> tuple[Cell, ...]:
    cells = [
        Cell(f"{layer.channels:,}"),
        Cell(layer.dtype),
        Cell(number(layer.num_batches_tracked)),
        Cell("None" if layer.momentum is None else f"{layer.momentum:g}"),
        Cell(f"{layer.eps:g}"),
        _range(layer.running_mean),
        _range(layer.running_var),
        _range(layer.gain),
    ]
    if has_gaps:
        cells.append(Cell(number(None if layer.gap is None else root_gap(layer.gap))))
    return tuple(cells)


def _range(range_: Range | None) -> Cell:
    """Return the cell of a range. The page sorts it by the upper end, or by the lower end if that is further from 0."""
    if range_ is None:
        return Cell("not finite")
    return Cell(between(range_), -range_.min if -range_.min > range_.max else None)
