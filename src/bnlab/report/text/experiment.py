"""Renders an experiment as text: each claim with its verdict and the numbers that decide it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from bnlab.records import ClaimRecord, Estimate, ExperimentRecord, Verdict
from bnlab.report.phrases import expected
from bnlab.report.text.sheet import Report, Sheet, write

__all__ = ["render", "renderable"]

_STYLES = {Verdict.SUPPORTED: "bold green", Verdict.REFUTED: "bold red", Verdict.DEPENDS: "bold yellow"}
_MAX_ESTIMATES = 9


def render(record: ExperimentRecord, *, width: int = 100, encoding: str | None = None) -> str:
    """Return the report as plain text.

    Args:
        record: The experiment.
        width: Largest width of a line, in columns.
        encoding: Encoding that the text must fit; None for the encoding of standard output.
    """
    return write(renderable(record), width=width, encoding=encoding)


def renderable(record: ExperimentRecord) -> RenderableType:
    """Return the report for a rich console."""
    return Report(lambda sheet: _parts(record, sheet))


def _parts(record: ExperimentRecord, sheet: Sheet) -> Iterable[RenderableType]:
    yield Text.assemble((sheet.plain(record.name), "bold cyan"), f"  {sheet.plain(record.title)}")
    seeds = f"seeds {record.seeds[0]} to {record.seeds[-1]}" if record.seeds else "no seeds"
    profile = f"{record.profile}, {seeds}, {record.seconds:.0f} s"
    yield Text(sheet.plain(f"{record.source} ({profile})"), style="dim")
    yield Text()
    for claim in record.claims:
        yield from (*_claim(claim, sheet), Text())
    yield from (Text(sheet.plain(note), style="dim") for note in record.notes)


def _claim(claim: ClaimRecord, sheet: Sheet) -> Iterable[RenderableType]:
    yield Text.assemble((claim.verdict.value.upper(), _STYLES[claim.verdict]), f"  {sheet.plain(claim.text)}")
    if claim.boundary is not None:
        yield Padding(Text(sheet.plain(claim.boundary), style="bold"), (0, 0, 0, 2))
    yield Padding(Text(sheet.plain(f"{claim.number}: {expected(claim)}")), (0, 0, 0, 2))
    for estimate in _shown(claim.estimates):
        yield Padding(Text(sheet.plain(_estimate(estimate))), (0, 0, 0, 4))
    hidden = len(claim.estimates) - len(_shown(claim.estimates))
    if hidden:
        yield Padding(Text(f"... and {hidden} more in the record", style="dim"), (0, 0, 0, 4))


def _shown(estimates: Sequence[Estimate]) -> Sequence[Estimate]:
    """Return the estimates to show: all if they are few, else the ends and both sides of each change of outcome."""
    if len(estimates) <= _MAX_ESTIMATES:
        return estimates
    last = len(estimates) - 1
    turns = {i for i in range(last) if estimates[i].holds is not estimates[i + 1].holds}
    wanted = {0, last} | turns | {i + 1 for i in turns}
    return [estimates[i] for i in sorted(wanted)][:_MAX_ESTIMATES]


def _estimate(estimate: Estimate) -> str:
    label = f"{estimate.condition}: " if estimate.condition else ""
    spread = "" if estimate.low == estimate.high else f" [{estimate.low:.4g}, {estimate.high:.4g}]"
    return f"{label}{estimate.mean:.6g}{spread} {estimate.outcome}"
