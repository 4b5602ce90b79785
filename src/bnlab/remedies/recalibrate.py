"""recalibrate: computes the running statistics anew from data, with the current weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlab._version import __version__
from bnlab.errors import BnlabWarning, NoBatchNorm, UsageError
from bnlab.observe.discover import any_batch_norm, batch_norm_layers, why_frozen
from bnlab.observe.evidence import Floats
from bnlab.observe.fixed_batch_size import BatchesOfSize
from bnlab.observe.label_order import LabelOrder
from bnlab.observe.passes.calling import Batch, Forward, require_forward, run_batch
from bnlab.observe.passes.in_use import one_at_a_time
from bnlab.observe.passes.kept_batches import is_count, require_data
from bnlab.observe.passes.offloaded import values_at_hand
from bnlab.observe.passes.pooling import End, Estimator, Pooling, pool
from bnlab.observe.passes.snapshot import all_or_nothing, uncompiled
from bnlab.observe.passes.subject import Subject, usage_error_unless
from bnlab.observe.programs.opened import opened
from bnlab.observe.wrappers import path_inside, unwrapped
from bnlab.records import (
    Advice,
    Change,
    Changes,
    DiagnosisRecord,
    Finding,
    LayerRecord,
    LeftAlone,
    Measurement,
    Safety,
    StatisticsVerdict,
)
from bnlab.remedies.counters import new_counters, write_counters
from bnlab.remedies.precision import passes_note, source_note, why_not_reached
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.remedy import Material, Refusal, Remedy, RemedyPlan, record_of
from bnlab.remedies.running_statistics import distance_in_std, statistics_text, stored_statistics, write_statistics
from bnlab.wording import OTHER_DIRECTION, counted

__all__ = ["Recalibrate", "recalibrate", "recalibrate_with", "why_kept"]


class Recalibrate(Remedy):
    """Recompute the running statistics of the layers in a plan. All other layers keep theirs."""

    name = "recalibrate"

    def plan(self, evidence: DiagnosisRecord, finding: Finding) -> RemedyPlan | Refusal:
        """Return the layers that the verdict on the statistics names, or why they keep their statistics.

        Statistics that are not finite, or whose variance plus eps is negative, are recomputed whatever the verdict.
        """
        named = (finding.layer,) if _is_impossible(evidence, finding) else _advised_layers(evidence, finding)
        if isinstance(named, Refusal):
            return named
        records = [record for name in named if (record := record_of(evidence, name)) is not None]
        changes = tuple(
            Change(record.name, "running statistics", _statistics_text(record), "recomputed") for record in records
        )
        return RemedyPlan(self.name, tuple(record.name for record in records), changes)

    def apply(self, model: nn.Module, layers: Sequence[str], material: Material) -> Receipt:
        """Recalibrate the layers."""
        settings = RecalibrationSettings(layerwise=material.layerwise, forward=material.forward)
        return recalibrate_with(
            model, material.batches, settings, layers=layers, ran=material.ran, advance=material.advance
        )


def _is_impossible(evidence: DiagnosisRecord, finding: Finding) -> bool:
    """Return whether no network can have been trained with these statistics."""
    record = record_of(evidence, finding.layer)
    if record is None or finding.code not in ("BN101", "BN102"):
        return False
    return finding.code == "BN101" or record.running_var is None or record.running_var.min + record.eps < 0


def _advised_layers(evidence: DiagnosisRecord, finding: Finding) -> tuple[str, ...] | Refusal:
    verdict = evidence.statistics
    if verdict is None:
        return Refusal("the statistics are those of the data")
    refusal = why_kept(verdict)
    if refusal is not None:
        return refusal
    if finding.layer is not None and finding.layer not in verdict.layers:
        return Refusal("the loss is lower if this layer keeps its statistics")
    return verdict.layers


UNDECIDED = "nothing shows that recalibrating helps: pass labels, loss= or metric=, or force=True"
"""Why statistics are kept where nothing can decide."""


def why_kept(verdict: StatisticsVerdict) -> Refusal | None:
    """Return why the layers of a verdict keep their statistics; None if they do not."""
    if verdict.advice is Advice.RECALIBRATE:
        return None
    direction = f", or {OTHER_DIRECTION}" if verdict.hangs_on_metric else ""
    return Refusal(_REASONS[verdict.advice].format(measured=str(verdict.decided_by).removeprefix("the ")) + direction)


_REASONS = {
    Advice.KEEP: "the weights were trained with these statistics, as the {measured} shows",
    Advice.NO_DIFFERENCE: "recalibrating makes no difference to the {measured}",
    Advice.WORSE_ON_DATA: "recalibrating makes the evaluation data worse",
    Advice.UNDECIDED: UNDECIDED,
}
"""Why statistics are kept."""


def _statistics_text(record: LayerRecord) -> str:
    mean, var = record.running_mean, record.running_var
    return ", ".join(
        f"{name} not finite" if values is None else f"{name} {values.min:.3g}..{values.max:.3g}"
        for name, values in (("mean", mean), ("var", var))
    )


@one_at_a_time("recalibrate")
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Estimator = "population",
    layerwise: bool = False,
    max_batches: int | None = None,
    standard_error: float | None = None,
    layers: Iterable[str] | None = None,
    keep_counters: bool = False,
    forward: Forward | None = None,
) -> Receipt:
    """Compute the running statistics of a model anew from data, in place.

    During recalibration, the selected layers normalise with batch statistics, all other BN layers normalise with their
    running statistics, and dropout is off. A forward pass stops after the last BN layer that the first pass ran. Only
    the values of `running_mean`, `running_var` and `num_batches_tracked` change. If anything raises an error, they keep
    their old values too.

    The counters of all BN layers are set to one number: the largest of them, or ceil(ln 0.01 / ln(1 - momentum)) if
    that is larger. A moving average with so many updates has forgotten its initial values, so that a checkpoint of the
    model shows that its statistics are settled (BN105), also after further training.

    Frozen layers are left alone: those of a frozen class, those whose statistics `freeze` holds, and those in eval
    mode within a module in train mode. Layers that never run are left alone too. A layer that runs more than once in a
    forward pass gets the statistics over all its calls.

    Args:
        model: Any module, in any mode, or a graph of `torch.export`, whose buffers change in place.
        batches: An iterable that can be iterated over more than once, or a function that returns a new one. A batch is
            a tensor, a tuple or list (input first, and as many elements as the forward of the model requires), a dict
            (the keywords that it has), any other form in docs/batches.md, or whatever `forward` takes. A batch in which
            a layer gets a NaN, an inf, or one value per channel is left out of every layer, and the receipt counts it.
            Use shuffled training data with the preprocessing of training, in batches of 100 samples or more.
        estimator: "population" pools all batches exactly: it weights them by count, applies the law of total variance,
            and stores M2/(N-1). "within-batch" stores the mean of the unbiased batch variances, weighted by count. The
            BN paper and torch's buffers estimate this one. It ignores the differences between batches.
        layerwise: Whether each layer is measured after all earlier layers have their final statistics. This is exact
            for any batch size and takes one pass per layer. A single pass for all layers carries the noise of the batch
            statistics from layer to layer.
        max_batches: The number of batches after which to stop.
        standard_error: The standard error that is small enough, such as 0.01: no further batch is read once the
            largest, over layers and channels, of the standard errors of mean/std and of ln(var)/2 is not above it. It
            comes from the differences between the batches, of which at least 8 are read, and takes each for a random
            one: shuffle the data. Batches that are seen to come in some order, such as that of their labels, are read
            to the end. The receipt says how many batches were read, and what was reached in which layer and channel.
            With `layerwise`, each layer reads as many batches as it needs itself.
        layers: Paths, or patterns such as "layer4.*". Frozen layers that are named here are recalibrated too.
        keep_counters: Whether `num_batches_tracked` stays as it is.
        forward: A function forward(model, batch), for models that cannot be called on the batch directly.

    Returns:
        The receipt, with the old and new statistics of every layer, the distance between them, and the standard error.
        `undo()` restores the old statistics.

    Warns:
        BnlabWarning: If the data end before `standard_error` is reached. The statistics of all of them are stored.

    Raises:
        NoBatchNorm: If there is no BN layer.
        UsageError: If an argument is invalid, no layer keeps running statistics, forward raises, or no batch is usable.

    Source:
        Ioffe and Szegedy 2015 (arXiv:1502.03167), Algorithm 2. Wu and Johnson 2021 (arXiv:2105.07576), sections 3 and
        A.2 for the estimators, and A.3 for `layerwise`.
        Before rounding to the dtype of the buffers, means differ from those of float64 by at most 1e-6 standard
        deviations, and variances by at most 1e-6 of their value.

    Example:
        >>> import bnlab
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> receipt = bnlab.recalibrate(model, [torch.randn(64, 3, 8, 8) + 5 for _ in range(4)])
        >>> receipt.changes.changes[0].before
        'mean 0..0, var 1..1'
    """
    settings = RecalibrationSettings.of(
        estimator,
        layerwise=layerwise,
        max_batches=max_batches,
        standard_error=standard_error,
        keep_counters=keep_counters,
        forward=forward,
    )
    batches = require_data("batches", batches)
    return recalibrate_with(model, batches, settings, layers=layers)


@dataclass(frozen=True, kw_only=True)
class RecalibrationSettings:
    """Validated settings of a recalibration."""

    estimator: Estimator = "population"
    layerwise: bool = False
    max_batches: int | None = None
    standard_error: float | None = None
    keep_counters: bool = False
    forward: Forward = run_batch

    @classmethod
    def of(
        cls,
        estimator: Estimator,
        *,
        layerwise: bool,
        max_batches: int | None,
        standard_error: float | None,
        keep_counters: bool,
        forward: Forward | None,
    ) -> RecalibrationSettings:
        """Validate the arguments of :func:`recalibrate`.

        Raises:
            UsageError: If one of them is invalid.
        """
        if estimator not in get_args(Estimator):
            raise UsageError(f"recalibrate: estimator must be 'population' or 'within-batch', got {estimator!r}.")
        if max_batches is not None and not is_count(max_batches):
            raise UsageError(f"recalibrate: max_batches must be a number of at least 1 or None, got {max_batches!r}.")
        if standard_error is not None and not _is_finite_and_positive(standard_error):
            raise UsageError(
                f"recalibrate: standard_error must be finite and > 0, got {standard_error!r}. "
                "Pass a number of standard deviations, such as 0.01."
            )
        return cls(
            estimator=estimator,
            layerwise=layerwise,
            max_batches=max_batches,
            standard_error=standard_error,
            keep_counters=keep_counters,
            forward=require_forward("recalibrate", forward),
        )


def _is_finite_and_positive(value: object) -> bool:
    return isinstance(value, (int, float, np.floating)) and not isinstance(value, bool) and bool(0 < value < math.inf)


def recalibrate_with(
    model: nn.Module,
    batches: Iterable[Any],
    settings: RecalibrationSettings,
    *,
    layers: Iterable[str] | None = None,
    ran: Collection[str] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Receipt:
    """Recalibrate with validated arguments.

    Args:
        model: Any module.
        batches: Batches.
        settings: How to recalibrate.
        layers: The layers to recalibrate; None for all that are not frozen.
        ran: The layers that are known to run; None where that is not known.
        advance: Called after every batch.
    """
    if layers is not None and not isinstance(layers, str):
        layers = [path_inside(model, path) for path in layers]
    with opened(unwrapped(model)) as program:
        if program.batch_size is not None and settings.forward is run_batch:
            batches = BatchesOfSize(batches, program.batch_size)
        if program.left_alone and not any_batch_norm(program.model):
            name, reason = program.left_alone[0]
            raise NoBatchNorm(f"model: it must contain a BN layer, got none: {name or 'the model'} {reason}.")
        receipt = _recalibrated(program.model, batches, settings, layers, ran, advance)
    left_out = batches.note if isinstance(batches, BatchesOfSize) else None
    notes = (*receipt.changes.notes, *program.notes, *([] if left_out is None else [left_out]))

    def undo() -> None:
        receipt.undo()

    return Receipt(model, replace(receipt.changes, notes=notes), undo)


def _recalibrated(
    real: nn.Module,
    batches: Iterable[Any],
    settings: RecalibrationSettings,
    layers: Iterable[str] | None,
    ran: Collection[str] | None,
    advance: Callable[[], None],
) -> Receipt:
    """Recalibrate a model whose BN layers are modules."""
    chosen, left_alone = _chosen(real, layers)
    rule = "forward must run on every batch"
    with values_at_hand(real), uncompiled(), usage_error_unless(rule):
        if settings.layerwise:
            pooling = _layer_by_layer(Subject(real, settings.forward), chosen, batches, settings, advance)
        else:
            pooling = _pooled(Subject(real, settings.forward), chosen, batches, settings, advance)
    unused = [LeftAlone(path, "never ran on these batches") for path in chosen if path not in pooling.layers]
    new = {path: (pooled.mean, pooled.var(settings.estimator)) for path, pooled in pooling.layers.items()}
    old = stored_statistics({path: chosen[path] for path in new})
    with all_or_nothing(real):
        written = write_statistics(chosen, new)
        counted = _counted_layers(real, unused, ran)
        numbers = {} if settings.keep_counters else new_counters(counted, new.keys(), pooling.batches)
        counters = write_counters(counted, numbers)

    def undo() -> None:
        counters.require_unchanged()
        written.undo()
        counters.restore()

    changes = [
        Change(path, "running statistics", statistics_text(*old[path]), statistics_text(*new[path])) for path in new
    ]
    changes += [
        Change(path, "num_batches_tracked", str(before), str(after))
        for path, (before, after) in counters.changes.items()
    ]
    record = Changes(
        bnlab=__version__,
        action="recalibrate",
        safety=Safety.STATISTICS,
        changes=tuple(changes),
        left_alone=(*left_alone, *unused),
        notes=tuple(_notes(pooling, settings, written.clipped)),
        measurements=tuple(_measurements(chosen, pooling, settings, old, new)),
    )
    warning = why_not_reached(pooling, settings.estimator, settings.standard_error)
    if warning is not None:
        warnings.warn(warning, BnlabWarning, stacklevel=5)
    return Receipt(real, record, undo)


def _counted_layers(
    model: nn.Module, unused: Iterable[LeftAlone], ran: Collection[str] | None
) -> dict[str, _BatchNorm]:
    """Return the layers whose counters may change: no frozen layer, and no layer that is known not to run."""
    left_out = {left.layer for left in unused}
    return {
        path: layer
        for path, layer in batch_norm_layers(model).items()
        if path not in left_out and (ran is None or path in ran) and why_frozen(model, path) is None
    }


def _chosen(model: nn.Module, named: Iterable[str] | None) -> tuple[dict[str, _BatchNorm], list[LeftAlone]]:
    """Return the layers to recalibrate, and the layers left alone with the reasons."""
    selected = batch_norm_layers(model, named)
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise UsageError("model: it must know its shapes, got a lazy layer. Run one batch first.")
    empty = [path for path, layer in selected.items() if layer.running_mean is not None and layer.running_mean.is_meta]
    if empty:
        raise UsageError(
            f"{empty[0] or 'model'}: layer must hold its running statistics to be recalibrated, got them on the meta "
            "device. Load a state dict, or dispatch the model with offload_buffers=False."
        )
    without_statistics = [
        path for path, layer in selected.items() if layer.running_mean is None or layer.running_var is None
    ]
    if without_statistics and (named is not None or len(without_statistics) == len(selected)):
        raise UsageError(
            f"{without_statistics[0] or 'model'}: layer must keep running statistics to be recalibrated, got "
            f"track_running_stats=False. Leave it out: it normalises with batch statistics in eval mode too."
        )
    reasons = dict.fromkeys(without_statistics, "keeps no running statistics")
    if named is None:
        reasons = {path: why for path in selected if (why := why_frozen(model, path))} | reasons
    chosen = {path: layer for path, layer in selected.items() if path not in reasons}
    _require_own_buffers(chosen)
    if not chosen:
        path, reason = next(iter(reasons.items()))
        raise UsageError(f"{path or 'model'}: layer must not be frozen, got one that {reason}. Name it in layers=.")
    return chosen, [LeftAlone(path, reason) for path, reason in reasons.items()]


def _require_own_buffers(chosen: Mapping[str, _BatchNorm]) -> None:
    """Raise if two layers share a buffer, because one buffer cannot hold the statistics of both."""
    owner: dict[int, str] = {}
    for path, layer in chosen.items():
        for buffer in (layer.running_mean, layer.running_var):
            other = owner.setdefault(id(buffer), path)
            if other != path:
                raise UsageError(
                    f"{path}: layer must have running statistics of its own, got those of {other}. "
                    f"Give it copies of the buffers, or name only one of the two layers in layers=."
                )


def _pooled(
    subject: Subject,
    chosen: Mapping[str, _BatchNorm],
    batches: Iterable[Batch],
    settings: RecalibrationSettings,
    advance: Callable[[], None],
    *,
    by_batch: Collection[nn.Module] = (),
    imposed: Mapping[_BatchNorm, tuple[Floats, Floats]] | None = None,
) -> Pooling:
    return pool(
        subject,
        chosen,
        batches,
        by_batch=by_batch,
        imposed=imposed,
        estimator=settings.estimator,
        max_batches=settings.max_batches,
        standard_error=settings.standard_error,
        data_order=LabelOrder(),
        advance=advance,
    )


def _layer_by_layer(
    subject: Subject,
    chosen: Mapping[str, _BatchNorm],
    batches: Iterable[Batch],
    settings: RecalibrationSettings,
    advance: Callable[[], None],
) -> Pooling:
    """Measure each layer after all earlier ones are final, as in Wu and Johnson 2021, appendix A.3."""
    remaining = list(_pooled(subject, chosen, batches, settings, advance).layers)
    final: dict[_BatchNorm, tuple[Floats, Floats]] = {}
    poolings: dict[str, Pooling] = {}
    while remaining:
        path = remaining.pop(0)
        later = [chosen[name] for name in remaining]
        poolings[path] = _pooled(
            subject, {path: chosen[path]}, batches, settings, advance, by_batch=later, imposed=final
        )
        pooled = poolings[path].layers[path]
        final[chosen[path]] = pooled.mean, pooled.var(settings.estimator)
    passes = poolings.values()
    return Pooling(
        layers={path: pooling.layers[path] for path, pooling in poolings.items()},
        batches=max(pooling.batches for pooling in passes),
        samples=max(pooling.samples for pooling in passes),
        not_finite=max(pooling.not_finite for pooling in passes),
        one_value=max(pooling.one_value for pooling in passes),
        end=min((pooling.end for pooling in passes), key=list(End).index),
        order=next((pooling.order for pooling in passes if pooling.order is not None), None),
    )


def _measurements(
    layers: Mapping[str, _BatchNorm],
    pooling: Pooling,
    settings: RecalibrationSettings,
    old: Mapping[str, tuple[Floats, Floats]],
    new: Mapping[str, tuple[Floats, Floats]],
) -> Iterable[Measurement]:
    errors = pooling.standard_errors(settings.estimator)
    for path in pooling.layers:
        yield Measurement(path, "moved by", distance_in_std(old[path], new[path], layers[path].eps), "std")
        if path in errors:
            yield Measurement(path, "standard error", errors[path].value, "std")


def _notes(pooling: Pooling, settings: RecalibrationSettings, clipped: Mapping[str, int]) -> Iterable[str]:
    yield source_note(pooling, settings.estimator, settings.standard_error)
    of_passes = passes_note(pooling) if settings.layerwise else None
    if of_passes is not None:
        yield of_passes
    if pooling.not_finite:
        left_out = counted(pooling.not_finite, "batch", "batches", separator=",")
        yield f"left out: {left_out} in which a layer gets a NaN or inf"
    if pooling.one_value:
        left_out = counted(pooling.one_value, "batch", "batches", separator=",")
        yield f"left out: {left_out} of one value per channel"
    for path, count in clipped.items():
        values = counted(count, "value", separator=",")
        yield f"{path or 'the model itself'}: {values} clipped to the range of the stored dtype"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        yield "the statistics come from the batches of this rank only"
