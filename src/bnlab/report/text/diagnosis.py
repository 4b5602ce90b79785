"""A diagnosis as text: the conclusion, the findings grouped by code, then the layers.

Everything that comes from a record (layer names above all) is untrusted: it is stripped of control characters and never
parsed as markup. What a report looks like depends on the output: how wide it is, and which characters it can show.
"""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnlab.records import REMEDIES, Cause, DiagnosisRecord, Finding, LayerRecord, Level, Quantity, Safety, Status
from bnlab.report.text.bars import UNICODE, Marks
from bnlab.wording import abridged, and_more, counted

__all__ = [
    "SAFETY_PHRASES",
    "Report",
    "Sheet",
    "plain",
    "remedy_phrase",
    "render",
    "renderable",
    "root_gap",
    "summary_line",
    "write",
]

SAFETY_PHRASES = {
    Safety.EXACT: "output kept",
    Safety.STATISTICS: "buffers only",
    Safety.BEHAVIOUR: "behaviour changed",
    Safety.MANUAL: "nothing applied",
}
"""What a change may do, in two words."""

_STYLES = {Level.ERROR: "bold red", Level.WARNING: "bold yellow", Level.INFO: "bold blue"}
_HEADINGS = {Level.ERROR: "ERROR", Level.WARNING: "WARNING", Level.INFO: "NOTE"}
_MOST_FINDINGS = 10
_MOST_LAYERS = 25
_MOST_NOTES = 12
_MOST_CAUSE_LAYERS = 2
_MOST_CODES = 2
_SMALLEST_SHARE = 0.01
_COMMON_WIDTH = 80
_WIDE = 140
_WIDEST_NAME = 28
_NARROWEST_NAME = 20
_WIDEST_CHANNELS = 16
_LONGEST_NAME = 200
_LONGEST_TEXT = 2000


