"""Pools the statistics of the inputs of BN layers over a data set exactly, in one pass and O(channels) memory.

The pooled layers normalise with the statistics of each batch. Every other BN layer uses its running statistics, and
dropout is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Literal, Protocol

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError
from bnlab.functional.streaming import StreamingMoments
from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Floats
from bnlab.observe.passes.batch_order import SuccessiveRows, is_ordered
from bnlab.observe.passes.batches import samples_in
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.order import ForwardEnded
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.passes.population import impose_statistics
from bnlab.observe.passes.statistics import LayerCall, Run, measuring
from bnlab.observe.passes.stopping import Looks
from bnlab.observe.passes.subject import Subject
from bnlab.observe.standard_errors import BatchTotals, MomentErrors, StandardError

__all__ = ["DataOrder", "End", "Estimator", "Pooled", "Pooling", "pool"]

Estimator = Literal["population", "within-batch"]
"""Selects the variance: that of the population, or the mean of the unbiased variances of the batches."""


class DataOrder(Protocol):
    """What the batches themselves show about their order, such as their labels."""

    def add(self, batch: Batch) -> None:
        """Take a batch, before it is on the device of the model."""
        ...

    def clue(self, *, is_everything: bool) -> str | None:
        """Return what shows that the batches so far are in some order, as a clause; None where nothing does.

        Args:
            is_everything: Whether the data have ended.
        """
        ...


class End(Enum):
    """Why a pass ended. REACHED: the standard error is small enough. LIMIT: so many batches were wanted."""

    DATA = "data"
    LIMIT = "limit"
    REACHED = "reached"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pooled:
    """The statistics of the input of one layer over all batches; arrays have the shape (C,), float64.

    Attributes:
        batches: Calls that were pooled.
        count: Values per channel.
        mean: Mean over every value, input units.
        population_var: M2/(N-1), by the law of total variance, squared input units.
        within_var: Mean of the unbiased batch variances, weighted by count, squared input units.
        eps: What the layer adds to a variance, squared input units.
        errors: The standard errors of these statistics; None where the batches are too few.
        order_score: How alike successive batches are, as a standard normal deviate.
    """

    batches: int
    count: int
    mean: Floats
    population_var: Floats
    within_var: Floats
    eps: float
    errors: MomentErrors | None
    order_score: float

    def var(self, estimator: Estimator) -> Floats:
        """Return the variance that the estimator selects."""
        return self.population_var if estimator == "population" else self.within_var

    def standard_error(self, estimator: Estimator) -> StandardError | None:
        """Return the largest standard error of the mean and of the variance that the estimator selects.

        The value is None for fewer than two batches, or where one batch is far larger than all others.
        """
        if self.errors is None:
            return None
        var_error = self.errors.population_var if estimator == "population" else self.errors.within_var
        return self.errors.largest(self.var(estimator), var_error, self.eps)


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
        end: Why the pass ended.
        order: What shows that the batches do not come in a random order, as a clause; None where nothing does. The
            standard errors, which take every batch for a random one, are then wrong.
    """

    layers: Mapping[str, Pooled]
    batches: int
    samples: int
    not_finite: int
    one_value: int
    end: End
    order: str | None

    def standard_errors(self, estimator: Estimator) -> Mapping[str, StandardError]:
        """Return the standard error of each layer that has one. There is none where the batches are in some order."""
        if self.order is not None:
            return {}
        errors = {path: pooled.standard_error(estimator) for path, pooled in self.layers.items()}
        return {path: error for path, error in errors.items() if error is not None}


