"""What an experiment found, as text: each claim with its verdict and the numbers that decide it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from bnlab.records import ClaimRecord, Estimate, ExperimentRecord, Verdict
from bnlab.report.text import plain

__all__ = ["render", "renderable"]

_STYLES = {Verdict.SUPPORTED: "bold green", Verdict.REFUTED: "bold red", Verdict.DEPENDS: "bold yellow"}
_MOST_ESTIMATES = 9


def render(record: ExperimentRecord, *, width: int = 100) -> str:
    """Return the report as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(renderable(record))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def renderable(record: ExperimentRecord) -> RenderableType:
    """Return the report for a rich console."""
    head = Text.assemble((plain(record.name), "bold cyan"), f"  {plain(record.title)}")
    profile = f"{record.profile}, seeds {record.seeds[0]} to {record.seeds[-1]}, {record.seconds:.0f} s"
    parts: list[RenderableType] = [head, Text(f"{plain(record.source)} ({profile})", style="dim"), Text()]
    for claim in record.claims:
        parts += [*_claim(claim), Text()]
    parts += [Text(plain(note), style="dim") for note in record.notes]
    return Group(*parts)


def _claim(claim: ClaimRecord) -> Iterable[RenderableType]:
    yield Text.assemble((claim.verdict.value.upper(), _STYLES[claim.verdict]), f"  {plain(claim.text)}")
    if claim.boundary is not None:
        yield Padding(Text(plain(claim.boundary), style="bold"), (0, 0, 0, 2))
    yield Padding(Text(f"{plain(claim.number)}: {_expected(claim)}"), (0, 0, 0, 2))
    for estimate in _shown(claim.estimates):
        yield Padding(Text(_estimate(estimate)), (0, 0, 0, 4))
    hidden = len(claim.estimates) - len(_shown(claim.estimates))
    if hidden:
        yield Padding(Text(f"... and {hidden} more in the record", style="dim"), (0, 0, 0, 4))


def _expected(claim: ClaimRecord) -> str:
    low, high = claim.low, claim.high
    if math.isinf(high):
        return f"must be >= {low:.4g} {claim.unit}"
    return f"must be <= {high:.4g} {claim.unit}" if math.isinf(low) else f"must be {low:.6g} to {high:.6g} {claim.unit}"


def _shown(estimates: Sequence[Estimate]) -> Sequence[Estimate]:
    """Return the estimates to show: all if they are few, else the ends and those on either side of a turn."""
    if len(estimates) <= _MOST_ESTIMATES:
        return estimates
    last = len(estimates) - 1
    turns = {i for i in range(last) if estimates[i].holds is not estimates[i + 1].holds}
    wanted = {0, last} | turns | {i + 1 for i in turns}
    return [estimates[i] for i in sorted(wanted)][:_MOST_ESTIMATES]


def _estimate(estimate: Estimate) -> str:
    word = {True: "holds", False: "fails", None: "turns with the seed"}[estimate.holds]
    label = f"{plain(estimate.condition)}: " if estimate.condition else ""
    spread = "" if estimate.low == estimate.high else f" [{estimate.low:.4g}, {estimate.high:.4g}]"
    return f"{label}{estimate.mean:.6g}{spread} {word}"