@dataclass(frozen=True)
class Sheet:
    """What a report is written on.

    Attributes:
        width: Columns of the terminal.
        marks: The characters it can show.
    """

    width: int
    marks: Marks = UNICODE

    @property
    def wide(self) -> bool:
        """Whether there is room for whole messages beside layer names."""
        return self.width >= _WIDE

    @property
    def widest_name(self) -> int:
        """Most columns of a layer name: about a third of the sheet."""
        extra = max(0, self.width - _COMMON_WIDTH) // 3
        return min(_WIDEST_NAME, self.width * _WIDEST_NAME // _COMMON_WIDTH) + extra

    def plain(self, text: str) -> str:
        """Return untrusted text as the sheet can show it, and no more of it than anyone reads."""
        if len(text) <= _LONGEST_TEXT:
            return plain(text, self.marks)
        return plain(text[:_LONGEST_TEXT], self.marks) + self.marks.ellipsis


@dataclass(frozen=True)
class Report:
    """A report for a rich console, laid out when the width and the characters of the output are known."""

    draw: Callable[[Sheet], Iterable[RenderableType]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the parts of the report, as wide as the console."""
        yield from self.draw(Sheet(options.max_width, Marks.of(console.encoding)))


def plain(text: str, marks: Marks = UNICODE) -> str:
    """Return untrusted text without control, format and private characters: no escape reaches the terminal."""
    kept = "".join(char if _is_shown(char) else marks.unknown for char in text)
    return kept if marks is UNICODE else marks.encodable(kept)


def _is_shown(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] != "C" and category not in ("Zl", "Zp")


def write(report: RenderableType, *, width: int, encoding: str | None = None) -> str:
    """Return a report as plain text, line by line without spaces at the end.

    Args:
        report: For a rich console.
        width: Columns no line is wider than.
        encoding: What the text is for; None for standard output.
    """
    wanted = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    file = io.TextIOWrapper(io.BytesIO(), encoding=wanted, write_through=True)
    Console(file=file, width=width, color_system=None, legacy_windows=False).print(report)
    text = file.buffer.getvalue().decode(wanted)
    return "\n".join(line.rstrip() for line in text.splitlines())


def render(
    diagnosis: DiagnosisRecord, *, level: Level = Level.INFO, width: int = 80, encoding: str | None = None
) -> str:
    """Return the report as plain text.

    Args:
        diagnosis: What to draw.
        level: Findings below it are counted only.
        width: Columns no line is wider than.
        encoding: What the text is for; None for standard output.
    """
    return write(renderable(diagnosis, level=level), width=width, encoding=encoding)


def renderable(diagnosis: DiagnosisRecord, *, level: Level = Level.INFO) -> RenderableType:
    """Return the report for a rich console; findings below `level` are counted only."""
    return Report(lambda sheet: _parts(diagnosis, level, sheet))


def summary_line(diagnosis: DiagnosisRecord) -> Text:
    """Return one line for a diagnosis among many: the counts, and the codes of errors and warnings."""
    summary = diagnosis.summary
    worst = diagnosis.findings[0].level if diagnosis.findings else Level.INFO
    codes = list(dict.fromkeys(plain(f.code) for f in diagnosis.findings if f.level.at_least(Level.WARNING)))
    line = Text()
    line.append(plain(diagnosis.target.name), style="bold")
    line.append(f": {counted(summary.layers, 'layer')}, ")
    style = _STYLES[worst] if codes else "green"
    line.append(f"{counted(summary.errors, 'error')}, {counted(summary.warnings, 'warning')}", style=style)
    line.append(f", {counted(summary.infos, 'note')}" + (f" ({', '.join(codes)})" if codes else ""))
    return line


def remedy_phrase(name: str) -> str:
    """Return a remedy with what it may do, as "recalibrate (buffers only)"."""
    safety = REMEDIES.get(name, Safety.MANUAL)
    return name if safety is Safety.MANUAL else f"{name} ({SAFETY_PHRASES[safety]})"


def _parts(diagnosis: DiagnosisRecord, level: Level, sheet: Sheet) -> Iterable[RenderableType]:
    shown = [finding for finding in diagnosis.findings if finding.level.at_least(level)]
    yield from (_head(diagnosis, sheet), Text(sheet.plain(diagnosis.conclusion) + ".", style="bold"), Text())
    yield from _numbers(diagnosis)
    yield from _causes(diagnosis, sheet)
    for _, group in groupby(shown, key=lambda finding: finding.code):
        yield from (*_group(list(group), diagnosis, sheet), Text())
    yield from (*_layers(diagnosis, sheet), Text())
    yield from _tail(diagnosis, sheet, hidden=len(diagnosis.findings) - len(shown))


def _head(diagnosis: DiagnosisRecord, sheet: Sheet) -> Text:
    summary = diagnosis.summary
    networks = len({layer.network for layer in diagnosis.layers})
    dtypes = ", ".join(dict.fromkeys(sheet.plain(layer.dtype) for layer in diagnosis.layers))
    among = f" in {networks} networks" if networks > 1 else ""
    name = Text(sheet.plain(diagnosis.target.name), style="bold cyan")
    counts = f"{counted(summary.layers, 'BN layer')}{among}, {counted(summary.channels, 'channel')}, {dtypes}"
    return Text.assemble(name, f"\n{counts}\n")


def _numbers(diagnosis: DiagnosisRecord) -> Iterable[RenderableType]:
    """Yield the metric under four choices of data and statistics."""
    numbers = diagnosis.numbers
    if numbers is None:
        return
    rows = [
        ("training data, batch statistics", numbers.train_batch),
        ("data, batch statistics", numbers.eval_batch),
        ("data, running statistics (eval mode)", numbers.eval_running),
        ("data, recalibrated statistics", numbers.eval_recalibrated),
    ]
    table = _table("metric on")
    table.add_column("", justify="right", overflow="fold")
    for name, value in rows:
        if value is not None:
            table.add_row(name, f"{value:.4g}")
    yield from (table, Text())


def _causes(diagnosis: DiagnosisRecord, sheet: Sheet) -> Iterable[RenderableType]:
    """Yield the gap between train mode and eval mode, split by cause; a share may be negative."""
    told = [cause for cause in diagnosis.causes if abs(cause.share) >= _SMALLEST_SHARE]
    gaps = [gap for gap in map(_gap, diagnosis.layers) if gap is not None]
    if not (told and gaps):
        return
    yield Text(f" gap between the modes, up to {max(gaps):.2g} std", style="dim")
    table = _table("cause")
    table.add_column("share", justify="right", overflow="fold")
    table.add_column(overflow="crop")
    table.add_column("layers", overflow="fold")
    largest = max(1.0, *(abs(cause.share) for cause in told))
    for cause in told:
        bar = sheet.marks.bar(cause.share, largest=largest, cells=max(8, sheet.width // 5))
        share = Text(f"{100 * cause.share:.0f} %")
        table.add_row(Text(sheet.plain(cause.cause)), share, Text(bar, style="yellow"), _cause_layers(cause, sheet))
    yield from (table, Text())


def _cause_layers(cause: Cause, sheet: Sheet) -> Text:
    most = _MOST_CAUSE_LAYERS * (2 if sheet.wide else 1)
    names = ", ".join(_layer_name(name, sheet).plain for name in cause.layers[:most])
    return Text(names + and_more(len(cause.layers) - most))


def _group(findings: Sequence[Finding], diagnosis: DiagnosisRecord, sheet: Sheet) -> Iterable[RenderableType]:
    first, code = findings[0], sheet.plain(findings[0].code)
    title = Text.assemble((_HEADINGS[first.level], _STYLES[first.level]), f" {code} ")
    yield title.append(f"in {counted(len(findings), 'layer')}" if first.layer is not None else "in the network")
    yield Padding(Text(sheet.plain(first.why)), (0, 0, 0, 2))
    if first.layer is None:
        for finding in findings:
            yield Padding(Text(sheet.plain(finding.message)), (0, 0, 0, 2))
    else:
        yield Padding(_findings_table(findings[:_MOST_FINDINGS], diagnosis, sheet), (0, 0, 0, 1))
    if len(findings) > _MOST_FINDINGS:
        yield Text(f"  ... and {counted(len(findings) - _MOST_FINDINGS, 'more layer')}: --format json has them all")
    remedies = sheet.plain(", ".join(map(remedy_phrase, first.remedies)))
    yield Padding(Text(f"remedy: {remedies}; bnlab explain {code}", style="dim"), (0, 0, 0, 2))


def _findings_table(findings: Sequence[Finding], diagnosis: DiagnosisRecord, sheet: Sheet) -> Table:
    """Return a row a layer: the message where there is room for it, else the numbers of it."""
    channels = {layer.name: layer.channels for layer in diagnosis.layers}
    table = _table("layer", "channels", *(("found",) if sheet.wide else ("measured", "threshold")))
    table.columns[0].no_wrap, table.columns[0].overflow = True, "crop"
    for finding in findings:
        found = [sheet.plain(finding.message)]
        if not sheet.wide:
            found = [_quantities(quantities, sheet) for quantities in (finding.measured, finding.threshold)]
        width = channels.get(finding.layer or "", 0)
        table.add_row(
            _layer_name(finding.layer or "", sheet), _channels(finding.channels, width, sheet), *map(Text, found)
        )
    return table


def _table(*headers: str) -> Table:
    """Return a table whose cells wrap: rich would cut them with a character that not every output can show."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


@dataclass(frozen=True)
class _Column:
    """A column beside the names of the layers."""

    header: str
    cells: Sequence[str]
    right: bool = False
    style: str = ""

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.header, *self.cells)))


