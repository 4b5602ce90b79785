"""recalibrate: running statistics computed anew from data, under the weights as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlab._version import __version__
from bnlab.errors import UsageError
from bnlab.observe.discover import batch_norm_layers, why_frozen
from bnlab.observe.evidence import Floats
from bnlab.observe.gap import IN_THE_STATISTICS
from bnlab.observe.passes.batches import Batch, Forward, require_data, run_batch
from bnlab.observe.passes.pooling import Estimator, Pooling, pool
from bnlab.observe.passes.subject import Subject, usage_error_unless
from bnlab.records import Change, Changes, DiagnosisRecord, Finding, LayerRecord, LeftAlone, Measurement, Safety
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.remedy import Material, Refusal, Remedy, RemedyPlan, record_of
from bnlab.remedies.running_statistics import described, distance_in_std, stored_statistics, write_statistics
from bnlab.wording import counted

__all__ = ["Recalibrate", "recalibrate", "recalibrate_with"]

_ENOUGH = 0.03
"""Standard error that serves: 1,000 independent samples; with as many Wu and Johnson 2021, table 1, lose 0.03 %."""

_MENDED_SHARE = 0.2
"""Share of a layer's gap that must lie in its running statistics, for recalibrating to be the answer to it."""


class Recalibrate(Remedy):
    """Recompute the running statistics of the layers that were found, with the others as they are."""

    name = "recalibrate"

    def plan(self, evidence: DiagnosisRecord, finding: Finding) -> RemedyPlan | Refusal:
        """Return the layers whose statistics are wrong.

        Statistics of 0 and 1 may be meant: a network that is always run in eval mode computes with them. Only a metric
        can tell.
        """
        named = _mended_layers(evidence) if finding.layer is None else (finding.layer,)
        records = [record for name in named if (record := record_of(evidence, name)) is not None]
        if finding.code == "BN301" and finding.layer is not None and not any(map(_lies_in_statistics, records)):
            return Refusal("its gap does not lie in the running statistics")
        if not records:
            return Refusal("no layer is known whose running statistics cause it")
        if evidence.numbers is None:
            records = [record for record in records if not _is_untouched(record)]
            if not records:
                return Refusal(
                    "mean 0 and variance 1 may be meant, as in a network always run in eval mode: give a metric"
                )
        changes = tuple(Change(record.name, "running statistics", _shown(record), "recomputed") for record in records)
        return RemedyPlan(self.name, tuple(record.name for record in records), changes)

    def apply(self, model: nn.Module, layers: Sequence[str], material: Material) -> Receipt:
        """Recalibrate the layers."""
        settings = RecalibrationSettings(layerwise=material.layerwise)
        return recalibrate_with(model, material.batches, settings, layers=layers, advance=material.advance)


def _mended_layers(evidence: DiagnosisRecord) -> tuple[str, ...]:
    """Return the layers in which causes act that lie in the running statistics."""
    acting = [
        cause.layers for cause in evidence.causes if cause.cause in IN_THE_STATISTICS and cause.share > _MENDED_SHARE
    ]
    return tuple(dict.fromkeys(layer for layers in acting for layer in layers))


def _lies_in_statistics(record: LayerRecord) -> bool:
    gap = record.gap or {}
    return sum(gap.get(cause, 0.0) for cause in IN_THE_STATISTICS) > _MENDED_SHARE * gap.get("total", 0.0)


def _is_untouched(record: LayerRecord) -> bool:
    mean, var = record.running_mean, record.running_var
    return mean is not None and var is not None and (mean.min, mean.max, var.min, var.max) == (0.0, 0.0, 1.0, 1.0)


