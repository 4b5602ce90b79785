"""Runs the selected checks on evidence, and returns their findings and the outcome of each check."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from bnlab.checks import AnyCheck, GraphCheck, ModelCheck, Needs, RunCheck
from bnlab.checks.bn301_train_eval_gap import TrainEvalGap
from bnlab.checks.bn401_stale_statistics import StaleStatistics
from bnlab.diagnosis.settings import Settings
from bnlab.observe.evidence import NetworkState
from bnlab.observe.graph_state import GraphState
from bnlab.observe.model_evidence import ModelEvidence
from bnlab.observe.training_run import TrainingRun
from bnlab.records import Finding, Outcome, Status
from bnlab.wording import counted

__all__ = ["run_check", "run_checks", "run_on_run", "stale_layers"]

_LEADING = ("BN212", "BN213", "BN501")
"""Errors that explain others: a model that does not obey `eval()`, and inputs that overflow."""

Part = TypeVar("Part", NetworkState, GraphState, ModelEvidence, TrainingRun)


def run_checks(
    settings: Settings,
    networks: Sequence[NetworkState],
    model: ModelEvidence | None,
    graph: GraphState | None = None,
) -> tuple[list[Finding], list[Outcome]]:
    """Run every selected check.

    Args:
        settings: The checks, and the codes whose findings are dropped.
        networks: The stored numbers, for the checks that need nothing else.
        model: The evidence on a model; None if the target is a file.
        graph: What the graph in a file says; None if it holds none.

    Returns:
        The findings, most serious first, and one outcome for each check.
    """
    findings: list[Finding] = []
    outcomes: list[Outcome] = []
    for check in settings.checks:
        of_check, outcome = run_check(check, networks, model, graph)
        if check.code in settings.ignore:
            outcome = Outcome(check.code, Status.SKIPPED, _ignored(settings.ignore[check.code], of_check))
            of_check = []
        findings += of_check
        outcomes.append(outcome)
    return _most_consequential_first(findings, networks), outcomes


def run_check(
    check: AnyCheck[Any, Any, Any],
    networks: Sequence[NetworkState],
    model: ModelEvidence | None,
    graph: GraphState | None = None,
) -> tuple[list[Finding], Outcome]:
    """Run one check. A check that raises has crashed: it has no findings and has not passed."""
    if check.needs is Needs.GRAPH and (graph is None or graph.is_pickled) and not _have_modes(networks):
        return [], Outcome(check.code, Status.SKIPPED, f"needs {check.needs.value}")
    if isinstance(check, GraphCheck):
        return _run_on_graph(check, graph)
    if not isinstance(check, ModelCheck):
        return _run_on_layers(check, networks)
    if model is None:
        return [], Outcome(check.code, Status.SKIPPED, f"needs {check.needs.value}")
    if check.code in model.unknown:
        return [], Outcome(check.code, Status.SKIPPED, model.unknown[check.code])
    missing = None if check.needs.argument is None else model.missing.get(check.needs.argument)
    if missing is not None:
        return [], Outcome(check.code, Status.SKIPPED, f"{missing}: needs {check.needs.value}")
    return _run_on_layers(check, [model])


def stale_layers(settings: Settings, evidence: ModelEvidence) -> list[str]:
    """Return the layers that are stale, with the limits of the settings, the most stale first.

    They are the layers of BN401, those whose gap staleness alone lifts above the limit of BN301, and those of a port
    that mistook the statistics (BN304). A few channels with a large difference are enough for the gap.
    """
    own = (check for check in settings.checks if isinstance(check, StaleStatistics))
    findings, _ = run_check(next(own, StaleStatistics()), (), evidence)
    findings.sort(key=lambda finding: -finding.measured["effect"].value)
    stale = [finding.layer for finding in findings if finding.layer is not None]
    gap = next((check for check in settings.checks if isinstance(check, TrainEvalGap)), TrainEvalGap())
    gaps = {layer.name: layer.gap.staleness for layer in evidence.layers if layer.gap and gap.lacks(layer) is None}
    by_gap = [name for name, staleness in gaps.items() if staleness > gap.limits.excess and name not in stale]
    of_port = () if evidence.port is None else evidence.port.layers
    ported = [name for name in of_port if name not in (*stale, *by_gap)]
    return [*stale, *sorted(by_gap, key=lambda name: -gaps[name]), *ported]


def run_on_run(check: RunCheck[Any], run: TrainingRun) -> tuple[list[Finding], Outcome]:
    """Run one check on a training run. A check that raises has crashed: it has no findings and has not passed."""
    return _run_on_layers(check, [run])


def _run_on_graph(check: AnyCheck[Any, Any, Any], graph: GraphState | None) -> tuple[list[Finding], Outcome]:
    """Run a check of graphs without BN nodes."""
    if graph is not None and graph.layers:
        return _run_on_layers(check, [graph])
    with_nodes = graph is not None and not graph.is_folded
    reason = "the graph holds BN nodes" if with_nodes else "the graph holds no stored weights of such nodes"
    return [], Outcome(check.code, Status.SKIPPED, reason)


def _have_modes(networks: Sequence[NetworkState]) -> bool:
    """Return whether a graph says of any layer which statistics it uses."""
    return any(layer.mode is not None for network in networks for layer in network.layers)


def _run_on_layers(
    check: AnyCheck[Part, Any, Any],
    parts: Sequence[Part],
) -> tuple[list[Finding], Outcome]:
    """Run one check on the layers that have the evidence for it, and count the others by reason."""
    findings: list[Finding] = []
    lacking: Counter[str] = Counter()
    total = sum(len(part.layers) for part in parts)
    try:
        for part in parts:
            reasons = [check.lacks(layer) for layer in part.layers]
            lacking.update(reason for reason in reasons if reason is not None)
            layers = tuple(layer for layer, reason in zip(part.layers, reasons, strict=True) if reason is None)
            if layers or not part.layers:
                whole = len(layers) == len(part.layers)  # keeps the columns that are already computed
                findings += check.inspect(part if whole else dataclasses.replace(part, layers=layers))
    except Exception as err:
        return [], Outcome(check.code, Status.CRASHED, f"{type(err).__name__}: {err}")
    reason = ", ".join(f"{why} in {_of_all(count, total)}" for why, count in lacking.most_common()) or None
    if not total and not findings:
        reason = "the model holds no BN layer as a module" if parts else "no layer keeps running statistics"
    none_judged = lacking.total() == total
    status = Status.FINDINGS if findings else Status.SKIPPED if none_judged else Status.PASSED
    return findings, Outcome(check.code, status, reason)


def _of_all(count: int, total: int) -> str:
    return f"{count} of {total} layers" if count < total else "all layers"


def _ignored(reason: str, dropped: Sequence[Finding]) -> str:
    count = f"{counted(len(dropped), 'finding')} dropped" if dropped else "there was nothing to ignore"
    return f"ignored: {reason} ({count})"


def _most_consequential_first(findings: Sequence[Finding], networks: Sequence[NetworkState]) -> list[Finding]:
    """Sort by level, then by code, then by the share of channels in the layer; file order breaks ties.

    A model that does not obey `eval()` comes first, because no other number on eval mode is what a user gets. Inputs
    that overflow come before the statistics that they spoil.
    """
    widths = {layer.name: layer.channels for network in networks for layer in network.layers}

    def share(finding: Finding) -> float:
        if finding.channels is None or finding.layer not in widths:
            return 1.0
        return len(finding.channels) / widths[finding.layer]

    def key(finding: Finding) -> tuple[int, bool, str, float]:
        return finding.level.rank, finding.code not in _LEADING, finding.code, -share(finding)

    return sorted(findings, key=key)
