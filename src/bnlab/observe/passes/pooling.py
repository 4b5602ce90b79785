"""The statistics of what BN layers get over a data set, pooled exactly: one pass, O(channels) memory.

The layers that are pooled normalise with the statistics of each batch, every other BN with its running statistics, and
dropout is off. On the CPU a layer of torch runs on bnlab's kernels meanwhile, and leaves exact statistics. Elsewhere it
leaves its own, and where those are not right to the rounding of their dtype they are computed again in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError
from bnlab.functional.moments import batch_moments, merge
from bnlab.nn.base import BatchNormBase
from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Floats
from bnlab.observe.passes.batch_pass import AllSeen, OneValue, Order, Scratch, given, is_dropout
from bnlab.observe.passes.batches import Forward, batches_of, run_batch, samples_in
from bnlab.observe.passes.exact_scratch import ExactScratch, scratch_of
from bnlab.observe.passes.untouched import untouched

__all__ = ["Estimator", "Pooled", "Pooling", "pool"]

Estimator = Literal["population", "within-batch"]
"""Whether the variance is that of the population, or the mean of the unbiased variances of the batches."""

_FAR = 16.0
"""abs(mean)/std above which a mean rounded to float32 is off by more than 1e-6 standard deviations."""

_AGREEING = 0.02
"""Difference in standard deviations that the kernels of torch explain: beyond it a layer has changed its input."""

_BLOCK = 1 << 21
"""Values that are widened to float64 at once."""

_FEWEST_TO_STOP = 8
"""Batches before which the spread of the batch statistics says too little to stop."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pooled:
    """What one layer got over all batches; arrays have the shape (C,), float64.

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
        """Return the variance that an estimator stands for."""
        return self.population_var if estimator == "population" else self.within_var

    @property
    def standard_error(self) -> float | None:
        """Root mean square over channels of the error of the normalised output, in standard deviations.

        From the spread of the batch statistics: SE(mean)^2/var + SE(var)^2/(4 var^2). None for fewer than two batches.
        """
        if self.batches < 2:
            return None
        var = np.where(self.population_var > 0, self.population_var, np.inf)
        square = (self.batch_mean_var / var + self.batch_var_var / (4 * var**2)) / self.batches
        return math.sqrt(float(square.mean()))


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """What a pass over a data set gave.

    Attributes:
        layers: What each layer got, in the order in which they ran; a layer that never ran has no entry.
        batches: Batches that were pooled.
        samples: Samples in them.
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
        """The standard error of each layer; None where it is not known."""
        return {path: pooled.standard_error for path, pooled in self.layers.items()}


