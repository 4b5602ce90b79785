"""Concludes a diagnosis in one sentence: the most serious problem, its cause, and its remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnlab.checks import CHECKS
from bnlab.diagnosis.advice import ON_STATISTICS, effect_of_recalibrating, trained_with_statistics
from bnlab.observe.gap import IN_THE_STATISTICS, shares
from bnlab.observe.model_evidence import ModelEvidence
from bnlab.observe.upstream import Upstream, upstream_of
from bnlab.records import Cause, Finding, Level, Outcome, Status, Summary
from bnlab.wording import counted, enumerated

__all__ = ["concluded_causes", "conclusion"]

_PHRASES = {
    "bessel": "Bessel's correction",
    "sampling noise": "the sampling noise of the batches",
    "heterogeneity": "batches that differ from each other",
    "shift": "the shift from the training data to this data",
    "training heterogeneity": "training batches that differ from each other",
    "dropout": "dropout before BN",
    "precision": "the precision the statistics are stored in",
    "staleness": "stale statistics",
    "staleness or shift": "statistics that are stale or of other data",
}
_MAX_NAMES = 3


def concluded_causes(evidence: ModelEvidence | None, findings: Sequence[Finding]) -> tuple[Cause, ...]:
    """Return the causes of the gap, largest first; none if the evaluation batches allow no conclusion (BN403)."""
    if evidence is None or any(f.code == "BN403" and not _is_of_training_batches(f) for f in findings):
        return ()
    gaps = {layer.name: layer.gap for layer in evidence.layers if layer.gap is not None}
    return tuple(Cause(cause, share, layers) for cause, (share, layers) in shares(gaps).items())


def conclusion(
    findings: Sequence[Finding],
    outcomes: Sequence[Outcome],
    summary: Summary,
    evidence: ModelEvidence | None,
    causes: Sequence[Cause],
    *,
    metric: str,
    assumption: str | None = None,
    instead: str | None = None,
) -> str:
    """Return the conclusion as one sentence without a final stop.

    Args:
        findings: The findings, most consequential first.
        outcomes: The outcome of each check.
        summary: The counts.
        evidence: The evidence on a model; None for a checkpoint.
        causes: The causes of the gap, largest first.
        metric: Name of the metric.
        assumption: How the verdict hangs on an assumption.
        instead: What to conclude where there is neither an error nor a warning; None for what is healthy.
    """
    crashed = [outcome.code for outcome in outcomes if outcome.status is Status.CRASHED]
    crash_note = f"; {', '.join(crashed)} crashed and judged nothing" if crashed else ""
    gap = next((finding for finding in findings if finding.code == "BN301"), None)
    worst = findings[0] if findings else None
    kept = "" if evidence is None else "; ".join(_remarks(evidence))
    if worst is None or not summary.errors + summary.warnings:
        healthy = instead or _healthy(outcomes, summary, evidence, metric)
        healthy += "" if assumption is None else f"; {assumption}"
        return (f"{kept}; {healthy}" if kept else healthy) + crash_note
    crash_note = (f"; {kept}" if kept else "") + crash_note
    if evidence is not None and gap is not None and not summary.errors:
        return _of_the_gap(gap, evidence, causes, findings, metric) + crash_note
    same_code = [finding for finding in findings if finding.code == worst.code]
    where = f"{worst.layer} " if worst.layer else ""
    if len(same_code) > 1:
        where += f"and {counted(len(same_code) - 1, 'more layer')}"
    reason = _reason_of_port(worst, evidence, findings)
    advice = _advice_on(worst, evidence, metric)
    return f"{where.strip()}: {worst.message}{reason}{advice}{crash_note}".removeprefix(": ")


def _remarks(evidence: ModelEvidence) -> Iterator[str]:
    """Yield what must be known beside the findings: a run that failed, other formulas, weights that need their BN."""
    if evidence.failure is not None:
        has_data = any(layer.data is not None for layer in evidence.layers)
        left = "train_data was not used" if has_data else "only the stored numbers and the structure were checked"
        yield f"{evidence.failure.rstrip('.')}; {left}"
    others = [layer for layer in evidence.layers if layer.own_formula is not None]
    if others:
        names = enumerated([layer.name for layer in others], _MAX_NAMES)
        kinds = enumerated(list(dict.fromkeys(layer.kind for layer in others)), _MAX_NAMES)
        verb, subclass = ("is", "a subclass") if len(others) == 1 else ("are", "subclasses")
        yield (
            f"{names} {verb} {kinds}, {subclass} of BN with another formula: the statistics do not say what "
            f"{'it computes' if len(others) == 1 else 'they compute'}"
        )
    if evidence.exchanged is not None:
        yield evidence.exchanged.note
    trained_with = trained_with_statistics(evidence)
    if trained_with:
        yield trained_with


def _advice_on(finding: Finding, evidence: ModelEvidence | None, metric: str) -> str:
    if finding.code in ON_STATISTICS and evidence is not None and evidence.statistics is not None:
        return effect_of_recalibrating(evidence, metric)
    return "" if finding.remedies[0] == "manual" else f"; the remedy is {finding.remedies[0]}"


def _of_the_gap(
    gap: Finding, evidence: ModelEvidence, causes: Sequence[Cause], findings: Sequence[Finding], metric: str
) -> str:
    numbers = evidence.numbers
    if numbers is not None and numbers.is_better(numbers.eval_batch, numbers.eval_running):
        first = (
            f"{metric} is {numbers.eval_running:.3g} with running statistics against {numbers.eval_batch:.3g} with "
            "batch statistics on the same data"
        )
    else:
        first = f"{gap.layer}: {gap.message.partition(',')[0]}" if gap.layer else gap.message
    upstream = _training_groups(findings) or _other_eps(findings, evidence)
    if upstream:
        return f"{first}; {upstream}"
    port = _reason_of_port(gap, evidence, findings)
    if port:
        return f"{first}{port}{effect_of_recalibrating(evidence, metric)}"
    if not causes:
        return f"{first}; the batches of data differ from each other, so no cause can be concluded: shuffle data"
    verdict = evidence.statistics
    in_statistics = causes[0].cause in IN_THE_STATISTICS
    layers = verdict.layers if verdict is not None and in_statistics else causes[0].layers
    source = f"{100 * _share(causes, layers, evidence):.0f} % of the gap comes from "
    source += _source(causes[0].cause, layers, evidence) + _few_values(causes[0].cause, findings) + _padding(findings)
    return f"{first}; {source}{effect_of_recalibrating(evidence, metric)}"


def _share(causes: Sequence[Cause], names: Sequence[str], evidence: ModelEvidence) -> float:
    """Return the share of the first cause, and of the others that have the same source upstream."""
    upstream = next((upstream_of(layer) for layer in evidence.layers if layer.name in names[:1]), None)
    if upstream is None or causes[0].cause not in upstream.causes:
        return causes[0].share
    return sum(cause.share for cause in causes if cause.cause in upstream.causes)


def _few_values(cause: str, findings: Sequence[Finding]) -> str:
    """Return which layers see too few values for their statistics, where sampling noise is the cause."""
    few = [f for f in findings if f.code == "BN208" and f.layer is not None]
    if cause != "sampling noise" or not few:
        return ""
    count = min(finding.measured["count"].value for finding in few)
    names = enumerated([str(finding.layer) for finding in few], _MAX_NAMES)
    return f": {names} get {count:.3g} values per channel in a batch"


def _padding(findings: Sequence[Finding]) -> str:
    """Return which statistics count padding, as a part of a conclusion; "" where none certainly do."""
    padded = [f.layer for f in findings if f.code == "BN404" and f.level is Level.WARNING and f.layer is not None]
    if not padded:
        return ""
    return f"; the statistics of {enumerated(padded, _MAX_NAMES)} count the padding of the training data"


def _is_of_training_batches(finding: Finding) -> bool:
    return "training batches" in finding.message


def _training_groups(findings: Sequence[Finding]) -> str:
    """Return that the training batches differ from each other, with the way out; "" where they do not."""
    grouped = next((f for f in findings if f.code == "BN403" and _is_of_training_batches(f)), None)
    if grouped is None:
        return ""
    groups = grouped.measured.get("groups")
    kinds = "groups or order" if groups is None else f"{groups.value:.0f} groups"
    return (
        f"the training batches differ from each other ({kinds}), so that the running statistics fit none of them: "
        "shuffle, or use one BN per group"
    )


def _reason_of_port(finding: Finding, evidence: ModelEvidence | None, findings: Sequence[Finding]) -> str:
    """Return which mistake of a port is behind a finding on the statistics, as a part of a conclusion; "" for none."""
    if evidence is None or evidence.port is None or finding.code not in ("BN102", *ON_STATISTICS):
        return ""
    return f"; the reason is {evidence.port.fault}" if any(other.code == "BN304" for other in findings) else ""


def _other_eps(findings: Sequence[Finding], evidence: ModelEvidence) -> str:
    """Return that the network was trained with another eps, with the way out; "" where it was not."""
    finding = next((f for f in findings if f.code == "BN303"), None)
    if finding is None:
        return ""
    own = sorted({layer.eps for layer in evidence.layers if finding.layer in (None, layer.name)})
    where = f" in {finding.layer}" if finding.layer else ""
    return (
        f"the running statistics are those of a network with eps {finding.measured['eps'].value:g}{where}, and eps is "
        f"{enumerated([f'{eps:g}' for eps in own], _MAX_NAMES)}; the remedy is set-eps, which changes behaviour"
    )


def _source(cause: str, names: Sequence[str], evidence: ModelEvidence) -> str:
    """Return a cause as a phrase with its layers; what is upstream of stale statistics comes in their place."""
    layers = {layer.name: layer for layer in evidence.layers}
    sources: dict[Upstream, list[str]] = {}
    for name in names:
        upstream = upstream_of(layers[name])
        known = upstream if upstream is not None and cause in upstream.causes else Upstream(cause, _PHRASES[cause])
        sources.setdefault(known, []).append(name)
    if not sources:
        return _PHRASES[cause]
    return " and ".join(
        f"{source.fault} in {enumerated(of, _MAX_NAMES)}" + (f" ({source.detail})" if source.detail else "")
        for source, of in list(sources.items())[:2]
    )


def _healthy(outcomes: Sequence[Outcome], summary: Summary, evidence: ModelEvidence | None, metric: str) -> str:
    judged = sum(outcome.status in (Status.PASSED, Status.FINDINGS) for outcome in outcomes)
    layers = counted(summary.layers, "BN layer")
    coverage = f"{judged} of {len(CHECKS)} checks"
    if evidence is None or not any(layer.data is not None for layer in evidence.layers):
        return f"no errors and no warnings in the stored state of {layers}, by {coverage}"
    frozen = sum(layer.frozen for layer in evidence.layers)
    layers += f" ({frozen} of them frozen)" if 0 < frozen < summary.layers else " (frozen)" if frozen else ""
    numbers = evidence.numbers
    modes = "" if numbers is None else f": {metric} is {numbers.eval_running:.3g} with running statistics"
    against = "" if numbers is None else f", {numbers.eval_batch:.3g} with batch statistics"
    return f"no errors and no warnings in {layers}, by {coverage}{modes}{against}"
