"""Pools the statistics of the inputs of BN layers over a data set exactly, in one pass and O(channels) memory.

The pooled layers normalise with the statistics of each batch. Every other BN layer uses its running statistics, and
dropout is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError
from bnlab.functional.streaming import StreamingMoments
from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Floats
from bnlab.observe.passes.batches import samples_in
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.order import ForwardEnded
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.passes.population import impose_statistics
from bnlab.observe.passes.statistics import LayerCall, Run, measuring
from bnlab.observe.passes.subject import Subject

__all__ = ["Estimator", "Pooled", "Pooling", "pool"]

Estimator = Literal["population", "within-batch"]
"""Selects the variance: that of the population, or the mean of the unbiased variances of the batches."""

_MIN_BATCHES_TO_STOP = 8
"""Number of batches below which the spread of the batch statistics is too uncertain to stop the pass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pooled:
    """The statistics of the input of one layer over all batches; arrays have the shape (C,), float64.

    Attributes:
        batches: Calls that were pooled.
        count: Values per channel.
        mean: Mean over every value, input units.
        population_var: M2/(N-1), by the law of total variance, squared input units.
        within_var: Mean of the unbiased batch variances, weighted by count, squared input units.
        batch_mean_var: Variance of the batch means over batches.
        batch_var_var: Variance of the unbiased batch variances over batches.
    """

    batches: int
    count: int
    mean: Floats
    population_var: Floats
    within_var: Floats
    batch_mean_var: Floats
    batch_var_var: Floats

    def var(self, estimator: Estimator) -> Floats:
        """Return the variance that the estimator selects."""
        return self.population_var if estimator == "population" else self.within_var

    @property
    def standard_error(self) -> float | None:
        """Root mean square over channels of the error of the normalised output, in standard deviations.

        The squared error of a channel is SE(mean)^2/var + SE(var)^2/(4 var^2), where the standard errors come from the
        spread of the batch statistics. The value is None for fewer than two batches.
        """
        if self.batches < 2:
            return None
        var = np.where(self.population_var > 0, self.population_var, np.inf)
        square = (self.batch_mean_var / var + self.batch_var_var / (4 * var**2)) / self.batches
        return math.sqrt(float(square.mean()))


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """The result of a pooling pass over a data set.

    Attributes:
        layers: The pooled statistics of each layer, in the order in which the layers ran. A layer that never ran has no
            entry.
        batches: Batches that were pooled.
        samples: Samples in the pooled batches.
        not_finite: Batches that were left out because a layer got a NaN or inf.
        one_value: Batches that were left out because a layer got one value per channel.
        stopped_early: Whether the tolerance was reached before the data ended.
    """

    layers: Mapping[str, Pooled]
    batches: int
    samples: int
    not_finite: int
    one_value: int
    stopped_early: bool

    @cached_property
    def standard_errors(self) -> Mapping[str, float | None]:
        """The standard error of each layer; None for a layer with fewer than two batches."""
        return {path: pooled.standard_error for path, pooled in self.layers.items()}


