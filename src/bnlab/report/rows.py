"""Selects and orders what every report shows of a diagnosis: findings, layers, metric and outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bnlab.records import DiagnosisRecord, Finding, Level, Numbers, Outcome, Status

__all__ = ["Outcomes", "findings_at_least", "layers_to_show", "main_cause", "metric_rows", "outcomes_of", "root_gap"]


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of the checks, by status.

    Attributes:
        crashed: The outcomes of checks that crashed.
        skipped: The codes of skipped checks, by reason.
        passed: The codes of checks that passed.
        with_findings: The codes of checks with findings.
    """

    crashed: tuple[Outcome, ...]
    skipped: Mapping[str, tuple[str, ...]]
    passed: tuple[str, ...]
    with_findings: tuple[str, ...]


def findings_at_least(diagnosis: DiagnosisRecord, level: Level) -> list[Finding]:
    """Return the findings to show: those that are at least as severe as the level."""
    return [finding for finding in diagnosis.findings if finding.level.at_least(level)]


def layers_to_show(with_findings: Sequence[bool], limit: int) -> list[int]:
    """Return the indices of the layers to show, in ascending order. Layers with findings take precedence.

    Args:
        with_findings: For each layer, whether it has findings.
        limit: Largest number of layers to show.
    """
    return sorted(sorted(range(len(with_findings)), key=lambda index: (not with_findings[index], index))[:limit])


def metric_rows(numbers: Numbers | None) -> list[tuple[str, float]]:
    """Return the metric for each choice of data and statistics that was measured."""
    if numbers is None:
        return []
    rows = (
        ("training data, batch statistics", numbers.train_batch),
        ("training data, running statistics", numbers.train_running),
        ("training data, recalibrated statistics", numbers.train_recalibrated),
        ("data, batch statistics", numbers.eval_batch),
        ("data, running statistics (eval mode)", numbers.eval_running),
        ("data, recalibrated statistics", numbers.eval_recalibrated),
    )
    return [(name, value) for name, value in rows if value is not None]


def outcomes_of(diagnosis: DiagnosisRecord) -> Outcomes:
    """Return the outcomes by status, with skipped checks grouped by reason."""
    by_status = {status: [o for o in diagnosis.outcomes if o.status is status] for status in Status}
    reasons = dict.fromkeys(outcome.reason or "" for outcome in by_status[Status.SKIPPED])
    return Outcomes(
        crashed=tuple(by_status[Status.CRASHED]),
        skipped={
            reason: tuple(o.code for o in by_status[Status.SKIPPED] if (o.reason or "") == reason) for reason in reasons
        },
        passed=tuple(outcome.code for outcome in by_status[Status.PASSED]),
        with_findings=tuple(outcome.code for outcome in by_status[Status.FINDINGS]),
    )


def root_gap(gap: Mapping[str, float]) -> float:
    """Return the root of the total of a gap, in standard deviations. Gaps are stored as mean squares."""
    return float(max(gap.get("total", 0.0), 0.0) ** 0.5)


def main_cause(gap: Mapping[str, float] | None) -> str:
    """Return the cause with the largest part of a gap; "" if the gap was not measured, or is not positive."""
    parts = {cause: square for cause, square in (gap or {}).items() if cause != "total" and square > 0}
    return max(parts, key=parts.__getitem__) if parts else ""
