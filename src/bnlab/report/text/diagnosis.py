"""Renders a diagnosis as text: the conclusion, the findings grouped by code, then the layers.

Everything that comes from a record (layer names above all) is untrusted: it is stripped of control characters and never
parsed as markup. The layout depends on the width of the output and on the characters that it can show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnlab.records import Cause, DiagnosisRecord, Finding, Level, Quantity
from bnlab.report.phrases import LEVEL_WORDS, remedy_phrase
from bnlab.report.rows import by_code, findings_at_least, metric_rows, outcomes_of
from bnlab.report.shortening import plain
from bnlab.report.text import layers
from bnlab.report.text.sheet import Report, Sheet, write
from bnlab.wording import abridged, and_more, counted

__all__ = ["render", "renderable", "summary_line"]

_STYLES = {Level.ERROR: "bold red", Level.WARNING: "bold yellow", Level.INFO: "bold blue"}
_MAX_FINDINGS = 10
_MAX_NOTES = 12
_MAX_CAUSE_LAYERS = 2
_SMALLEST_SHARE = 0.01
_WIDEST_CHANNELS = 16


def render(
    diagnosis: DiagnosisRecord, *, level: Level = Level.INFO, width: int = 80, encoding: str | None = None
) -> str:
    """Return the report as plain text.

    Args:
        diagnosis: The diagnosis.
        level: Findings below this level are only counted.
        width: Largest width of a line, in columns.
        encoding: Encoding that the text must fit; None for the encoding of standard output.
    """
    return write(renderable(diagnosis, level=level), width=width, encoding=encoding)


def renderable(diagnosis: DiagnosisRecord, *, level: Level = Level.INFO) -> RenderableType:
    """Return the report for a rich console; findings below `level` are only counted."""
    return Report(lambda sheet: _parts(diagnosis, level, sheet))


def summary_line(diagnosis: DiagnosisRecord) -> Text:
    """Return one line for a diagnosis among many: the counts, the codes of errors and warnings, or an assumption."""
    summary = diagnosis.summary
    worst = diagnosis.findings[0].level if diagnosis.findings else Level.INFO
    codes = list(dict.fromkeys(plain(f.code) for f in diagnosis.findings if f.level.at_least(Level.WARNING)))
    line = Text()
    line.append(plain(diagnosis.target.name), style="bold")
    line.append(f": {counted(summary.layers, 'layer')}, ")
    style = _STYLES[worst] if codes else "green"
    line.append(f"{counted(summary.errors, 'error')}, {counted(summary.warnings, 'warning')}", style=style)
    line.append(f", {counted(summary.infos, 'note')}" + (f" ({', '.join(codes)})" if codes else ""))
    if diagnosis.assumption is not None and not codes:
        line.append(f"; {plain(diagnosis.assumption)}")
    return line


def _parts(diagnosis: DiagnosisRecord, level: Level, sheet: Sheet) -> Iterable[RenderableType]:
    shown = findings_at_least(diagnosis, level)
    yield from (_head(diagnosis, sheet), Text(sheet.plain(diagnosis.conclusion) + ".", style="bold"), Text())
    yield from _numbers(diagnosis)
    yield from _causes(diagnosis, sheet)
    for group in by_code(shown):
        yield from (*_group(group, diagnosis, sheet), Text())
    yield from (*layers.draw(diagnosis, sheet), Text())
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
    """Yield the metric for each choice of data and statistics."""
    rows = metric_rows(diagnosis.numbers)
    if not rows:
        return
    table = _table("metric on")
    table.add_column("", justify="right", overflow="fold")
    for name, value in rows:
        table.add_row(name, f"{value:.4g}")
    yield from (table, Text())


def _causes(diagnosis: DiagnosisRecord, sheet: Sheet) -> Iterable[RenderableType]:
    """Yield the gap between train mode and eval mode, split by cause; a share may be negative."""
    shown_causes = [cause for cause in diagnosis.causes if abs(cause.share) >= _SMALLEST_SHARE]
    gaps = [gap for gap in map(layers.gap_of, diagnosis.layers) if gap is not None]
    if not (shown_causes and gaps):
        return
    yield Text(f" gap between the modes, up to {max(gaps):.2g} std", style="dim")
    table = _table("cause")
    table.add_column("share", justify="right", overflow="fold")
    table.add_column(overflow="crop")
    table.add_column("layers", overflow="fold")
    largest = max(1.0, *(abs(cause.share) for cause in shown_causes))
    for cause in shown_causes:
        bar = sheet.marks.bar(cause.share, largest=largest, cells=max(8, sheet.width // 5))
        share = Text(f"{100 * cause.share:.0f} %")
        table.add_row(Text(sheet.plain(cause.cause)), share, Text(bar, style="yellow"), _cause_layers(cause, sheet))
    yield from (table, Text())


def _cause_layers(cause: Cause, sheet: Sheet) -> Text:
    limit = _MAX_CAUSE_LAYERS * (2 if sheet.wide else 1)
    names = ", ".join(sheet.layer_name(name).plain for name in cause.layers[:limit])
    return Text(names + and_more(len(cause.layers) - limit))


def _group(findings: Sequence[Finding], diagnosis: DiagnosisRecord, sheet: Sheet) -> Iterable[RenderableType]:
    first, code = findings[0], sheet.plain(findings[0].code)
    title = Text.assemble((LEVEL_WORDS[first.level].upper(), _STYLES[first.level]), f" {code} ")
    yield title.append(f"in {counted(len(findings), 'layer')}" if first.layer is not None else "in the network")
    yield Padding(Text(sheet.plain(first.why)), (0, 0, 0, 2))
    if first.layer is None:
        for finding in findings:
            yield Padding(Text(sheet.plain(finding.message)), (0, 0, 0, 2))
    else:
        yield Padding(_findings_table(findings[:_MAX_FINDINGS], diagnosis, sheet), (0, 0, 0, 1))
    if len(findings) > _MAX_FINDINGS:
        yield Text(f"  ... and {counted(len(findings) - _MAX_FINDINGS, 'more layer')}: --format json has them all")
    remedies = sheet.plain(", ".join(map(remedy_phrase, first.remedies)))
    yield Padding(Text(f"remedy: {remedies}; bnlab explain {code}", style="dim"), (0, 0, 0, 2))


def _findings_table(findings: Sequence[Finding], diagnosis: DiagnosisRecord, sheet: Sheet) -> Table:
    """Return a table with one row per finding: the message if there is room for it, else its numbers."""
    channels = {layer.name: layer.channels for layer in diagnosis.layers}
    table = _table("layer", "channels", *(("finding",) if sheet.wide else ("measured", "threshold")))
    table.columns[0].no_wrap, table.columns[0].overflow = True, "crop"
    for finding in findings:
        cells = [sheet.plain(finding.message)]
        if not sheet.wide:
            cells = [_quantities(quantities, sheet) for quantities in (finding.measured, finding.threshold)]
        width = channels.get(finding.layer or "", 0)
        table.add_row(
            sheet.layer_name(finding.layer or ""), _channels(finding.channels, width, sheet), *map(Text, cells)
        )
    return table


def _table(*headers: str) -> Table:
    """Return a table whose cells wrap, because rich cuts text with a character that not every output can show."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _tail(diagnosis: DiagnosisRecord, sheet: Sheet, *, hidden: int) -> Iterable[RenderableType]:
    for note in diagnosis.notes[:_MAX_NOTES]:
        yield Text(sheet.plain(note), style="dim")
    if len(diagnosis.notes) > _MAX_NOTES:
        yield Text(f"... and {counted(len(diagnosis.notes) - _MAX_NOTES, 'more note')}: --format json has them all")
    outcomes = outcomes_of(diagnosis)
    for outcome in outcomes.crashed:
        yield Text(sheet.plain(f"{outcome.code} crashed: {outcome.reason or ''}"), style="bold red")
    for reason, codes in outcomes.skipped.items():
        yield Text(sheet.plain(f"{', '.join(codes)} skipped: {reason}"), style="dim")
    passed = len(outcomes.passed)
    summary = diagnosis.summary
    counts = ", ".join(
        counted(number, noun)
        for number, noun in ((summary.errors, "error"), (summary.warnings, "warning"), (summary.infos, "note"))
    )
    below = f" ({hidden} not shown: --level info)" if hidden else ""
    yield Text(f"{counts}{below}; {passed} of {counted(len(diagnosis.outcomes), 'check')} passed")


def _channels(channels: Sequence[int] | None, width: int, sheet: Sheet) -> str:
    if channels is None:
        return "-"
    if len(channels) == width:
        return f"all {width}"
    limit = 8 if sheet.wide else 4
    indices = f"{len(channels)} of {width}: {abridged(list(map(str, channels)), limit)}"
    return indices if len(indices) <= _WIDEST_CHANNELS * (2 if sheet.wide else 1) else f"{len(channels)} of {width}"


def _quantities(quantities: Mapping[str, Quantity], sheet: Sheet) -> str:
    return "\n".join(f"{sheet.plain(name)} {quantity.value:.3g}" for name, quantity in quantities.items())
