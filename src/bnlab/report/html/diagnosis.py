"""A diagnosis as a page: the conclusion, the network, what was found, and every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bnlab.records import DiagnosisRecord, Finding, Level, Numbers, Status
from bnlab.report.html import causes as _causes
from bnlab.report.html import findings as _findings
from bnlab.report.html import layer_data as _layer_data
from bnlab.report.html import layer_table as _layer_table
from bnlab.report.html import network as _network
from bnlab.report.html.columns import Shown
from bnlab.report.html.environment import page
from bnlab.report.html.markers import LEVEL_WORDS, Marked, by_layer
from bnlab.report.html.network import Network

__all__ = ["Outcomes", "network_of", "number_cards", "outcomes", "render", "render_many"]


_MOST_ROWS = 2_000
"""Of findings, over all targets of a page."""


@dataclass(frozen=True)
class Outcomes:
    """What became of the checks.

    Attributes:
        crashed: Code and reason of each check that crashed.
        skipped: The codes for each reason.
        passed: The codes.
        found: The codes.
    """

    crashed: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    passed: tuple[str, ...]
    found: tuple[str, ...]


@dataclass(frozen=True)
class _Target:
    """A diagnosis among many: its findings by code, and how many of each level."""

    record: DiagnosisRecord
    groups: list[_findings.Group]
    codes: str
    hidden: int


def render(record: DiagnosisRecord, *, level: Level = Level.INFO) -> str:
    """Return one self-contained page.

    Args:
        record: What to draw.
        level: Findings below it are counted only.

    Raises:
        MissingPackage: If jinja2 is not installed.
    """
    shown = _shown(record, level)
    marked = by_layer(shown, [layer.name for layer in record.layers])
    return page(
        "diagnosis.html.j2",
        record=record,
        cards=number_cards(record.numbers),
        slices=_causes.slices(record.causes),
        network=network_of(record, marked),
        groups=_findings.groups(record, shown),
        hidden=len(record.findings) - len(shown),
        words=LEVEL_WORDS,
        headers=_layer_table.headers(record.layers),
        rows=_layer_table.rows(record.layers, marked),
        outcomes=outcomes(record),
        data=_layer_data.layer_data(record, marked),
    )


def render_many(records: Sequence[DiagnosisRecord], *, level: Level = Level.INFO) -> str:
    """Return one self-contained page of several targets: a table of them, then the findings of each.

    Args:
        records: In the order in which they are shown.
        level: Findings below it are counted only.

    Raises:
        MissingPackage: If jinja2 is not installed.
    """
    return page(
        "diagnoses.html.j2",
        targets=[_target(record, level, _MOST_ROWS // max(1, len(records))) for record in records],
        totals=_totals(records),
        words=LEVEL_WORDS,
    )


def network_of(record: DiagnosisRecord, marked: Sequence[Marked] | None = None) -> Network | None:
    """Return the network of a diagnosis as it is drawn; None where there is nothing to draw.

    Args:
        record: The diagnosis.
        marked: The findings of each layer that are marked; all of them if not given.
    """
    if marked is None:
        marked = by_layer(record.findings, [layer.name for layer in record.layers])
    return _network.draw(
        [
            Shown(layer.name, (layer.gap,), layer.running_var, found)
            for layer, found in zip(record.layers, marked, strict=True)
        ]
    )


def number_cards(numbers: Numbers | None) -> list[tuple[str, float]]:
    """Return the metric under each choice of data and statistics that was measured."""
    if numbers is None:
        return []
    named = [
        ("training data, batch statistics", numbers.train_batch),
        ("data, batch statistics", numbers.eval_batch),
        ("data, running statistics (eval mode)", numbers.eval_running),
        ("data, recalibrated statistics", numbers.eval_recalibrated),
    ]
    return [(name, value) for name, value in named if value is not None]


def outcomes(record: DiagnosisRecord) -> Outcomes:
    """Return what became of the checks, those that were skipped for one reason together."""
    by_status = {status: [o for o in record.outcomes if o.status is status] for status in Status}
    skipped: dict[str, list[str]] = {}
    for outcome in by_status[Status.SKIPPED]:
        skipped.setdefault(outcome.reason or "", []).append(outcome.code)
    return Outcomes(
        crashed=tuple((outcome.code, outcome.reason or "") for outcome in by_status[Status.CRASHED]),
        skipped=tuple((", ".join(codes), reason) for reason, codes in skipped.items()),
        passed=tuple(outcome.code for outcome in by_status[Status.PASSED]),
        found=tuple(outcome.code for outcome in by_status[Status.FINDINGS]),
    )


def _shown(record: DiagnosisRecord, level: Level) -> list[Finding]:
    return [finding for finding in record.findings if finding.level.at_least(level)]


def _target(record: DiagnosisRecord, level: Level, room: int) -> _Target:
    shown = _shown(record, level)
    codes = " ".join(dict.fromkeys(finding.code for finding in shown))
    return _Target(record, _findings.groups(record, shown, room=room), codes, len(record.findings) - len(shown))


def _totals(records: Sequence[DiagnosisRecord]) -> Counter[str]:
    """Return the counts of all targets together."""
    totals: Counter[str] = Counter(targets=len(records))
    for record in records:
        found = record.summary
        totals.update(layers=found.layers, errors=found.errors, warnings=found.warnings, infos=found.infos)
    return totals