def _shown(record: LayerRecord) -> str:
    mean, var = record.running_mean, record.running_var
    return ", ".join(
        f"{name} not finite" if values is None else f"{name} {values.min:.3g}..{values.max:.3g}"
        for name, values in (("mean", mean), ("var", var))
    )


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Estimator = "population",
    layerwise: bool = False,
    max_batches: int | None = None,
    layers: Iterable[str] | None = None,
    forward: Forward | None = None,
    tolerance: float | None = None,
) -> Receipt:
    """Compute the running statistics of a model anew from data, in place.

    The layers that are recalibrated normalise with the statistics of each batch on the way, every other BN with its
    running statistics, and dropout is off. A forward pass ends where the first had its last BN layer. Nothing but the
    values of `running_mean` and `running_var` changes; if anything raises, not even they.

    Frozen layers stay as they are: those of a frozen class, those whose statistics `freeze` holds, and those in eval
    mode within a module in train mode. So do layers that never run. A layer that runs more than once per forward gets
    what all its calls see together.

    Args:
        model: Any module, in any mode.
        batches: An iterable that can be run through again. A batch is a tensor, a tuple or list (input first), a dict
            (passed as keywords), or whatever `forward` takes. Those in which a layer gets a NaN, an inf, or one value
            per channel are left out of every layer, and counted. Use shuffled training data with the preprocessing of
            training, in batches of 100 samples or more.
        estimator: "population" pools all batches exactly, by the law of total variance with the count of each, and
            stores M2/(N-1). "within-batch" is the mean of the unbiased batch variances, weighted by count: what the BN
            paper and torch's buffers estimate; it leaves out how much the batches differ.
        layerwise: Whether each layer is measured with all earlier ones already final. That is exact for any batch size,
            where one pass carries the noise of the batches from layer to layer; it takes a pass per layer.
        max_batches: Stop after that many batches.
        layers: Paths, or patterns such as "layer4.*"; frozen layers named here are recalibrated too.
        forward: forward(model, batch), where calling the model on the batch is not enough.
        tolerance: Stop once the standard error of every layer is below this, in standard deviations of its output;
            looked at from the eighth batch on.

    Returns:
        The receipt: old and new statistics of every layer, how far each moved, and its standard error. `undo()` puts
        the old statistics back.

    Raises:
        NoBatchNorm: If there is no BN layer.
        UsageError: If an argument is wrong, no layer keeps running statistics, forward raises, or no batch is usable.

    Source:
        Ioffe and Szegedy 2015, Algorithm 2; Wu and Johnson 2021, sections 3 and A.2 (estimators), A.3 (layerwise).
        Means are within 1e-6 standard deviations and variances within 1e-6 of those of float64, before they are
        rounded to the dtype of the buffers.

    Example:
        >>> import bnlab
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> receipt = bnlab.recalibrate(model, [torch.randn(64, 3, 8, 8) + 5 for _ in range(4)])
        >>> receipt.changes.changes[0].before
        'mean 0..0, var 1..1'
    """
    settings = RecalibrationSettings.of(
        estimator, layerwise=layerwise, max_batches=max_batches, forward=forward, tolerance=tolerance
    )
    require_data("batches", batches)
    return recalibrate_with(model, batches, settings, layers=layers)


@dataclass(frozen=True, kw_only=True)
class RecalibrationSettings:
    """How to recalibrate, validated."""

    estimator: Estimator = "population"
    layerwise: bool = False
    max_batches: int | None = None
    forward: Forward = run_batch
    tolerance: float | None = None

    @classmethod
    def of(
        cls,
        estimator: Estimator,
        *,
        layerwise: bool,
        max_batches: int | None,
        forward: Forward | None,
        tolerance: float | None,
    ) -> RecalibrationSettings:
        """Validate the arguments of :func:`recalibrate`.

        Raises:
            UsageError: If one of them is outside what it may be.
        """
        if estimator not in get_args(Estimator):
            raise UsageError(f"recalibrate: estimator must be 'population' or 'within-batch', got {estimator!r}.")
        if max_batches is not None and not _is_count(max_batches):
            raise UsageError(f"recalibrate: max_batches must be a number of at least 1 or None, got {max_batches!r}.")
        if tolerance is not None and not 0 < tolerance < math.inf:
            raise UsageError(f"recalibrate: tolerance must be finite and > 0, got {tolerance!r}.")
        if forward is not None and not callable(forward):
            raise UsageError(f"recalibrate: forward must be callable, got {type(forward).__name__}.")
        return cls(
            estimator=estimator,
            layerwise=layerwise,
            max_batches=max_batches,
            forward=forward or run_batch,
            tolerance=tolerance,
        )


