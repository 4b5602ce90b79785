"""A diagnosis as text: the conclusion, the findings grouped by code, then the layers.

Everything that comes from a file (layer names above all) is untrusted: it is stripped of control characters and never
parsed as markup.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnlab.records import REMEDIES, DiagnosisRecord, Finding, LayerRecord, Level, Quantity, Safety, Status

__all__ = ["SAFETY_PHRASES", "plain", "render", "renderable", "summary_line"]

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
_SMALLEST_SHARE = 0.01
_WIDEST_NAME = 28
_WIDEST_CHANNELS = 16


def plain(text: str) -> str:
    """Return untrusted text without control, format and private characters: no escape reaches the terminal."""
    return "".join(char if unicodedata.category(char)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for char in text)


def render(diagnosis: DiagnosisRecord, *, level: Level = Level.INFO, width: int = 80) -> str:
    """Return the report as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(renderable(diagnosis, level=level))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def renderable(diagnosis: DiagnosisRecord, *, level: Level = Level.INFO) -> RenderableType:
    """Return the report for a rich console; findings below `level` are counted only."""
    shown = [finding for finding in diagnosis.findings if finding.level.at_least(level)]
    parts: list[RenderableType] = [_head(diagnosis), Text(plain(diagnosis.conclusion) + ".", style="bold"), Text()]
    parts += _gap(diagnosis)
    for _, group in groupby(shown, key=lambda finding: finding.code):
        parts += [*_group(list(group), diagnosis), Text()]
    parts += [_layers(diagnosis), Text(), *_tail(diagnosis, hidden=len(diagnosis.findings) - len(shown))]
    return Group(*parts)


def summary_line(diagnosis: DiagnosisRecord) -> Text:
    """Return one line for a diagnosis among many: the counts, and the codes of errors and warnings."""
    summary = diagnosis.summary
    worst = diagnosis.findings[0].level if diagnosis.findings else Level.INFO
    codes = list(dict.fromkeys(f.code for f in diagnosis.findings if f.level.at_least(Level.WARNING)))
    line = Text()
    line.append(plain(diagnosis.target.name), style="bold")
    line.append(f": {_count(summary.layers, 'layer')}, ")
    style = _STYLES[worst] if codes else "green"
    line.append(f"{_count(summary.errors, 'error')}, {_count(summary.warnings, 'warning')}", style=style)
    line.append(f", {_count(summary.infos, 'note')}" + (f" ({', '.join(codes)})" if codes else ""))
    return line


def _head(diagnosis: DiagnosisRecord) -> Text:
    summary = diagnosis.summary
    networks = len({layer.network for layer in diagnosis.layers})
    dtypes = ", ".join(dict.fromkeys(layer.dtype for layer in diagnosis.layers))
    among = f" in {networks} networks" if networks > 1 else ""
    name = Text(plain(diagnosis.target.name), style="bold cyan")
    counts = f"{_count(summary.layers, 'BN layer')}{among}, {_count(summary.channels, 'channel')}, {dtypes}"
    return Text.assemble(name, f"\n{counts}\n")


def _gap(diagnosis: DiagnosisRecord) -> Iterable[RenderableType]:
    """Draw the metric under four choices, and the gap between train mode and eval mode split by cause."""
    numbers = diagnosis.numbers
    if numbers is not None:
        table = Table(box=None, padding=(0, 1), header_style="dim")
        rows = [
            ("training data, batch statistics", numbers.train_batch),
            ("data, batch statistics", numbers.eval_batch),
            ("data, running statistics (eval mode)", numbers.eval_running),
            ("data, recalibrated statistics", numbers.eval_recalibrated),
        ]
        table.add_column("metric on")
        table.add_column("", justify="right")
        for name, value in rows:
            if value is not None:
                table.add_row(name, f"{value:.4g}")
        yield from (table, Text())
    told = [cause for cause in diagnosis.causes if abs(cause.share) >= _SMALLEST_SHARE]
    gaps = [layer.gap["total"] for layer in diagnosis.layers if layer.gap is not None]
    if told and gaps:
        worst = max(gaps) ** 0.5
        table = Table(box=None, padding=(0, 1), header_style="dim")
        table.add_column(f"gap between the modes, up to {worst:.2g} std")
        table.add_column("share", justify="right")
        table.add_column("layers", no_wrap=True)
        for cause in told:
            names = ", ".join(str(_layer_name(name)) for name in cause.layers[:_MOST_CAUSE_LAYERS])
            rest = len(cause.layers) - _MOST_CAUSE_LAYERS
            table.add_row(cause.cause, f"{100 * cause.share:.0f} %", names + (f" and {rest} more" if rest > 0 else ""))
        yield from (table, Text())


def _group(findings: Sequence[Finding], diagnosis: DiagnosisRecord) -> Iterable[RenderableType]:
    first = findings[0]
    title = Text.assemble((_HEADINGS[first.level], _STYLES[first.level]), f" {first.code} ")
    yield title.append(f"in {_count(len(findings), 'layer')}" if first.layer is not None else "in the network")
    yield Padding(Text(first.why), (0, 0, 0, 2))
    if first.layer is None:
        for finding in findings:
            yield Padding(Text(plain(finding.message)), (0, 0, 0, 2))
    else:
        yield Padding(_findings_table(findings[:_MOST_FINDINGS], diagnosis), (0, 0, 0, 1))
    if len(findings) > _MOST_FINDINGS:
        yield Text(f"  ... and {_count(len(findings) - _MOST_FINDINGS, 'more layer')}: --format json has them all")
    yield Text(f"  remedy: {', '.join(map(_remedy, first.remedies))}; bnlab explain {first.code}", style="dim")


