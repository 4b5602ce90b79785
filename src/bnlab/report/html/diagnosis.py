"""A diagnosis as a page: the conclusion, the network, what was found, and every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bnlab.records import DiagnosisRecord, Level
from bnlab.report.html import causes as _causes
from bnlab.report.html import findings as _findings
from bnlab.report.html import layer_data as _layer_data
from bnlab.report.html import layer_table as _layer_table
from bnlab.report.html import network as _network
from bnlab.report.html.columns import Shown
from bnlab.report.html.environment import page
from bnlab.report.html.markers import Marked, by_layer
from bnlab.report.html.network import Network
from bnlab.report.phrases import LEVEL_WORDS
from bnlab.report.rows import findings_at_least, metric_rows, outcomes_of

__all__ = ["network_of", "render", "render_many"]


_MOST_ROWS = 2_000
"""Of findings, over all targets of a page."""


@dataclass(frozen=True)
class _TargetSection:
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
    shown = findings_at_least(record, level)
    marked = by_layer(shown, [layer.name for layer in record.layers])
    return page(
        "diagnosis.html.j2",
        record=record,
        cards=metric_rows(record.numbers),
        slices=_causes.slices(record.causes),
        network=network_of(record, marked),
        groups=_findings.groups(record, shown),
        hidden=len(record.findings) - len(shown),
        words=LEVEL_WORDS,
        headers=_layer_table.headers(record.layers),
        rows=_layer_table.rows(record.layers, marked),
        outcomes=outcomes_of(record),
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


def _target(record: DiagnosisRecord, level: Level, room: int) -> _TargetSection:
    shown = findings_at_least(record, level)
    codes = " ".join(dict.fromkeys(finding.code for finding in shown))
    return _TargetSection(record, _findings.groups(record, shown, room=room), codes, len(record.findings) - len(shown))


def _totals(records: Sequence[DiagnosisRecord]) -> Counter[str]:
    """Return the counts of all targets together."""
    totals: Counter[str] = Counter(targets=len(records))
    for record in records:
        found = record.summary
        totals.update(layers=found.layers, errors=found.errors, warnings=found.warnings, infos=found.infos)
    return totals
