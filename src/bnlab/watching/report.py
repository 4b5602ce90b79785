"""Turns a watched training run into a diagnosis of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from bnlab.checks import RUN_CHECKS, RunCheck
from bnlab.diagnosis.check import Diagnosis, check
from bnlab.diagnosis.run_checks import run_on_run
from bnlab.observe.training_run import RunLayer, TrainingRun
from bnlab.records import Finding, LayerHistory, Level, Outcome, Status
from bnlab.watching.events import Event
from bnlab.wording import counted, enumerated

__all__ = ["diagnosis_of"]

_MAX_NAMES = 3


def diagnosis_of(
    model: nn.Module, optimizer: Optimizer | None, run: TrainingRun, events: Sequence[Event], steps: int
) -> Diagnosis:
    """Return the diagnosis of a model by its state and structure, with the events of its training as findings.

    Args:
        model: The model.
        optimizer: The optimizer that trains it, if it is known.
        run: The evidence on the run.
        events: The events so far.
        steps: Number of optimizer steps.
    """
    of_model = check(model, optimizer=optimizer)
    own = [event.finding for event in events]
    summary = of_model.summary
    return dataclasses.replace(
        of_model,
        findings=tuple(sorted((*of_model.findings, *own), key=_rank)),
        outcomes=(*of_model.outcomes, *(_outcome(each, run, own) for each in RUN_CHECKS)),
        conclusion=_conclusion(of_model, events, steps),
        summary=dataclasses.replace(
            summary, **{key: getattr(summary, key) + _count(own, level) for key, level in _COUNTS.items()}
        ),
        history=tuple(_history(layer) for layer in run.layers),
    )


_COUNTS = {"errors": Level.ERROR, "warnings": Level.WARNING, "infos": Level.INFO}


def _count(findings: Sequence[Finding], level: Level) -> int:
    return sum(finding.level is level for finding in findings)


def _rank(finding: Finding) -> tuple[int, str]:
    """Sort the events in among the other findings. Errors keep their order: none of them is an event."""
    return finding.level.rank, "" if finding.level is Level.ERROR else finding.code


def _outcome(of_check: RunCheck[Any], run: TrainingRun, findings: Sequence[Finding]) -> Outcome:
    if any(finding.code == of_check.code for finding in findings):
        return Outcome(of_check.code, Status.FINDINGS)
    if not any(layer.windows for layer in run.layers):
        return Outcome(of_check.code, Status.SKIPPED, "no optimizer step was watched")
    return run_on_run(of_check, run)[1]


def _conclusion(of_model: Diagnosis, events: Sequence[Event], steps: int) -> str:
    """Return one sentence: the first mishap of the run, unless the state of the model is worse."""
    serious = [event for event in events if event.level is not Level.INFO] or [*events]
    if not serious or of_model.summary.errors:
        return of_model.conclusion
    first = min(serious, key=lambda event: event.step)
    same = [event.layer for event in serious if event.code == first.code]
    where = enumerated(same, _MAX_NAMES) if len(same) > 1 else same[0]
    return (
        f"in {counted(steps, 'optimizer step')}, {first.code} {first.name} happened first at step {first.step} in "
        f"{where}: {first.message}"
    )


def _history(layer: RunLayer) -> LayerHistory:
    samples = layer.samples
    return LayerHistory(
        layer=layer.name,
        steps=tuple(sample.step for sample in samples),
        running_mean=tuple(sample.running_mean for sample in samples),
        running_var=tuple(sample.running_var for sample in samples),
        lag=tuple(sample.drift for sample in samples),
    )