def _remedy(name: str) -> str:
    """Return a remedy with what it may do, as "recalibrate (buffers only)"."""
    safety = REMEDIES.get(name, Safety.MANUAL)
    return name if safety is Safety.MANUAL else f"{name} ({SAFETY_PHRASES[safety]})"


def _findings_table(findings: Sequence[Finding], diagnosis: DiagnosisRecord) -> Table:
    widths = {layer.name: layer.channels for layer in diagnosis.layers}
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("layer", no_wrap=True)
    table.add_column("channels")
    table.add_column("measured")
    table.add_column("threshold")
    for finding in findings:
        table.add_row(
            _layer_name(finding.layer or ""),
            _channels(finding.channels, widths.get(finding.layer or "", 0)),
            _quantities(finding.measured.items()),
            _quantities(finding.threshold.items()),
        )
    return table


def _layers(diagnosis: DiagnosisRecord) -> RenderableType:
    """Draw the layers: all of them if they are few, else those with findings first."""
    codes: dict[str, list[str]] = {}
    for finding in diagnosis.findings:
        if finding.layer is not None:
            codes.setdefault(finding.layer, []).append(finding.code)
    layers = list(diagnosis.layers)
    if len(layers) > _MOST_LAYERS:
        kept = sorted(range(len(layers)), key=lambda index: (layers[index].name not in codes, index))[:_MOST_LAYERS]
        layers = [layers[index] for index in sorted(kept)]
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("layer", no_wrap=True)
    for header in ("chan.", "batches", "running_var"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("findings", no_wrap=True, min_width=len("BN101 BN102"))
    for layer in layers:
        table.add_row(*_layer_row(layer), Text(_codes(codes.get(layer.name, [])), style="yellow"))
    hidden = len(diagnosis.layers) - len(layers)
    more = [Text(f"  ... and {_count(hidden, 'more layer')}: --format json has them all")] if hidden else []
    return Group(table, *more)


def _layer_row(layer: LayerRecord) -> tuple[Text, str, str, str]:
    counter = "-" if layer.num_batches_tracked is None else str(layer.num_batches_tracked)
    var = layer.running_var
    between = "not finite" if var is None else f"{var.min:.2g} .. {var.max:.2g}"
    return _layer_name(layer.name), str(layer.channels), counter, between


def _codes(codes: Sequence[str]) -> str:
    return " ".join(codes) if len(codes) <= 2 else f"{codes[0]} +{len(codes) - 1}"


def _tail(diagnosis: DiagnosisRecord, *, hidden: int) -> Iterable[RenderableType]:
    for note in diagnosis.notes[:_MOST_NOTES]:
        yield Text(plain(note), style="dim")
    if len(diagnosis.notes) > _MOST_NOTES:
        yield Text(f"... and {_count(len(diagnosis.notes) - _MOST_NOTES, 'more note')}: --format json has them all")
    by_status = {status: [o for o in diagnosis.outcomes if o.status is status] for status in Status}
    for outcome in by_status[Status.CRASHED]:
        yield Text(f"{outcome.code} crashed: {plain(outcome.reason or '')}", style="bold red")
    skipped: dict[str, list[str]] = {}
    for outcome in by_status[Status.SKIPPED]:
        skipped.setdefault(plain(outcome.reason or ""), []).append(outcome.code)
    for reason, codes in skipped.items():
        yield Text(f"{', '.join(codes)} skipped: {reason}", style="dim")
    passed = len(by_status[Status.PASSED])
    summary = diagnosis.summary
    counts = ", ".join(
        _count(number, noun)
        for number, noun in ((summary.errors, "error"), (summary.warnings, "warning"), (summary.infos, "note"))
    )
    below = f" ({hidden} not shown: --level info)" if hidden else ""
    yield Text(f"{counts}{below}; {passed} of {_count(len(diagnosis.outcomes), 'check')} passed")


def _layer_name(name: str) -> Text:
    """Return a layer path that fits its column.

    Parts without a digit shrink to their first letter, the first ones first: the digits tell the layers apart. What is
    still too long loses its beginning.
    """
    parts = (plain(name) or "(the module itself)").split(".")
    for index, part in enumerate(parts[:-1]):
        if cell_len(".".join(parts)) <= _WIDEST_NAME:
            break
        if part and not any(map(str.isdigit, part)):
            parts[index] = part[0]
    short = ".".join(parts)
    while cell_len(short) > _WIDEST_NAME:
        short = "\N{HORIZONTAL ELLIPSIS}" + short[1 + max(1, (cell_len(short) - _WIDEST_NAME) // 2) :]
    return Text(short)


def _channels(channels: Sequence[int] | None, width: int) -> str:
    if channels is None:
        return "-"
    if len(channels) == width:
        return f"all {width}"
    listed = ", ".join(map(str, channels[:4])) + (", ..." if len(channels) > 4 else "")
    told = f"{len(channels)} of {width}: {listed}"
    return told if len(told) <= _WIDEST_CHANNELS else f"{len(channels)} of {width}"


def _quantities(quantities: Iterable[tuple[str, Quantity]]) -> str:
    return "\n".join(f"{name} {quantity.value:.3g}" for name, quantity in quantities)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