def pool(
    subject: Subject,
    layers: Mapping[str, nn.Module],
    data: Iterable[Batch],
    *,
    by_batch: Collection[nn.Module] = (),
    imposed: Mapping[_BatchNorm, tuple[Floats, Floats]] | None = None,
    estimator: Estimator = "population",
    max_batches: int | None = None,
    standard_error: float | None = None,
    data_order: DataOrder | None = None,
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
        estimator: The variance whose standard error counts.
        max_batches: Number of batches after which the pass stops; None for no limit.
        standard_error: Standard error, in standard deviations, at which the pass stops: the largest over layers and
            channels. No other batch is asked for then. The pass looks at it from the eighth batch on, and never stops
            where the batches are in some order.
        data_order: Watches the batches for an order that the statistics do not show.
        advance: Called after every batch.

    Raises:
        UsageError: If there is no batch, or if every batch is left out.

    Source:
        Wu and Johnson 2021, appendix A.2; merged as in Chan, Golub and LeVeque 1983.
    """
    meters = _Meters({path: _Meter(layer) for path, layer in layers.items()}, data_order)
    looks = None if standard_error is None else Looks(standard_error)
    with (
        impose_statistics(imposed or {}),
        measuring(subject, layers, meters.stage, by_batch=by_batch) as run,
    ):
        batches = batches_of(data, subject.model, look=None if data_order is None else data_order.add)
        end = _run_batches(run, meters, batches, max_batches, looks, estimator, advance)
        seen = list(run.order.seen)
    if not meters.batches:
        raise UsageError(_nothing_usable(meters))
    return Pooling(
        layers={path: meters.layers[path].result() for path in seen if meters.layers[path].calls},
        batches=meters.batches,
        samples=meters.samples,
        not_finite=meters.not_finite,
        one_value=meters.one_value,
        end=end,
        order=meters.order(is_everything=end is End.DATA),
    )


def _run_batches(
    run: Run,
    meters: _Meters,
    batches: Iterable[Batch],
    max_batches: int | None,
    looks: Looks | None,
    estimator: Estimator,
    advance: Callable[[], None],
) -> End:
    """Run the batches until the data end, or so many have run, or the standard errors are small enough.

    Values that wait on a device are read when the standard errors are looked at.
    """
    if max_batches == 0:
        return End.LIMIT
    for index, batch in enumerate(batches, start=1):
        run.then(meters.begin)
        one_value = run.one_batch(batch) is not None
        run.then(partial(meters.end, samples_in(batch), one_value=one_value))
        advance()
        if looks is not None and looks.is_due(index):
            run.settle()
            if looks.may_stop(index, meters.batches, meters.largest_error(estimator)) and not meters.are_ordered:
                return End.REACHED
        if index == max_batches:
            run.settle()
            return End.LIMIT
    run.settle()
    return End.DATA


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
    """The meters of a pass. They take in all calls of a batch or none of them."""

    layers: Mapping[str, _Meter]
    data_order: DataOrder | None = None
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
        if not self.is_finite:
            self.not_finite += 1
        elif one_value:
            self.one_value += 1
        elif self.staged:
            for path, count, mean, var in self.staged:
                self.layers[path].add(count, mean, var)
            for path in {path for path, *_ in self.staged}:
                self.layers[path].end_batch()
            self.batches += 1
            self.samples += samples

    def largest_error(self, estimator: Estimator) -> float:
        """Return the largest standard error of the layers that ran; inf where one is not known."""
        errors = [meter.result().standard_error(estimator) for meter in self.layers.values() if meter.calls]
        return max((math.inf if error is None else error.value for error in errors), default=math.inf)

    @property
    def are_ordered(self) -> bool:
        """Whether the batches so far are in some order, so that they say little about those to come."""
        return self.order(is_everything=False) is not None

    def order(self, *, is_everything: bool) -> str | None:
        """Return what shows that the batches are in some order, as a clause; None where nothing does.

        Args:
            is_everything: Whether the data have ended.
        """
        clue = None if self.data_order is None else self.data_order.clue(is_everything=is_everything)
        if clue is not None:
            return clue
        scores = [meter.result().order_score for meter in self.layers.values() if meter.calls]
        return "successive batches are alike" if is_ordered(scores) else None


class _Meter:
    """Merges the calls of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        channels = channels_of(layer)
        zeros = np.zeros(channels)
        self._eps = float(getattr(layer, "eps", 0.0))
        self._values, self._within = StreamingMoments(zeros), StreamingMoments(zeros)
        self._totals, self._rows = BatchTotals(channels), SuccessiveRows(channels)
        self.calls = 0

    def add(self, count: int, mean: Floats, var: Floats) -> None:
        """Merge the statistics of one call: number of values per channel, mean and unbiased variance."""
        self._values.add(count, mean, var * (count - 1))
        self._within.add(count, var)
        self._totals.add(count, mean, var)
        self.calls += 1

    def end_batch(self) -> None:
        """End a batch in which the layer ran."""
        self._rows.add(*self._totals.end_batch())

    def result(self) -> Pooled:
        """Return the merged statistics."""
        mean, var = self._values.mean, self._values.unbiased_var
        return Pooled(
            batches=self.calls,
            count=int(self._values.count),
            mean=mean,
            population_var=var,
            within_var=self._within.mean,
            eps=self._eps,
            errors=self._totals.errors(),
            order_score=self._rows.score(mean, var, self._eps),
        )
