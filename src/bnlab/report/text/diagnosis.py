"""Renders a diagnosis as text: the conclusion, the problems, then the layers.

Everything that comes from a record (layer names above all) is untrusted: it is stripped of control characters and never
parsed as markup. The layout depends on the width of the output and on the characters that it can show.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnlab.records import Cause, DiagnosisRecord, Finding, Level
from bnlab.report.phrases import LEVEL_WORDS, remedy_phrase
from bnlab.report.problems import Problem, at_least, count, counts, problems_of
from bnlab.report.rows import metric_rows, outcomes_of
from bnlab.report.shortening import plain
from bnlab.report.text import layers
from bnlab.report.text.sheet import Report, Sheet, write
from bnlab.wording import abridged, and_more, counted, enumerated

__all__ = ["render", "renderable", "summary_line"]

_STYLES = {Level.ERROR: "bold red", Level.WARNING: "bold yellow", Level.INFO: "bold blue"}
_MAX_PROBLEMS = 20
_MAX_NOTES = 12
_MAX_CAUSE_LAYERS = 2
_MAX_PROBLEM_LAYERS = 6
_MAX_MESSAGES = 4
_MAX_SYMPTOMS = 5
_MAX_CHANNELS = 8
_SMALLEST_SHARE = 0.01


def render(
    diagnosis: DiagnosisRecord, *, level: Level = Level.INFO, width: int = 80, encoding: str | None = None
) -> str:
    """Return the report as plain text.

    Args:
        diagnosis: The diagnosis.
        level: Problems below this level are only counted.
        width: Largest width of a line, in columns.
        encoding: Encoding that the text must fit; None for the encoding of standard output.
    """
    return write(renderable(diagnosis, level=level), width=width, encoding=encoding)


def renderable(diagnosis: DiagnosisRecord, *, level: Level = Level.INFO) -> RenderableType:
    """Return the report for a rich console; problems below `level` are only counted."""
    return Report(lambda sheet: _parts(diagnosis, level, sheet))


def summary_line(diagnosis: DiagnosisRecord) -> Text:
    """Return one line for a diagnosis among many.

    It holds the counts of problems, and the codes of errors and warnings. Without any it holds the assumption, or the
    conclusion on a file without layers.
    """
    problems = problems_of(diagnosis)
    serious = at_least(problems, Level.WARNING)
    codes = list(dict.fromkeys(plain(problem.code) for problem in serious))
    line = Text()
    line.append(plain(diagnosis.target.name), style="bold")
    line.append(f": {counted(diagnosis.summary.layers, 'layer')}, ")
    style = _STYLES[serious[0].level] if serious else "green"
    line.append(", ".join(count(problems, level) for level in (Level.ERROR, Level.WARNING)), style=style)
    line.append(f", {count(problems, Level.INFO)}" + (f" ({', '.join(codes)})" if codes else ""))
    remark = diagnosis.assumption if diagnosis.layers else diagnosis.conclusion
    if remark is not None and not codes:
        line.append(f"; {plain(remark)}")
    return line


def _parts(diagnosis: DiagnosisRecord, level: Level, sheet: Sheet) -> Iterable[RenderableType]:
    problems = problems_of(diagnosis)
    shown = at_least(problems, level)
    yield from (_head(diagnosis, sheet), Text(sheet.plain(diagnosis.conclusion) + ".", style="bold"), Text())
    yield from _numbers(diagnosis)
    yield from _causes(diagnosis, sheet)
    for problem in shown[:_MAX_PROBLEMS]:
        yield from (*_problem(problem, diagnosis, sheet), Text())
    if len(shown) > _MAX_PROBLEMS:
        yield Text(f"... and {counted(len(shown) - _MAX_PROBLEMS, 'more problem')}: --format json has them all\n")
    yield from (*layers.draw(diagnosis, problems, sheet), Text()) if diagnosis.layers else ()
    yield from _tail(diagnosis, problems, sheet, hidden=len(problems) - len(shown))


def _head(diagnosis: DiagnosisRecord, sheet: Sheet) -> Text:
    summary = diagnosis.summary
    networks = len({layer.network for layer in diagnosis.layers})
    dtypes = dict.fromkeys(sheet.plain(layer.dtype) for layer in diagnosis.layers if layer.dtype != "none")
    among = f" in {networks} networks" if networks > 1 else ""
    name = Text(sheet.plain(diagnosis.target.name), style="bold cyan")
    counts = ", ".join([counted(summary.layers, "BN layer") + among, counted(summary.channels, "channel"), *dtypes])
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


def _problem(problem: Problem, diagnosis: DiagnosisRecord, sheet: Sheet) -> Iterable[RenderableType]:
    """Yield a problem: its cause with the worst layer, the consequence, the layers and the remedies."""
    worst, code = problem.worst, sheet.plain(problem.code)
    title = Text.assemble((LEVEL_WORDS[problem.level].upper(), _STYLES[problem.level]), f" {code} ")
    title.append(f"{problem.name} {problem.where}" if problem.name else problem.where)
    symptoms = [sheet.plain(symptom) for symptom in problem.symptoms]
    yield title.append(f", also {enumerated(symptoms, _MAX_SYMPTOMS)}" if symptoms else "")
    if worst.layer is None:
        yield from (_indented(sheet.plain(message)) for message in problem.messages[:_MAX_MESSAGES])
        if len(problem.messages) > _MAX_MESSAGES:
            yield _indented(f"... and {counted(len(problem.messages) - _MAX_MESSAGES, 'more place')}")
    else:
        name = sheet.layer_name(worst.layer).plain
        yield _indented(f"{name}: {sheet.plain(worst.message)}{_channels(worst, diagnosis)}")
    yield _indented(sheet.plain(worst.why))
    if len(problem.layers) > 1:
        yield _indented(_layers(problem, sheet))
    remedies = sheet.plain(", ".join(map(remedy_phrase, problem.remedies)))
    yield _indented(f"remedy: {remedies}; bnlab explain {code}", style="dim")


def _layers(problem: Problem, sheet: Sheet) -> str:
    """Return the layers of a problem, each with the quantity by which it was judged if the layers differ in it."""
    limit = _MAX_PROBLEM_LAYERS * (2 if sheet.wide else 1)
    numbers = {layer: f" {quantity.value:.3g}" for layer, quantity in problem.measured.items()}
    head = "layers"
    if len(set(numbers.values())) > 1:
        head = sheet.plain(f"layers ({problem.judged}, {problem.worst.measured[problem.judged].unit})")
    else:
        numbers = {}
    names = [f"{sheet.layer_name(layer).plain}{numbers.get(layer, '')}" for layer in problem.layers[:limit]]
    return f"{head}: {', '.join(names)}{and_more(len(problem.layers) - limit)}"


def _indented(text: str, style: str = "") -> Padding:
    return Padding(Text(text, style=style), (0, 0, 0, 2))


def _channels(finding: Finding, diagnosis: DiagnosisRecord) -> str:
    """Return the indices of the channels as an aside; "" if the finding names none, or all channels of its layer."""
    width = next((layer.channels for layer in diagnosis.layers if layer.name == finding.layer), 0)
    if not finding.channels or len(finding.channels) == width:
        return ""
    noun = "channel" if len(finding.channels) == 1 else "channels"
    return f" ({noun} {abridged(list(map(str, finding.channels)), _MAX_CHANNELS)})"


def _table(*headers: str) -> Table:
    """Return a table whose cells wrap, because rich cuts text with a character that not every output can show."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _tail(
    diagnosis: DiagnosisRecord, problems: Sequence[Problem], sheet: Sheet, *, hidden: int
) -> Iterable[RenderableType]:
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
    below = f" ({hidden} not shown: --level info)" if hidden else ""
    yield Text(f"{counts(problems)}{below}; {passed} of {counted(len(diagnosis.outcomes), 'check')} passed")