def recalibrate_with(
    model: nn.Module,
    batches: Iterable[Any],
    settings: RecalibrationSettings,
    *,
    layers: Iterable[str] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Receipt:
    """Recalibrate with validated arguments; `advance` is called after every batch."""
    real = getattr(model, "_orig_mod", model)  # of a compiled model: one graph hides the layers
    chosen, left_alone = _chosen(real, layers)
    with torch.compiler.set_stance("force_eager"), usage_error_unless("forward must run on every batch"):
        if settings.layerwise:
            pooling = _layer_by_layer(Subject(real), chosen, batches, settings, advance)
        else:
            pooling = _pooled(Subject(real), chosen, batches, settings, advance)
    unused = [LeftAlone(path, "never ran on these batches") for path in chosen if path not in pooling.layers]
    new = {path: (pooled.mean, pooled.var(settings.estimator)) for path, pooled in pooling.layers.items()}
    old = {path: stored_statistics(chosen[path]) for path in new}
    written = write_statistics(chosen, new)
    record = Changes(
        bnlab=__version__,
        action="recalibrate",
        safety=Safety.STATISTICS,
        changes=tuple(Change(path, "running statistics", described(*old[path]), described(*new[path])) for path in new),
        left_alone=(*left_alone, *unused),
        notes=tuple(_notes(pooling, written.clipped)),
        measurements=tuple(_measurements(chosen, pooling, old, new)),
    )
    return Receipt(model, record, written.undo)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _chosen(model: nn.Module, named: Iterable[str] | None) -> tuple[dict[str, _BatchNorm], list[LeftAlone]]:
    """Return the layers to recalibrate, and the others with the reason."""
    found = batch_norm_layers(model, named)
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise UsageError("model: it must know its shapes, got a lazy layer. Run one batch first.")
    without = [path for path, layer in found.items() if layer.running_mean is None or layer.running_var is None]
    if without and (named is not None or len(without) == len(found)):
        raise UsageError(
            f"{without[0] or 'model'}: layer must keep running statistics to be recalibrated, got "
            f"track_running_stats=False. Its eval mode uses those of the batch: there is nothing to recalibrate."
        )
    reasons = dict.fromkeys(without, "keeps no running statistics")
    if named is None:
        reasons = {path: why for path in found if (why := why_frozen(model, path))} | reasons
    chosen = {path: layer for path, layer in found.items() if path not in reasons}
    _require_own_buffers(chosen)
    if not chosen:
        path, reason = next(iter(reasons.items()))
        raise UsageError(f"{path or 'model'}: layer must not be frozen, got one that {reason}. Name it in layers=.")
    return chosen, [LeftAlone(path, reason) for path, reason in reasons.items()]


def _require_own_buffers(chosen: Mapping[str, _BatchNorm]) -> None:
    """Refuse layers that share a buffer: one cannot hold the statistics of two."""
    owner: dict[int, str] = {}
    for path, layer in chosen.items():
        for buffer in (layer.running_mean, layer.running_var):
            other = owner.setdefault(id(buffer), path)
            if other != path:
                raise UsageError(
                    f"{path}: layer must have running statistics of its own, got those of {other}. "
                    f"Give it a copy, or name only one of them in layers=."
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
        forward=settings.forward,
        max_batches=settings.max_batches,
        tolerance=settings.tolerance,
        advance=advance,
    )


def _layer_by_layer(
    subject: Subject,
    chosen: Mapping[str, _BatchNorm],
    batches: Iterable[Batch],
    settings: RecalibrationSettings,
    advance: Callable[[], None],
) -> Pooling:
    """Measure each layer with all earlier ones final: Wu and Johnson 2021, appendix A.3."""
    waiting = list(_pooled(subject, chosen, batches, settings, advance).layers)
    final: dict[_BatchNorm, tuple[Floats, Floats]] = {}
    found: dict[str, Pooling] = {}
    while waiting:
        path = waiting.pop(0)
        later = [chosen[name] for name in waiting]
        found[path] = _pooled(subject, {path: chosen[path]}, batches, settings, advance, by_batch=later, imposed=final)
        pooled = found[path].layers[path]
        final[chosen[path]] = pooled.mean, pooled.var(settings.estimator)
    passes = found.values()
    return Pooling(
        layers={path: pooling.layers[path] for path, pooling in found.items()},
        batches=max(pooling.batches for pooling in passes),
        samples=max(pooling.samples for pooling in passes),
        not_finite=max(pooling.not_finite for pooling in passes),
        one_value=max(pooling.one_value for pooling in passes),
        stopped_early=any(pooling.stopped_early for pooling in passes),
    )


def _measurements(
    layers: Mapping[str, _BatchNorm],
    pooling: Pooling,
    old: Mapping[str, tuple[Floats, Floats]],
    new: Mapping[str, tuple[Floats, Floats]],
) -> Iterable[Measurement]:
    for path, error in pooling.standard_errors.items():
        yield Measurement(path, "moved by", distance_in_std(old[path], new[path], layers[path].eps), "std")
        if error is not None:
            yield Measurement(path, "standard error", error, "std")


def _notes(pooling: Pooling, clipped: Mapping[str, int]) -> Iterable[str]:
    batches = counted(pooling.batches, "batch", "batches", separator=",")
    source = f"from {batches}, {counted(pooling.samples, 'sample', separator=',')}"
    errors = [error for error in pooling.standard_errors.values() if error is not None]
    if errors:
        needed = math.ceil(pooling.samples * (max(errors) / _ENOUGH) ** 2)
        stopped = ", stopped at the tolerance" if pooling.stopped_early else ""
        yield f"{source}{stopped}; {needed:,} are enough for a standard error of {_ENOUGH} std"
    else:
        yield f"{source}: one batch does not tell how far to trust them"
    if pooling.not_finite:
        left_out = counted(pooling.not_finite, "batch", "batches", separator=",")
        yield f"left out: {left_out} in which a layer gets a NaN or inf"
    if pooling.one_value:
        left_out = counted(pooling.one_value, "batch", "batches", separator=",")
        yield f"left out: {left_out} of one value per channel"
    for path, count in clipped.items():
        values = counted(count, "value", separator=",")
        yield f"{path or 'the model itself'}: {values} beyond the range of the stored dtype"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        yield "the statistics are those of the batches of this rank alone"