def _layers(diagnosis: DiagnosisRecord, sheet: Sheet) -> Iterable[RenderableType]:
    """Yield the layers: all of them if they are few, else those with findings first."""
    codes: dict[str, list[str]] = {}
    for finding in diagnosis.findings:
        if finding.layer is not None:
            codes.setdefault(finding.layer, []).append(sheet.plain(finding.code))
    layers = list(diagnosis.layers)
    if len(layers) > _MOST_LAYERS:
        kept = sorted(range(len(layers)), key=lambda index: (layers[index].name not in codes, index))[:_MOST_LAYERS]
        layers = [layers[index] for index in sorted(kept)]
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
        table.add_row(_layer_name(layer.name, sheet, room), *(Text(column.cells[index]) for column in columns))
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
    largest = max((gap for gap in map(_gap, diagnosis.layers) if gap is not None), default=0.0)
    if largest > 0:
        gaps = [_gap(layer) for layer in layers]
        cells = max(8, sheet.width // 10)
        bars = ["" if gap is None else sheet.marks.bar(gap, largest=largest, cells=cells) for gap in gaps]
        columns.append(_Column("gap, std", ["-" if gap is None else f"{gap:.2g}" for gap in gaps], right=True))
        columns.append(_Column("", bars, style="yellow"))
        if sheet.wide:
            columns.append(_Column("mostly", [sheet.plain(_main_cause(layer)) for layer in layers]))
    return columns


def _fitting(columns: Sequence[_Column], layers: Sequence[LayerRecord], sheet: Sheet) -> tuple[list[_Column], int]:
    """Return the columns that leave the names room to be told apart, and that room."""
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
    return "not finite" if var is None else f"{var.min:.2g} .. {var.max:.2g}"


def _gap(layer: LayerRecord) -> float | None:
    """Return the gap of a layer between the modes in standard deviations, None where it was not measured."""
    return None if layer.gap is None else root_gap(layer.gap)


def root_gap(gap: Mapping[str, float]) -> float:
    """Return a gap by cause, which is a mean square, in standard deviations."""
    return float(max(gap.get("total", 0.0), 0.0) ** 0.5)


def _main_cause(layer: LayerRecord) -> str:
    causes = {cause: square for cause, square in (layer.gap or {}).items() if cause != "total" and square > 0}
    return max(causes, key=causes.__getitem__) if causes else ""


def _codes(codes: Sequence[str], sheet: Sheet) -> str:
    most = _MOST_CODES * (2 if sheet.wide else 1)
    return " ".join(codes) if len(codes) <= most else f"{codes[0]} +{len(codes) - 1}"


def _tail(diagnosis: DiagnosisRecord, sheet: Sheet, *, hidden: int) -> Iterable[RenderableType]:
    for note in diagnosis.notes[:_MOST_NOTES]:
        yield Text(sheet.plain(note), style="dim")
    if len(diagnosis.notes) > _MOST_NOTES:
        yield Text(f"... and {counted(len(diagnosis.notes) - _MOST_NOTES, 'more note')}: --format json has them all")
    by_status = {status: [o for o in diagnosis.outcomes if o.status is status] for status in Status}
    for outcome in by_status[Status.CRASHED]:
        yield Text(sheet.plain(f"{outcome.code} crashed: {outcome.reason or ''}"), style="bold red")
    skipped: dict[str, list[str]] = {}
    for outcome in by_status[Status.SKIPPED]:
        skipped.setdefault(outcome.reason or "", []).append(outcome.code)
    for reason, codes in skipped.items():
        yield Text(sheet.plain(f"{', '.join(codes)} skipped: {reason}"), style="dim")
    passed = len(by_status[Status.PASSED])
    summary = diagnosis.summary
    counts = ", ".join(
        counted(number, noun)
        for number, noun in ((summary.errors, "error"), (summary.warnings, "warning"), (summary.infos, "note"))
    )
    below = f" ({hidden} not shown: --level info)" if hidden else ""
    yield Text(f"{counts}{below}; {passed} of {counted(len(diagnosis.outcomes), 'check')} passed")


def _layer_name(name: str, sheet: Sheet = Sheet(_COMMON_WIDTH), room: int | None = None) -> Text:
    """Return a layer path that fits its column.

    Parts without a digit shrink to their first letter, the first ones first: the digits tell the layers apart. What is
    still too long loses its beginning.
    """
    widest = sheet.widest_name if room is None else min(room, sheet.widest_name)
    short = sheet.plain(name[-_LONGEST_NAME:]) or "(the module itself)"
    if len(name) <= _LONGEST_NAME:
        short = _initialled(short.split("."), widest)
    if cell_len(short) <= widest and len(name) <= _LONGEST_NAME:
        return Text(short)
    room = max(1, widest - cell_len(sheet.marks.ellipsis))
    while cell_len(short) > room:
        short = short[max(1, (cell_len(short) - room) // 2) :]
    return Text(sheet.marks.ellipsis + short)


def _initialled(parts: list[str], widest: int) -> str:
    """Return a path whose first parts are initials, as many as it takes to fit."""
    for index, part in enumerate(parts[:-1]):
        if cell_len(".".join(parts)) <= widest:
            break
        if part and not any(map(str.isdigit, part)):
            parts[index] = part[0]
    return ".".join(parts)


def _channels(channels: Sequence[int] | None, width: int, sheet: Sheet) -> str:
    if channels is None:
        return "-"
    if len(channels) == width:
        return f"all {width}"
    most = 8 if sheet.wide else 4
    told = f"{len(channels)} of {width}: {abridged(list(map(str, channels)), most)}"
    return told if len(told) <= _WIDEST_CHANNELS * (2 if sheet.wide else 1) else f"{len(channels)} of {width}"


def _quantities(quantities: Mapping[str, Quantity], sheet: Sheet) -> str:
    return "\n".join(f"{sheet.plain(name)} {quantity.value:.3g}" for name, quantity in quantities.items())
