"""Repairs a model: plans remedies, applies them, checks again, and keeps only those that do not lower the metric.

The module is called `repairing` because the package exports a function called `repair`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab._version import __version__
from bnlab.diagnosis.advice import ON_STATISTICS
from bnlab.diagnosis.check import Diagnosis, check_with
from bnlab.diagnosis.settings import Settings
from bnlab.errors import UsageError
from bnlab.observe.discover import why_frozen
from bnlab.observe.fixed_batch_size import inputs_of_size
from bnlab.observe.inputs import Inputs
from bnlab.observe.losses import Losses, own_loss
from bnlab.observe.metric import Measured, Metric, measured
from bnlab.observe.passes.calling import Forward, require_forward
from bnlab.observe.passes.in_use import one_at_a_time
from bnlab.observe.passes.kept_batches import KeptBatches, MaxBatches, require_data
from bnlab.observe.passes.offloaded import values_at_hand
from bnlab.observe.passes.snapshot import all_or_nothing, random_numbers_kept
from bnlab.observe.passes.subject import untouched
from bnlab.observe.programs.opened import is_program, opened
from bnlab.observe.wrappers import unwrapped
from bnlab.progress import reporting
from bnlab.records import Advice, Change, Changes, Finding, GapChange, LeftAlone, Level, MetricChange, Recheck, Safety
from bnlab.remedies.catalog import REMEDIES_IN_ORDER
from bnlab.remedies.recalibrate import Recalibrate, why_kept
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.remedy import Material, Refusal, Remedy, RemedyPlan
from bnlab.remedies.running_statistics import require_no_inference, require_writable
from bnlab.remedies.set_eps import eps_to_set
from bnlab.wording import OTHER_DIRECTION, did_you_mean

__all__ = ["repair"]

_SAFETIES = (Safety.EXACT, Safety.STATISTICS, Safety.BEHAVIOUR)
"""The safety levels that a caller may allow. Each level includes the levels before it."""


@one_at_a_time("repair")
def repair(
    model: nn.Module,
    *,
    data: Iterable[Any],
    train_data: Iterable[Any] | None = None,
    metric: Metric | str | None = None,
    lower_is_better: bool = False,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    forward: Forward | None = None,
    max_batches: MaxBatches = "auto",
    diagnosis: Diagnosis | None = None,
    safety: str = "statistics",
    level: str = "warning",
    force: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Receipt:
    """Repair what the checks find in a model, in place, and keep only remedies that do not make the model worse.

    Each remedy is applied by itself. With a metric, a remedy is undone if it lowers the metric on `data` in eval mode
    by more than one standard error of the paired difference over batches. If the metric is not defined on a single
    batch, a remedy is undone if it lowers the metric at all. Then the checks run again. If they report an error that
    was not there before, every remedy is undone. If anything raises, the model is restored.

    Statistics are recomputed only where the check shows that this helps: a layer is stale (BN401), and the loss on the
    training data is lower with recalibrated statistics by more than two standard errors. The loss is `loss`, or the
    cross-entropy where integer labels stand beside an output of shape (N, K, ...), or else the metric. If the loss on
    `data` gets worse by more than two standard errors, the repair is undone. Without labels, loss or metric it cannot
    be known whether the weights were trained with the stored statistics, so the repair is proposed and not applied,
    unless `force` is set. Statistics that are not finite are always recomputed.

    Args:
        model: Any module, or a graph of `torch.export`, of which only the buffers change.
        data: Batches of the data that the model will see, in the forms that `bnlab.check` takes.
        train_data: Batches of the data on which the model was trained. Statistics are recomputed from these batches, or
            else from `data`. In the second case the receipt states that the model was adapted to the evaluation data.
        metric: metric(model, data) -> float, or "accuracy", "loss" or "miou", as for `bnlab.check`. A remedy is kept
            only if the metric on `data` does not get worse.
        lower_is_better: Whether a lower metric is better. "loss" implies it.
        loss: loss(model, batch) -> scalar, which decides whether statistics are recomputed.
        forward: forward(model, batch) -> output, as for `bnlab.check`.
        max_batches: How many batches of each data set are used, as for `bnlab.check`.
        diagnosis: The diagnosis that `check` returned for this model and these data, which saves a second check.
        safety: The largest change that is allowed. "exact" keeps the output, "statistics" also allows changes of
            buffers, and "behaviour" also allows changes of what the model computes in train mode.
        level: Lowest level of the findings to act on: "error", "warning" or "info".
        force: Whether to recompute stale statistics also where nothing can show that it helps. The receipt then says
            what was not proven.
        dry_run: Whether to return the plan without applying it.
        progress: Whether to show progress on stderr, as for `bnlab.check`.

    Returns:
        The receipt, with the changes, the findings that were left alone with their reasons, and the metric and the
        findings before and after. Its `undo()` reverses all changes.

    Raises:
        NoBatchNorm: If the model has no BN layer.
        UsageError: If an argument is invalid, or if forward or the metric raises.

    Example:
        >>> import bnlab
        >>> from bnlab.lab import datasets
        >>> from bnlab.lab.stuck_statistics import Config, train
        >>> model = train(Config()).model
        >>> receipt = bnlab.repair(
        ...     model, data=datasets.load("digits"), train_data=datasets.load("digits:train"), metric="accuracy"
        ... )
        >>> receipt.changes.metric.before < 0.5 < 0.95 < receipt.changes.metric.after
        True
    """
    max_safety, min_level = _safety(safety), _level(level)
    if diagnosis is not None and not isinstance(diagnosis, Diagnosis):
        raise UsageError(f"repair: diagnosis must be what bnlab.check returned, got {type(diagnosis).__name__}.")
    _require_model(model)
    data = require_data("data", data)
    with reporting(progress) as advance:
        inputs = Inputs(
            data=data,
            train_data=train_data,
            metric=metric,
            lower_is_better=lower_is_better,
            loss=loss,
            forward=require_forward("repair", forward),
            max_batches=max_batches,
            advance=advance,
        )
        with random_numbers_kept():  # starting a loader draws random numbers
            inputs = inputs.read()
        with opened(unwrapped(model)) as program, values_at_hand(program.model):
            inputs, _ = inputs_of_size(inputs, program.batch_size)
            receipt = _repaired(
                program.model,
                inputs,
                diagnosis,
                max_safety,
                min_level,
                force=force,
                dry_run=dry_run,
                is_program=program.is_program,
            )
        receipt.model = model
        return receipt


def _repaired(
    model: nn.Module,
    inputs: Inputs,
    diagnosis: Diagnosis | None,
    max_safety: Safety,
    min_level: Level,
    *,
    force: bool,
    dry_run: bool,
    is_program: bool,
) -> Receipt:
    """Repair a model with validated arguments and data that are held in memory."""
    for path, module in model.named_modules():
        require = require_writable if isinstance(module, _BatchNorm) else require_no_inference
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            require(path, "parameters and buffers", tensor)
    settings = Settings.of()
    before = diagnosis or check_with(model, settings, inputs=inputs)
    if before.failure is not None:
        raise UsageError(before.failure)
    _require_same_model(model, before)
    _require_observed_layers(model, before)
    planned = plan(before, max_safety, min_level, force=force, is_program=is_program)
    if dry_run or not planned.layers:
        return Receipt(model, planned.record(before, is_plan=dry_run), lambda: None)
    attempt = _Attempt(model, planned, _material(inputs, before), before, inputs)
    with all_or_nothing(model):
        attempt.apply()
        after = check_with(model, settings, inputs=inputs) if attempt.kept else before
        recheck = _recheck(before, after)
        if recheck.after.errors and any(name in recheck.appeared for name in _errors(after)):
            attempt.take_back("the checks found an error that was not there before")
    return attempt.receipt(recheck)


def _material(inputs: Inputs, before: Diagnosis) -> Material:
    name = "data" if inputs.train_data is None else "train_data"
    batches = cast("KeptBatches", getattr(inputs, name))
    return Material(
        batches=batches.everything,
        source=name,
        layerwise=any(finding.code == "BN403" for finding in before.findings),
        ran={layer.name for layer in before.layers if layer.calls},
        advance=lambda: inputs.advance("recomputing statistics"),
        eps=eps_to_set(before),
        forward=inputs.forward,
    )


@dataclass(frozen=True)
class RepairPlan:
    """The remedies to apply.

    Attributes:
        layers: The layers of each remedy, in the order in which the remedies are applied.
        changes: The changes that each remedy would make.
        left_alone: The findings that no remedy acts on, with the reasons.
    """

    layers: Mapping[Remedy, tuple[str, ...]]
    changes: Mapping[Remedy, tuple[Change, ...]]
    left_alone: tuple[LeftAlone, ...]

    def record(self, diagnosis: Diagnosis, *, is_plan: bool) -> Changes:
        """Return the plan as a record, with a note if there is nothing to repair."""
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


def plan(
    diagnosis: Diagnosis, max_safety: Safety, min_level: Level, *, force: bool = False, is_program: bool = False
) -> RepairPlan:
    """Return a plan that assigns to each finding of a diagnosis its first applicable remedy.

    With `force`, the plan recalibrates stale layers on which nothing could decide. Of a program, whose operators are
    fixed, it changes the buffers alone.
    """
    if force and diagnosis.statistics is not None and diagnosis.statistics.advice is Advice.UNDECIDED:
        diagnosis = replace(diagnosis, statistics=replace(diagnosis.statistics, advice=Advice.RECALIBRATE))
    layers: dict[Remedy, list[str]] = {}
    changes: dict[Remedy, list[Change]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for finding in diagnosis.findings:
        if not finding.level.at_least(min_level):
            continue
        choice = _choose_remedy(diagnosis, finding, max_safety, is_program=is_program)
        if isinstance(choice, Refusal):
            reasons[finding.code, finding.layer or "the network"] = choice.reason
            continue
        remedy, steps = choice
        layers.setdefault(remedy, []).extend(steps.layers)
        changes.setdefault(remedy, []).extend(steps.changes)
    ordered = [remedy for remedy in REMEDIES_IN_ORDER if remedy in layers]
    return RepairPlan(
        {remedy: tuple(dict.fromkeys(layers[remedy])) for remedy in ordered},
        {remedy: tuple(dict.fromkeys(changes[remedy])) for remedy in ordered},
        tuple(LeftAlone(layer, f"{code}: {reason}") for (code, layer), reason in reasons.items()),
    )


def _choose_remedy(
    diagnosis: Diagnosis, finding: Finding, max_safety: Safety, *, is_program: bool
) -> tuple[Remedy, RemedyPlan] | Refusal:
    by_name = {remedy.name: remedy for remedy in REMEDIES_IN_ORDER}
    refusal = _reason_to_keep_statistics(diagnosis, finding, max_safety) or Refusal(
        f"no remedy repairs this finding: run bnlab explain {finding.code}"
    )
    for name in finding.remedies:
        remedy = by_name.get(name)
        if remedy is None:
            continue
        if is_program and not isinstance(remedy, Recalibrate):
            refusal = Refusal(f"{name} cannot change the operators of a graph: change the model before you export it")
            continue
        if _SAFETIES.index(remedy.safety) > _SAFETIES.index(max_safety):
            refusal = Refusal(f"{name} changes behaviour: pass safety='{remedy.safety.value}' to allow it")
            continue
        remedy_plan = remedy.plan(diagnosis, finding)
        if isinstance(remedy_plan, RemedyPlan):
            return remedy, remedy_plan
        refusal = remedy_plan
    return refusal


def _reason_to_keep_statistics(diagnosis: Diagnosis, finding: Finding, max_safety: Safety) -> Refusal | None:
    """Return the reason of the verdict for a finding on the statistics of a layer that it names."""
    verdict, eps = diagnosis.statistics, eps_to_set(diagnosis)
    if eps and finding.code in ON_STATISTICS and max_safety is Safety.BEHAVIOUR:
        return Refusal("another eps explains it: set-eps comes first, and a second check shows what is left")
    if verdict is None or finding.code not in ON_STATISTICS:
        return None
    return why_kept(verdict) if finding.layer is None or finding.layer in verdict.layers else None


@dataclass(frozen=True)
class _Quality:
    """How good the model is on the evaluation data.

    Attributes:
        metric: The metric; None without a metric.
        losses: The losses; None without a loss.
        loss_name: The name of the loss.
        chance: The loss of a constant output, above which the loss is not one that the model was trained for.
    """

    metric: Measured | None
    losses: Losses | None
    loss_name: str
    chance: float

    def has_worse_metric_than(self, before: _Quality) -> bool:
        """Return whether the metric is worse by more than one standard error."""
        return self.metric is not None and before.metric is not None and self.metric.is_worse_than(before.metric)

    def why_worse_than(self, before: _Quality) -> str | None:
        """Return what got worse: the metric by more than one standard error, or the loss by more than two; or None."""
        if self.metric is not None and before.metric is not None and self.has_worse_metric_than(before):
            return f"the metric went from {before.metric.value:.4g} to {self.metric.value:.4g}"
        if self.losses is None or before.losses is None or before.losses.mean >= self.chance:
            return None
        if not before.losses.above(self.losses).is_negative:
            return None
        return f"the {self.loss_name} on the data went from {before.losses.mean:.4g} to {self.losses.mean:.4g}"


class _Attempt:
    """An attempt to apply the remedies of a plan, each of which is kept or taken back."""

    def __init__(
        self,
        model: nn.Module,
        planned: RepairPlan,
        material: Material,
        before: Diagnosis,
        inputs: Inputs,
    ) -> None:
        self._model, self._planned, self._material = model, planned, material
        self._before, self._score = before, inputs.score
        self._data = cast("KeptBatches", inputs.data)
        with untouched(model):
            self._loss = own_loss(model, inputs.loss, self._data, inputs.forward)
        self.kept: list[Receipt] = []
        self._tried: list[Changes] = []
        self._notes: list[str] = []
        self._metric_before: Measured | None = None
        self._metric_kept: Measured | None = None
        self._metric_rejected: Measured | None = None

    def apply(self) -> None:
        """Apply each remedy, and take it back if the metric or the loss on the data gets worse."""
        kept = self._measured()
        self._metric_before = self._metric_kept = kept.metric
        for remedy, layers in self._planned.layers.items():
            receipt = remedy.apply(self._model, layers, self._material)
            self.kept.append(receipt)
            self._tried.append(receipt.changes)
            after = self._measured()
            why = after.why_worse_than(kept)
            if why is None:
                kept = after
                self._metric_kept = after.metric
            else:
                self.kept.pop().undo()
                self._metric_rejected = after.metric
                self._notes.append(f"{remedy.name} was taken back: {why}")
                if remedy.name == "recalibrate" and after.has_worse_metric_than(kept):
                    self._notes.append(f"either the weights were trained with the old statistics, or {OTHER_DIRECTION}")

    def take_back(self, why: str) -> None:
        """Undo every remedy that was kept."""
        while self.kept:
            self.kept.pop().undo()
        self._metric_rejected = self._metric_kept
        self._notes.append(f"everything was taken back: {why}")

    def receipt(self, recheck: Recheck) -> Receipt:
        """Return the receipt of the remedies that were kept, or of all that were tried if none was kept."""
        applied = [receipt.changes for receipt in self.kept] or self._tried
        last = self._metric_kept if self.kept else self._metric_rejected
        record = Changes(
            bnlab=__version__,
            action="repair",
            safety=max((changes.safety for changes in applied), key=_SAFETIES.index),
            changes=tuple(change for changes in applied for change in changes.changes),
            left_alone=(*self._planned.left_alone, *(left for changes in applied for left in changes.left_alone)),
            metric=None
            if self._metric_before is None or last is None
            else MetricChange(self._metric_before.value, last.value),
            kept=bool(self.kept),
            notes=tuple(self._all_notes(applied)),
            measurements=tuple(measurement for changes in applied for measurement in changes.measurements),
            recheck=recheck,
        )
        kept = tuple(self.kept)

        def undo() -> None:
            for receipt in reversed(kept):
                receipt.undo()

        return Receipt(self._model, record, undo)

    def _measured(self) -> _Quality:
        with untouched(self._model), torch.no_grad():
            metric = None if self._score is None else measured(self._model, self._score, self._data)
            losses = self._losses()
        if self._loss is None:
            return _Quality(metric, None, "loss", math.inf)
        chance = math.inf if self._loss.chance is None else self._loss.chance(self._data)
        return _Quality(metric, losses, self._loss.name, chance)

    def _losses(self) -> Losses | None:
        """Return the losses on the data; None from then on if a batch has none."""
        if self._loss is None:
            return None
        try:
            return self._loss.of(self._model, self._data)
        except UsageError:
            self._loss = None
            return None

    def _all_notes(self, applied: Sequence[Changes]) -> Iterable[str]:
        yield from self._notes
        if any(remedy.name == "recalibrate" for remedy in self._planned.layers):
            if self._material.source == "data":
                yield "no train_data given: adapted to the evaluation data"
            if self._material.layerwise:
                yield "the batches differ from each other (BN403): recalibrated layer by layer"
        verdict = self._before.statistics
        is_undecided = verdict is None or verdict.advice is Advice.UNDECIDED
        if self._score is None and self._loss is None and is_undecided:
            yield "nothing shows that the repair improves the model: pass labels, loss= or metric= to know"
        for changes in applied:
            yield from changes.notes


def _recheck(before: Diagnosis, after: Diagnosis) -> Recheck:
    was, now = ([_label(finding) for finding in diagnosis.findings] for diagnosis in (before, after))
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
    """Yield the gap before and after for every layer with a measured gap, in execution order."""
    was = {layer.name: layer.gap for layer in before.layers}
    for layer in after.layers:
        change = GapChange(layer.name, was.get(layer.name), layer.gap)
        if change.before is not None or change.after is not None:
            yield change


def _errors(diagnosis: Diagnosis) -> list[str]:
    return [_label(finding) for finding in diagnosis.findings if finding.level is Level.ERROR]


def _label(finding: Finding) -> str:
    return f"{finding.code} {finding.layer or 'the network'}"


def _safety(value: str) -> Safety:
    return Safety(_one_of("safety", value, [safety.value for safety in _SAFETIES]))


def _level(value: str) -> Level:
    return Level(_one_of("level", value, [level.value for level in Level]))


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        hint = did_you_mean(str(value), known)
        raise UsageError(f"repair: {name} must be one of {', '.join(known)}, got {value!r}.{hint}")
    return value


def _require_model(model: object) -> None:
    if not (isinstance(model, nn.Module) or is_program(model)):
        raise UsageError(
            f"repair: model must be a torch.nn.Module, got {type(model).__name__}. Load a state dict into its model."
        )


def _require_same_model(model: nn.Module, diagnosis: Diagnosis) -> None:
    paths = {name for name, _ in model.named_modules()}
    unknown_layer = next((layer.name for layer in diagnosis.layers if layer.name not in paths), None)
    if diagnosis.target.kind != "model" or unknown_layer is not None:
        got = f"one of a {diagnosis.target.kind}" if unknown_layer is None else f"one with the layer {unknown_layer!r}"
        raise UsageError(f"repair: diagnosis must be one of this model, got {got}.")


def _require_observed_layers(model: nn.Module, diagnosis: Diagnosis) -> None:
    """Refuse data that give no evidence on any layer, because every batch was left out as not finite."""
    modules = dict(model.named_modules())
    verdict = diagnosis.statistics
    trained_with = verdict.layers if verdict is not None and verdict.advice is Advice.KEEP else ()
    ran = [layer for layer in diagnosis.layers if layer.calls and why_frozen(model, layer.name) is None]
    ran = [layer for layer in ran if layer.name not in trained_with]
    kept = [layer for layer in ran if getattr(modules[layer.name], "running_mean", None) is not None]
    if kept and all(layer.gap is None for layer in kept):
        raise UsageError("data: at least one batch must be finite, got NaN or inf in all. Look for them in the loader.")