def pool(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Iterable[Any],
    *,
    by_batch: Collection[nn.Module] = (),
    forward: Forward = run_batch,
    max_batches: int | None = None,
    tolerance: float | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Pooling:
    """Return the statistics of what layers get over a data set.

    A batch in which a layer gets a NaN, an inf or one value per channel is left out of every layer.

    Args:
        model: Untouched afterwards.
        layers: The layers to pool, by path; they normalise with the statistics of each batch.
        data: Batches.
        by_batch: Other layers that are to normalise with the statistics of each batch.
        forward: Calls the model on a batch.
        max_batches: Where to stop.
        tolerance: Standard error, in standard deviations, at which to stop; checked from the eighth batch on.
        advance: Called after every batch.

    Raises:
        UsageError: If there is no batch, or none that could be used.

    Source:
        Wu and Johnson 2021, appendix A.2; merged as in Chan, Golub and LeVeque 1983.
    """
    run = _Run({path: _Meter(channels_of(layer)) for path, layer in layers.items()})
    with untouched(model), torch.no_grad():
        model.eval()
        with _watching(layers, run) as order, _without_dropout(model), _by_batch(by_batch):
            stopped = _passed(model, data, run, order, forward, max_batches, tolerance, advance)
    if not run.batches:
        raise UsageError(_nothing_usable(run))
    return Pooling(
        layers={path: run.meters[path].result() for path in order.seen if run.meters[path].batches},
        batches=run.batches,
        samples=run.samples,
        not_finite=run.not_finite,
        one_value=run.one_value,
        stopped_early=stopped,
    )


def _passed(
    model: nn.Module,
    data: Iterable[Any],
    run: _Run,
    order: Order,
    forward: Forward,
    max_batches: int | None,
    tolerance: float | None,
    advance: Callable[[], None],
) -> bool:
    """Run through the data; return whether the tolerance ended it."""
    if max_batches == 0:
        return False
    for index, batch in enumerate(batches_of(data, model), start=1):
        order.begin()
        _one_batch(model, batch, run, forward)
        advance()
        if tolerance is not None and run.has_converged(tolerance):
            return True
        if index == max_batches:
            break
    return False


def _one_batch(model: nn.Module, batch: Any, run: _Run, forward: Forward) -> None:  # noqa: ANN401 - any data
    run.staged.clear()
    try:
        forward(model, batch)
    except AllSeen:
        pass
    except OneValue:
        run.one_value += 1
        return
    except _NotFinite:
        run.not_finite += 1
        return
    run.commit(samples_in(batch))


def _nothing_usable(run: _Run) -> str:
    if run.not_finite:
        return f"batches: at least one must be finite, got {run.not_finite} in which a layer gets a NaN or inf."
    if run.one_value:
        return (
            f"batches: they must leave more than 1 value per channel, got {run.one_value} with 1. Use larger batches."
        )
    return "batches: there must be at least one, got none."


class _NotFinite(BaseException):
    """Raised to leave a forward pass at a layer that gets a NaN or inf."""


@dataclass(frozen=True)
class _Statistics:
    """Of one call: count, mean and unbiased variance."""

    path: str
    count: int
    mean: Floats
    var: Floats


@dataclass
class _Run:
    """The meters of a pass; a batch reaches them whole or not at all."""

    meters: dict[str, _Meter]
    staged: list[_Statistics] = field(default_factory=list)
    batches: int = 0
    samples: int = 0
    not_finite: int = 0
    one_value: int = 0

    def commit(self, samples: int) -> None:
        """Take in the calls of a batch."""
        if not self.staged:
            return
        for found in self.staged:
            self.meters[found.path].add(found)
        self.batches += 1
        self.samples += samples

    def has_converged(self, tolerance: float) -> bool:
        """Whether every layer that ran is known to within a standard error."""
        if self.batches < _FEWEST_TO_STOP:
            return False
        errors = [meter.result().standard_error for meter in self.meters.values() if meter.batches]
        return all(error is not None and error <= tolerance for error in errors)


@contextmanager
def _watching(layers: Mapping[str, nn.Module], run: _Run) -> Iterator[Order]:
    order, handles = Order(len(layers)), []
    try:
        for path, layer in layers.items():
            scratch = scratch_of(layer, of_ours=True)
            if scratch is None and isinstance(layer, _BatchNorm):
                layer.running_mean = layer.running_var = None
            handles += _hooks(path, layer, scratch, run, order)
        yield order
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _by_batch(layers: Collection[nn.Module]) -> Iterator[None]:
    """Make layers that are not pooled normalise with the statistics of the batch, which one value does not have."""

    def check(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if given(arguments, keywords).numel() == channels_of(layer):
            raise OneValue("")

    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(check, with_kwargs=True))
            layer.running_mean = layer.running_var = None  # type: ignore[assignment]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Keep dropout off, also where a forward calls train() on its way."""

    def switch_off(module: nn.Module, _: object) -> None:
        module.training = False

    handles = [m.register_forward_pre_hook(switch_off) for m in model.modules() if is_dropout(m)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(path: str, layer: nn.Module, scratch: Scratch | None, run: _Run, order: Order) -> list[Any]:
    channels, eps = channels_of(layer), float(getattr(layer, "eps", 0.0))
    is_exact = isinstance(layer, BatchNormBase) or isinstance(scratch, ExactScratch)
    has_own_forward = not is_exact and _has_own_forward(layer)

    def read(x: Tensor, left: tuple[Floats, Floats] | None) -> tuple[Floats, Floats] | None:
        fits = x.numel() > 0 and x.dim() > 1 and x.size(1) == channels
        if has_own_forward and left is not None:
            return _agreeing(_computed(x), left, eps) if fits else left
        return (_left(x, left, is_exact=is_exact, eps=eps) or _computed(x)) if fits else None

    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if given(arguments, keywords).numel() == channels:
            raise OneValue(path)
        if scratch is not None:
            layer.training = True  # a forward may have called eval() on its way here
            scratch.clear()

    def after(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], __: object) -> None:
        x = given(arguments, keywords)
        left = None if scratch is None else scratch.read_arrays()
        found = read(x, left)
        if found is not None:
            mean, var = found
            if not np.isfinite(mean.sum() + var.sum()):
                raise _NotFinite
            run.staged.append(_Statistics(path, x.numel() // channels, mean, var))
        order.count(path)

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]


def _left(x: Tensor, left: tuple[Floats, Floats] | None, *, is_exact: bool, eps: float) -> tuple[Floats, Floats] | None:
    """Return what the layer left as far as it can be trusted, with the channels computed again where it cannot.

    torch sums in double precision along contiguous images, and in single precision, the faster the less exact, along
    channels-last ones, of which (N, C) is one.
    """
    if left is None or is_exact:
        return left
    images = x.is_contiguous() and x.numel() > x.size(0) * x.size(1)
    if x.device.type == "cpu" and not images:
        return None
    mean, var = left
    with np.errstate(invalid="ignore", over="ignore"):
        near = mean**2 <= _FAR**2 * (var + eps)  # not where either is NaN or inf
        near &= np.isfinite(var)
    if not near.all():
        far = np.flatnonzero(~near)
        mean[far], var[far] = _computed(x.index_select(1, torch.from_numpy(far).to(x.device)))
    return mean, var


def _has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer may do something to its input before BN sees it."""
    return type(layer).forward is not _BatchNorm.forward and not isinstance(layer, BatchNormBase)


def _agreeing(computed: tuple[Floats, Floats], left: tuple[Floats, Floats], eps: float) -> tuple[Floats, Floats]:
    """Return what was computed from the input of a layer if that is what its BN saw, else what the BN left."""
    spread = np.sqrt(left[1] + eps)
    with np.errstate(invalid="ignore", over="ignore"):
        mean_agrees = np.abs(computed[0] - left[0]) <= _AGREEING * spread
        var_agrees = np.abs(np.sqrt(computed[1] + eps) - spread) <= _AGREEING * spread
    return computed if bool((mean_agrees & var_agrees).all()) else left


def _computed(x: Tensor) -> tuple[Floats, Floats]:
    """Return mean and unbiased variance in float64, a block of samples at a time."""
    rows = max(1, _BLOCK // max(1, x.numel() // max(1, x.size(0))))
    moments = reduce(merge, (batch_moments(block) for block in torch.split(x, rows)))
    mean, var = (values.cpu().numpy().astype(np.float64) for values in (moments.mean, moments.unbiased_var))
    return mean, var


class _Meter:
    """Merges the calls of one layer."""

    def __init__(self, channels: int) -> None:
        self.batches = 0
        self._count = 0
        self._mean = self._m2 = self._within = np.zeros(channels)
        self._first: tuple[Floats, Floats] | None = None
        self._sums = [np.zeros(channels) for _ in range(4)]

    def add(self, found: _Statistics) -> None:
        """Merge the statistics of one call."""
        count, mean, var = found.count, found.mean, found.var
        total, delta = self._count + count, mean - self._mean
        self._m2 = self._m2 + var * (count - 1) + delta**2 * (self._count * count / total)
        self._mean = self._mean + delta * (count / total)
        self._within = self._within + (var - self._within) * (count / total)
        self._count, self.batches = total, self.batches + 1
        if self._first is None:
            self._first = mean, var
        for index, deviation in enumerate((mean - self._first[0], var - self._first[1])):
            self._sums[2 * index] += deviation
            self._sums[2 * index + 1] += deviation**2

    def result(self) -> Pooled:
        """Return what was merged."""
        return Pooled(
            batches=self.batches,
            count=self._count,
            mean=self._mean,
            population_var=self._m2 / max(self._count - 1, 1),
            within_var=self._within,
            batch_mean_var=self._spread(0),
            batch_var_var=self._spread(1),
        )

    def _spread(self, index: int) -> Floats:
        """Return the variance over batches of deviations from the first batch."""
        total, square = self._sums[2 * index], self._sums[2 * index + 1]
        return np.maximum(square - total**2 / max(self.batches, 1), 0) / max(self.batches - 1, 1)
