"""Renders the layers of a diagnosis as a table: their stored state, their gap between the modes, and their findings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bnlab.records import DiagnosisRecord, LayerRecord
from bnlab.report.problems import Problem
from bnlab.report.rows import layers_to_show, main_cause, root_gap
from bnlab.report.text.sheet import Sheet
from bnlab.wording import counted

__all__ = ["draw", "gap_of"]

_MAX_LAYERS = 25
_MAX_CODES = 2
_NARROWEST_NAME = 20


@dataclass(frozen=True)
class _Column:
    """A column of the table, next to the names of the layers."""

    header: str
    cells: Sequence[str]
    right: bool = False
    style: str = ""

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.header, *self.cells)))


def draw(diagnosis: DiagnosisRecord, problems: Iterable[Problem], sheet: Sheet) -> Iterable[RenderableType]:
    """Yield the table of the layers. If there are too many, layers with findings take precedence.

    Args:
        diagnosis: The diagnosis.
        problems: Its problems, in the order in which the codes of a layer are listed.
        sheet: The sheet to draw on.
    """
    codes: dict[str, list[str]] = {}
    for finding in (finding for problem in problems for finding in problem.findings):
        if finding.layer is not None:
            codes.setdefault(finding.layer, []).append(sheet.plain(finding.code))
    shown = layers_to_show([layer.name in codes for layer in diagnosis.layers], _MAX_LAYERS)
    layers = [diagnosis.layers[index] for index in shown]
    columns = _measured_columns(layers, diagnosis, sheet)
    columns.append(_Column("findings", [_codes(codes.get(layer.name, []), sheet) for layer in layers], style="yellow"))
    columns, room = _fitting(columns, layers, sheet)
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("layer", no_wrap=True, overflow="crop")
    for column in columns:
        table.add_column(
            column.header,
            justify="right" if column.right else "left",
            style=column.style,
            no_wrap=True,
            overflow="crop",
        )
    for index, layer in enumerate(layers):
        table.add_row(sheet.layer_name(layer.name, room), *(Text(column.cells[index]) for column in columns))
    yield table
    hidden = len(diagnosis.layers) - len(layers)
    if hidden:
        yield Text(f"  ... and {counted(hidden, 'more layer')}: --format json has them all")


def _measured_columns(layers: Sequence[LayerRecord], diagnosis: DiagnosisRecord, sheet: Sheet) -> list[_Column]:
    columns = [
        _Column("chan.", [str(layer.channels) for layer in layers], right=True),
        _Column("batches", [_counter(layer) for layer in layers], right=True),
        _Column("running_var", [_between(layer) for layer in layers], right=True),
    ]
    largest = max((gap for gap in map(gap_of, diagnosis.layers) if gap is not None), default=0.0)
    if largest > 0:
        gaps = [gap_of(layer) for layer in layers]
        cells = max(8, sheet.width // 10)
        bars = ["" if gap is None else sheet.marks.bar(gap, largest=largest, cells=cells) for gap in gaps]
        columns.append(_Column("gap, std", ["-" if gap is None else f"{gap:.2g}" for gap in gaps], right=True))
        columns.append(_Column("", bars, style="yellow"))
        if sheet.wide:
            columns.append(_Column("mostly", [sheet.plain(main_cause(layer.gap)) for layer in layers]))
    return columns


def _fitting(columns: Sequence[_Column], layers: Sequence[LayerRecord], sheet: Sheet) -> tuple[list[_Column], int]:
    """Return the columns that leave enough room for the names, and that room."""
    longest = max((cell_len(layer.name) for layer in layers), default=0)
    needed = min(longest, _NARROWEST_NAME, sheet.widest_name)
    kept = list(columns)
    for spare in (None, "batches", "", "running_var", "chan.", "gap, std"):
        kept = [column for column in kept if column.header != spare]
        room = sheet.width - 2 - sum(column.width + 2 for column in kept)
        if room >= needed:
            break
    return kept, max(room, 1)


def _counter(layer: LayerRecord) -> str:
    return "-" if layer.num_batches_tracked is None else str(layer.num_batches_tracked)


def _between(layer: LayerRecord) -> str:
    var = layer.running_var
    if layer.dtype == "none":
        return "-"
    return "not finite" if var is None else f"{var.min:.2g} .. {var.max:.2g}"


def gap_of(layer: LayerRecord) -> float | None:
    """Return the gap of a layer between the modes in standard deviations; None if it was not measured."""
    return None if layer.gap is None else root_gap(layer.gap)


def _codes(codes: Sequence[str], sheet: Sheet) -> str:
    limit = _MAX_CODES * (2 if sheet.wide else 1)
    return " ".join(codes) if len(codes) <= limit else f"{codes[0]} +{len(codes) - 1}"