def pool(
    subject: Subject,
    layers: Mapping[str, nn.Module],
    data: Iterable[Batch],
    *,
    by_batch: Collection[nn.Module] = (),
    imposed: Mapping[_BatchNorm, tuple[Floats, Floats]] | None = None,
    max_batches: int | None = None,
    tolerance: float | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Pooling:
    """Return the pooled statistics of the inputs of layers over a data set.

    A batch in which a layer gets a NaN, an inf or one value per channel is left out of every layer.

    Args:
        subject: The model, which is restored afterwards.
        layers: The layers to pool, by path. They normalise with the statistics of each batch.
        data: Batches.
        by_batch: Other layers that also normalise with the statistics of each batch.
        imposed: Mean and variance with which further layers normalise instead of their running statistics.
        max_batches: Number of batches after which the pass stops; None for no limit.
        tolerance: Standard error, in standard deviations, at which the pass stops. It is checked from the eighth batch
            on.
        advance: Called after every batch.

    Raises:
        UsageError: If there is no batch, or if every batch is left out.

    Source:
        Wu and Johnson 2021, appendix A.2; merged as in Chan, Golub and LeVeque 1983.
    """
    meters = _Meters({path: _Meter(channels_of(layer)) for path, layer in layers.items()}, tolerance)
    with (
        impose_statistics(imposed or {}),
        measuring(subject, layers, meters.stage, by_batch=by_batch) as run,
    ):
        _run_batches(run, meters, batches_of(data, subject.model), max_batches, advance)
        seen = list(run.order.seen)
    if not meters.batches:
        raise UsageError(_nothing_usable(meters))
    return Pooling(
        layers={path: meters.layers[path].result() for path in seen if meters.layers[path].batches},
        batches=meters.batches,
        samples=meters.samples,
        not_finite=meters.not_finite,
        one_value=meters.one_value,
        stopped_early=meters.have_converged,
    )


def _run_batches(
    run: Run,
    meters: _Meters,
    batches: Iterable[Batch],
    max_batches: int | None,
    advance: Callable[[], None],
) -> None:
    """Run the batches until the data end, or so many have run, or the meters have converged.

    Values that wait on a device are read every few batches, so that a few run that the meters do not take in any more.
    """
    if max_batches == 0:
        return
    for index, batch in enumerate(batches, start=1):
        run.then(meters.begin)
        one_value = run.one_batch(batch) is not None
        run.then(partial(meters.end, samples_in(batch), one_value=one_value))
        advance()
        if meters.tolerance is not None and index % _MIN_BATCHES_TO_STOP == 0:
            run.settle()
        if meters.have_converged or index == max_batches:
            break
    run.settle()


def _nothing_usable(meters: _Meters) -> str:
    if meters.not_finite:
        return f"batches: at least one must be finite, got {meters.not_finite} in which a layer gets a NaN or inf."
    if meters.one_value:
        return (
            f"batches: they must leave more than 1 value per channel, got {meters.one_value} with 1. "
            "Use larger batches."
        )
    return "batches: there must be at least one, got none."


@dataclass
class _Meters:
    """The meters of a pass. They take in all calls of a batch or none of them, and none once they have converged."""

    layers: Mapping[str, _Meter]
    tolerance: float | None = None
    have_converged: bool = False
    staged: list[tuple[str, int, Floats, Floats]] = field(default_factory=list)
    is_finite: bool = True
    batches: int = 0
    samples: int = 0
    not_finite: int = 0
    one_value: int = 0

    def begin(self) -> None:
        """Begin a batch."""
        self.staged.clear()
        self.is_finite = True

    def stage(self, call: LayerCall) -> None:
        """Hold a call until the batch ends.

        Raises:
            ForwardEnded: If the call is not finite. The batch is then left out, and the modules behind the layer, which
                may not accept a NaN, do not run.
        """
        self.is_finite = self.is_finite and call.is_finite
        if not self.is_finite:
            raise ForwardEnded
        self.staged.append((call.path, call.count, call.mean, call.var))

    def end(self, samples: int, *, one_value: bool) -> None:
        """Merge the calls of the batch if the batch can be used, and count the batch."""
        if self.have_converged:
            return
        if not self.is_finite:
            self.not_finite += 1
        elif one_value:
            self.one_value += 1
        elif self.staged:
            for path, count, mean, var in self.staged:
                self.layers[path].add(count, mean, var)
            self.batches += 1
            self.samples += samples
        self.have_converged = self.tolerance is not None and self._are_within(self.tolerance)

    def _are_within(self, tolerance: float) -> bool:
        """Return whether the standard error of every layer that ran is at most the tolerance."""
        if self.batches < _MIN_BATCHES_TO_STOP:
            return False
        errors = [meter.result().standard_error for meter in self.layers.values() if meter.batches]
        return all(error is not None and error <= tolerance for error in errors)


class _Meter:
    """Merges the calls of one layer."""

    def __init__(self, channels: int) -> None:
        zeros = np.zeros(channels)
        self._values, self._within = StreamingMoments(zeros), StreamingMoments(zeros)
        self._means, self._vars = StreamingMoments(zeros), StreamingMoments(zeros)

    @property
    def batches(self) -> int:
        """Calls so far."""
        return int(self._means.count)

    def add(self, count: int, mean: Floats, var: Floats) -> None:
        """Merge the statistics of one call: number of values per channel, mean and unbiased variance."""
        self._values.add(count, mean, var * (count - 1))
        self._within.add(count, var)
        self._means.add(1, mean)
        self._vars.add(1, var)

    def result(self) -> Pooled:
        """Return the merged statistics."""
        return Pooled(
            batches=self.batches,
            count=int(self._values.count),
            mean=self._values.mean,
            population_var=self._values.unbiased_var,
            within_var=self._within.mean,
            batch_mean_var=self._means.unbiased_var,
            batch_var_var=self._vars.unbiased_var,
        )
