"""Makes the advice to recalibrate agree with the numbers: findings, conclusion and repair follow one verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bnlab.observe.model_evidence import ModelEvidence
from bnlab.records import Advice, Finding, Numbers, StatisticsVerdict
from bnlab.wording import OTHER_DIRECTION

__all__ = ["ON_STATISTICS", "advised", "effect_of_recalibrating", "trained_with_statistics"]

ON_STATISTICS = ("BN104", "BN105", "BN109", "BN301", "BN401")
"""Codes of findings on running statistics, on which the verdict decides."""

_WITHOUT_VERDICT = ("BN101", "BN102", "BN304")
"""Codes of statistics that are no numbers, no variances or other numbers: recalibration is right whatever the loss."""


def advised(findings: Sequence[Finding], evidence: ModelEvidence | None) -> list[Finding]:
    """Return the findings without the remedy recalibrate where the verdict on the statistics does not advise it.

    Findings on a checkpoint, or on a model without data, keep their remedies: nothing contradicts them.
    """
    if evidence is None or not any(layer.data is not None for layer in evidence.layers):
        return list(findings)
    verdict = evidence.statistics

    def agrees(finding: Finding) -> bool:
        if "recalibrate" not in finding.remedies or finding.code in _WITHOUT_VERDICT:
            return True
        return verdict is not None and verdict.advises(finding.layer)

    return [finding if agrees(finding) else _without_recalibrate(finding) for finding in findings]


def _without_recalibrate(finding: Finding) -> Finding:
    others = tuple(name for name in finding.remedies if name != "recalibrate")
    return dataclasses.replace(finding, remedies=others or ("manual",))


def effect_of_recalibrating(evidence: ModelEvidence, metric: str) -> str:
    """Return what recalibration brings, as the end of a conclusion; "" where no layer is stale."""
    verdict, numbers = evidence.statistics, evidence.numbers
    if verdict is None:
        return ""
    if verdict.advice is Advice.UNDECIDED:
        return "; recalibrate may help: pass labels, a loss or a metric to know"
    if verdict.advice is Advice.RECALIBRATE:
        on = " on this data" if verdict.data == "data" else ""
        if numbers is not None:
            return f"; recalibrating{on} brings {metric} {numbers.eval_recalibrated:.3g}"
        return f"; recalibrating lowers the {_loss_change(verdict, numbers)}"
    if verdict.advice is Advice.WORSE_ON_DATA:
        return f"; recalibrating makes this data worse ({_data_change(verdict, numbers, metric)}){_direction(verdict)}"
    if verdict.advice is Advice.NO_DIFFERENCE:
        return f"; recalibrating does not help ({_data_change(verdict, numbers, metric)})"
    return ""


def trained_with_statistics(evidence: ModelEvidence) -> str:
    """Return the sentence on weights that were trained with the stored statistics; "" for others."""
    verdict = evidence.statistics
    if verdict is None or verdict.advice is not Advice.KEEP:
        return ""
    if evidence.is_ported:
        return ""
    return (
        "the weights were trained with these running statistics, in eval mode: leave them "
        f"(recalibrating changes the {_loss_change(verdict, evidence.numbers)}){_direction(verdict)}"
    )


def _direction(verdict: StatisticsVerdict) -> str:
    return f", or {OTHER_DIRECTION}" if verdict.hangs_on_metric else ""


def _loss_change(verdict: StatisticsVerdict, numbers: Numbers | None) -> str:
    where = "training data" if verdict.data == "train_data" else "data"
    running, recalibrated = (_shown(verdict, value, numbers) for value in (verdict.running, verdict.recalibrated))
    return f"{verdict.decided_by} on the {where} from {running} to {recalibrated}"


def _data_change(verdict: StatisticsVerdict, numbers: Numbers | None, metric: str) -> str:
    gains = numbers is not None and numbers.is_better(numbers.eval_recalibrated, numbers.eval_running)
    if numbers is not None and not gains:
        return f"{metric} {numbers.eval_running:.3g} to {numbers.eval_recalibrated:.3g}"
    losses = verdict.running, verdict.recalibrated
    if verdict.data_running is not None:
        losses = verdict.data_running, verdict.data_recalibrated
    running, recalibrated = (_shown(verdict, value, numbers) for value in losses)
    return f"{verdict.decided_by} {running} to {recalibrated}"


def _shown(verdict: StatisticsVerdict, value: float | None, numbers: Numbers | None) -> str:
    """Write a loss, or a metric with its own sign: the verdict holds minus a metric that is better if it is higher."""
    if value is None:
        return "an unknown value"
    is_negated = verdict.by_metric and numbers is not None and not numbers.lower_is_better
    return f"{-value if is_negated else value:.3g}"
