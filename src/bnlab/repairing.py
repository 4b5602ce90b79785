"""repair: plan, apply, check again, and keep only what a metric does not find worse.

The module is private because the package has a function of that name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from bnlab._version import __version__
from bnlab.diagnosis.check import Diagnosis, check_with
from bnlab.diagnosis.settings import Settings
from bnlab.errors import UsageError
from bnlab.observe.discover import why_frozen
from bnlab.observe.metric import Measured, Metric, measured
from bnlab.observe.passes.batches import KeptBatches, MaxBatches, require_data
from bnlab.observe.passes.subject import random_numbers_kept
from bnlab.observe.survey import Inputs
from bnlab.progress import reporting
from bnlab.records import Change, Changes, Finding, GapChange, LeftAlone, Level, MetricChange, Recheck, Safety
from bnlab.remedies.catalog import REMEDIES_IN_ORDER
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.remedy import Material, Refusal, Remedy, RemedyPlan

__all__ = ["repair"]

_SAFETIES = (Safety.EXACT, Safety.STATISTICS, Safety.BEHAVIOUR)
"""What may be asked for, each including those before it."""


def repair(
    model: nn.Module,
    *,
    data: Iterable[Any],
    train_data: Iterable[Any] | None = None,
    metric: Metric | None = None,
    max_batches: MaxBatches = "auto",
    diagnosis: Diagnosis | None = None,
    safety: str = "statistics",
    dry_run: bool = False,
    level: str = "warning",
    progress: bool | None = None,
) -> Receipt:
    """Mend what the checks find in a model, in place, and keep only what proves itself.

    Each remedy is applied by itself. With a metric it is kept only if the metric on `data` in eval mode is not lower
    than before by more than one standard error of the paired difference over batches (where a batch alone has a metric;
    else not lower at all); otherwise it is taken back. Then the checks run again: if there is an error that was not
    there before, everything is taken back. Whatever raises, the model is as it was.

    A network that was always run in eval mode has statistics of 0 and 1, which are part of what it learned: without a
    metric they are left alone.

    Args:
        model: Any module.
        data: Batches of what the model will see; they can be run through again.
        train_data: Batches it was trained on. Statistics are recomputed from them; without them from `data`, and the
            receipt says that the model was adapted to the evaluation data.
        metric: metric(model, data) -> float, higher is better; always measured on `data`.
        max_batches: How many batches of either data set are used: as for `bnlab.check`.
        diagnosis: What `check` said of this model with these data, to save checking it again.
        safety: What may be done at most: "exact" keeps the output, "statistics" changes buffers, "behaviour" also what
            the model computes in train mode.
        dry_run: Whether to return the plan only.
        level: Lowest level of the findings to act on: "error", "warning" or "info".
        progress: Whether to show on stderr what is going on: as for `bnlab.check`.

    Returns:
        The receipt: what changed, what was left alone and why, the metric and the findings before and after. `undo()`
        takes everything back.

    Raises:
        NoBatchNorm: If there is no BN layer.
        UsageError: If an argument is wrong, or forward or the metric raises.

    Example:
        >>> import bnlab
        >>> from bnlab.lab import datasets, metrics
        >>> from bnlab.lab.stuck_statistics import Config, train
        >>> model = train(Config()).model
        >>> receipt = bnlab.repair(
        ...     model, data=datasets.load("digits"), train_data=datasets.load("digits:train"), metric=metrics.accuracy
        ... )
        >>> receipt.changes.metric.before < 0.5 < 0.95 < receipt.changes.metric.after
        True
    """
    max_safety, min_level = _safety(safety), _level(level)
    if diagnosis is not None and not isinstance(diagnosis, Diagnosis):
        raise UsageError(f"repair: diagnosis must be what bnlab.check returned, got {type(diagnosis).__name__}.")
    require_data("data", data)
    with reporting(progress) as advance:
        inputs = Inputs(data=data, train_data=train_data, metric=metric, max_batches=max_batches, advance=advance)
        with random_numbers_kept():  # a loader draws some where it begins
            inputs = inputs.read()
        return _repaired(model, inputs, diagnosis, max_safety, min_level, dry_run=dry_run)


def _repaired(
    model: nn.Module,
    inputs: Inputs,
    diagnosis: Diagnosis | None,
    max_safety: Safety,
    min_level: Level,
    *,
    dry_run: bool,
) -> Receipt:
    """Repair with validated arguments and data that are held in memory."""
    settings = Settings.of()
    before = diagnosis or check_with(model, settings, inputs=inputs)
    _require_same_model(model, before)
    _require_seen(model, before)
    planned = plan(before, max_safety, min_level)
    if dry_run or not planned.layers:
        return Receipt(model, planned.record(before, is_plan=dry_run), lambda: None)
    attempt = _Attempt(model, planned, _material(inputs, before), before, inputs)
    try:
        attempt.apply()
        after = check_with(model, settings, inputs=inputs) if attempt.kept else before
        recheck = _recheck(before, after)
        if recheck.after.errors and any(name in recheck.appeared for name in _errors(after)):
            attempt.take_back("the checks found an error that was not there before")
    except BaseException:
        attempt.take_back("")
        raise
    return attempt.receipt(recheck)


def _material(inputs: Inputs, before: Diagnosis) -> Material:
    name = "data" if inputs.train_data is None else "train_data"
    batches = cast("KeptBatches", getattr(inputs, name))
    return Material(
        batches=batches.everything,
        source=name,
        layerwise=any(finding.code == "BN403" for finding in before.findings),
        advance=lambda: inputs.advance("recomputing statistics"),
    )


@dataclass(frozen=True)
class RepairPlan:
    """What is to be done.

    Attributes:
        layers: The layers of each remedy, in the order in which remedies are applied.
        changes: What would become of them.
        left_alone: Findings nothing is done about, and why.
    """

    layers: Mapping[Remedy, tuple[str, ...]]
    changes: Mapping[Remedy, tuple[Change, ...]]
    left_alone: tuple[LeftAlone, ...]

    def record(self, diagnosis: Diagnosis, *, is_plan: bool) -> Changes:
        """Return the plan as a record; where it is empty there is nothing to repair."""
        return Changes(
            bnlab=__version__,
            action="repair",
            safety=max((remedy.safety for remedy in self.layers), key=_SAFETIES.index, default=Safety.MANUAL),
            changes=tuple(change for changes in self.changes.values() for change in changes),
            left_alone=self.left_alone,
            recheck=_recheck(diagnosis, diagnosis),
            notes=() if self.layers else ("nothing to repair",),
            planned=is_plan,
        )


def plan(diagnosis: Diagnosis, max_safety: Safety, min_level: Level) -> RepairPlan:
    """Return what the remedies would do about the findings of a diagnosis: for each the first one that can."""
    layers: dict[Remedy, list[str]] = {}
    changes: dict[Remedy, list[Change]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for finding in diagnosis.findings:
        if not finding.level.at_least(min_level):
            continue
        found = _answer(diagnosis, finding, max_safety)
        if isinstance(found, Refusal):
            reasons[finding.code, finding.layer or "the network"] = found.reason
            continue
        remedy, steps = found
        layers.setdefault(remedy, []).extend(steps.layers)
        changes.setdefault(remedy, []).extend(steps.changes)
    ordered = [remedy for remedy in REMEDIES_IN_ORDER if remedy in layers]
    return RepairPlan(
        {remedy: tuple(dict.fromkeys(layers[remedy])) for remedy in ordered},
        {remedy: tuple(dict.fromkeys(changes[remedy])) for remedy in ordered},
        tuple(LeftAlone(layer, f"{code}: {reason}") for (code, layer), reason in reasons.items()),
    )


def _answer(diagnosis: Diagnosis, finding: Finding, max_safety: Safety) -> tuple[Remedy, RemedyPlan] | Refusal:
    by_name = {remedy.name: remedy for remedy in REMEDIES_IN_ORDER}
    refused = Refusal(f"to be mended by hand: bnlab explain {finding.code}")
    for name in finding.remedies:
        remedy = by_name.get(name)
        if remedy is None:
            continue
        if _SAFETIES.index(remedy.safety) > _SAFETIES.index(max_safety):
            refused = Refusal(f"{name} changes behaviour: ask for it by safety='{remedy.safety.value}'")
            continue
        found = remedy.plan(diagnosis, finding)
        if isinstance(found, RemedyPlan):
            return remedy, found
        refused = found
    return refused


class _Attempt:
    """The remedies of a plan on their way, each kept or taken back."""

    def __init__(
        self,
        model: nn.Module,
        planned: RepairPlan,
        material: Material,
        before: Diagnosis,
        inputs: Inputs,
    ) -> None:
        self._model, self._planned, self._material = model, planned, material
        self._before, self._metric = before, inputs.metric
        self._data = cast("KeptBatches", inputs.data)
        self.kept: list[Receipt] = []
        self._tried: list[Changes] = []
        self._notes: list[str] = []
        self._first: Measured | None = None
        self._last: Measured | None = None
        self._rejected: Measured | None = None

    def apply(self) -> None:
        """Apply each remedy, and take it back where the metric gets worse."""
        self._first = self._last = self._measured()
        for remedy, layers in self._planned.layers.items():
            receipt = remedy.apply(self._model, layers, self._material)
            self.kept.append(receipt)
            self._tried.append(receipt.changes)
            after = self._measured()
            if after is not None and self._last is not None and after.is_worse_than(self._last):
                self.kept.pop().undo()
                self._rejected = after
                self._notes.append(
                    f"{remedy.name} was taken back: the metric went from {self._last.value:.4g} to {after.value:.4g}"
                )
            else:
                self._last = after

    def take_back(self, why: str) -> None:
        """Undo every remedy that was kept."""
        while self.kept:
            self.kept.pop().undo()
        if why:
            self._rejected = self._last
            self._notes.append(f"everything was taken back: {why}")

    def receipt(self, recheck: Recheck) -> Receipt:
        """Return what stands."""
        shown = [receipt.changes for receipt in self.kept] or self._tried
        last = self._last if self.kept else self._rejected
        record = Changes(
            bnlab=__version__,
            action="repair",
            safety=max((changes.safety for changes in shown), key=_SAFETIES.index),
            changes=tuple(change for changes in shown for change in changes.changes),
            left_alone=(*self._planned.left_alone, *(left for changes in shown for left in changes.left_alone)),
            metric=None if self._first is None or last is None else MetricChange(self._first.value, last.value),
            kept=bool(self.kept),
            notes=tuple(self._all_notes(shown)),
            measurements=tuple(measurement for changes in shown for measurement in changes.measurements),
            recheck=recheck,
        )
        undone = list(self.kept)

        def undo() -> None:
            while undone:
                undone[-1].undo()
                undone.pop()

        return Receipt(self._model, record, undo)

    def _measured(self) -> Measured | None:
        return None if self._metric is None else measured(self._model, self._metric, self._data)

    def _all_notes(self, shown: Sequence[Changes]) -> Iterable[str]:
        yield from self._notes
        if any(remedy.name == "recalibrate" for remedy in self._planned.layers):
            if self._material.source == "data":
                yield "no train_data given: adapted to the evaluation data"
            if self._material.layerwise:
                yield "the batches differ from each other (BN403): recalibrated layer by layer"
        if self._metric is None:
            yield "no metric given: nothing shows that the model is better for it"
        for changes in shown:
            yield from changes.notes


def _recheck(before: Diagnosis, after: Diagnosis) -> Recheck:
    was, now = ([_named(finding) for finding in diagnosis.findings] for diagnosis in (before, after))
    return Recheck(
        before=before.summary,
        after=after.summary,
        resolved=tuple(name for name in was if name not in now),
        remaining=tuple(name for name in now if name in was),
        appeared=tuple(name for name in now if name not in was),
        conclusion_before=before.conclusion,
        conclusion_after=after.conclusion,
        numbers_before=before.numbers,
        numbers_after=after.numbers,
        gaps=tuple(_gaps(before, after)),
    )


def _gaps(before: Diagnosis, after: Diagnosis) -> Iterable[GapChange]:
    """Yield the layers whose gap was measured, in execution order."""
    was = {layer.name: layer.gap for layer in before.layers}
    for layer in after.layers:
        found = GapChange(layer.name, was.get(layer.name), layer.gap)
        if found.before is not None or found.after is not None:
            yield found


def _errors(diagnosis: Diagnosis) -> list[str]:
    return [_named(finding) for finding in diagnosis.findings if finding.level is Level.ERROR]


def _named(finding: Finding) -> str:
    return f"{finding.code} {finding.layer or 'the network'}"


def _safety(value: str) -> Safety:
    known = [safety.value for safety in _SAFETIES]
    if value not in known:
        raise UsageError(f"repair: safety must be one of {', '.join(known)}, got {value!r}.")
    return Safety(value)


def _level(value: str) -> Level:
    known = [level.value for level in Level]
    if value not in known:
        raise UsageError(f"repair: level must be one of {', '.join(known)}, got {value!r}.")
    return Level(value)


def _require_same_model(model: nn.Module, diagnosis: Diagnosis) -> None:
    paths = {name for name, _ in getattr(model, "_orig_mod", model).named_modules()}
    strange = next((layer.name for layer in diagnosis.layers if layer.name not in paths), None)
    if diagnosis.target.kind != "model" or strange is not None:
        got = f"one of a {diagnosis.target.kind}" if strange is None else f"one with the layer {strange!r}"
        raise UsageError(f"repair: diagnosis must be one of this model, got {got}.")


def _require_seen(model: nn.Module, diagnosis: Diagnosis) -> None:
    """Refuse data that showed nothing of any layer: every batch was left out because it is not finite."""
    model = getattr(model, "_orig_mod", model)
    modules = dict(model.named_modules())
    ran = [layer for layer in diagnosis.layers if layer.calls and why_frozen(model, layer.name) is None]
    kept = [layer for layer in ran if getattr(modules[layer.name], "running_mean", None) is not None]
    if kept and all(layer.gap is None for layer in kept):
        raise UsageError("data: at least one batch must be finite, got NaN or inf in all. Look for them in the loader.")
