"""Collects evidence on every layer over a data set, in one streaming pass with every BN layer on batch statistics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from bnlab.functional.moments import batch_moments, widened
from bnlab.functional.streaming import StreamingMoments
from bnlab.kernels.statistics import batch_statistics
from bnlab.observe.differences import differences
from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Floats
from bnlab.observe.gap import batch_sums
from bnlab.observe.model_evidence import Observed
from bnlab.observe.passes.batch_rows import BatchRows
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.passes.statistics import Beside, LayerCall, measuring
from bnlab.observe.passes.subject import ForwardFailed, Subject
from bnlab.observe.transfers import is_at_hand

__all__ = ["OneValueInEachBatch", "observe"]

_FAR = 50.0
"""abs(mean)/std above which the statistics that a layer computes itself are compared with exact ones."""

_LARGE = 1e30
"""Variance above which the sums of torch's kernels may overflow."""

_SAMPLE_SHARE = 8
"""One in this many samples of a batch, and at least 4 samples, are used for the standard errors."""


class OneValueInEachBatch(ForwardFailed):
    """Every batch leaves one value per channel in a layer, which has no variance."""


def observe(
    subject: Subject,
    layers: Mapping[str, nn.Module],
    data: Iterable[Batch],
    *,
    dropping: Collection[str] = (),
    advance: Callable[[], None] = lambda: None,
    skipped: set[int] | None = None,
    not_finite: set[int] | None = None,
) -> dict[str, Observed]:
    """Return the inputs of every layer over a data set, with every BN on batch statistics and the rest in eval mode.

    Args:
        subject: The model, which is restored afterwards.
        layers: The BN layers to observe, by path.
        data: Batches.
        dropping: Paths of the modules that drop values; every other dropout is off.
        advance: Called after every batch.
        skipped: Receives the indices of batches that leave one value per channel in a layer. Such a batch has no
            statistics, and it is left out of that layer and of those behind it.
        not_finite: Receives the indices of batches in which a layer gets a NaN or inf. They are left out of that layer.

    Returns:
        One entry for each layer that ran on at least one finite batch.

    Raises:
        OneValueInEachBatch: If every batch leaves one value per channel in a layer.
    """
    meters = {path: _Meter(channels_of(layer), float(getattr(layer, "eps", 0.0))) for path, layer in layers.items()}
    short: dict[int, str] = {}
    index = -1

    def take(call: LayerCall) -> None:
        if not_finite is not None and not call.is_finite:
            not_finite.add(call.batch)
        meters[call.path].take(call)

    with measuring(subject, layers, take, dropping=dropping, look=_samples_of, wants_own=True) as run:
        for index, batch in enumerate(batches_of(data, subject.model)):
            path = run.one_batch(batch)
            if path is not None:
                short[index] = path
            advance()
    if short and len(short) == index + 1:
        raise OneValueInEachBatch(
            f"{short[index]}: data must leave more than 1 value per channel in each batch, got 1."
        )
    if skipped is not None:
        skipped.update(short)
    return {path: meter.result() for path, meter in meters.items() if meter.batches}


@dataclass
class _Meter:
    """Merges the batches of one layer."""

    channels: int
    eps: float
    images: int = 0
    smallest: int = 0
    not_finite: int = 0
    overflowed: int = 0
    own_error: float = 0.0
    input_eps: float = 2.0**-23
    sums: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        zeros = np.zeros(self.channels)
        self.values = StreamingMoments(zeros)
        self.batch_means, self.batch_vars = StreamingMoments(zeros), StreamingMoments(zeros)
        self.batch_rows = BatchRows(self.channels)
        self.image_means, self.image_squares = StreamingMoments(zeros), StreamingMoments(zeros)
        self.calls: list[StreamingMoments[Floats]] = []
        self._batch, self._call = -1, 0

    @property
    def batches(self) -> int:
        """Calls so far."""
        return int(self.batch_means.count)

    def take(self, call: LayerCall) -> None:
        """Add one call. Where its own statistics may be inexact, record the error."""
        if len(call.shape) < 2 or call.shape[1] != self.channels:
            return
        if not call.is_finite:
            self.not_finite += 1
            return
        far = np.abs(call.mean) > _FAR * np.sqrt(call.var)
        if call.own is not None and (call.own_failed or bool((far | (call.var >= _LARGE)).any())):
            self._compare(call.mean, call.var, *call.own())
        self.input_eps = torch.finfo(call.dtype).eps
        self._merge(call.count, call.mean, call.var)
        self._add_to_its_place(call)
        self._add_samples(call.beside)
        self.images += call.shape[0]
        self.smallest = call.count if self.batches == 1 else min(self.smallest, call.count)

    def _compare(self, mean: Floats, var: Floats, own_mean: Floats, own_var: Floats) -> None:
        """Record the error of the statistics that the layer computed itself, in standard deviations."""
        if not np.isfinite(own_mean.sum() + own_var.sum()):
            self.overflowed += 1
            return
        std = np.sqrt(var + self.eps)
        own_std = np.sqrt(own_var.clip(min=0) + self.eps)
        self.own_error = max(
            self.own_error, float((np.abs(own_mean - mean) / std).max()), float(np.abs(own_std / std - 1).max())
        )

    def _merge(self, count: int, mean: Floats, unbiased: Floats) -> None:
        biased = unbiased * ((count - 1) / count)
        self.values.add(count, mean, biased * count)
        self.batch_means.add(1, mean)
        self.batch_vars.add(1, unbiased)
        self.batch_rows.add(mean, unbiased)
        for name, value in batch_sums(float(count), mean, biased, count / (count - 1), self.eps).items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _add_to_its_place(self, call: LayerCall) -> None:
        """Merge a call with those at the same place in the passes over other batches."""
        self._call = self._call + 1 if call.batch == self._batch else 0
        self._batch = call.batch
        while len(self.calls) <= self._call:
            self.calls.append(StreamingMoments(np.zeros(self.channels)))
        self.calls[self._call].add(call.count, call.mean, call.var * (call.count - 1))

    def _between_calls(self) -> float:
        """Return the root mean square difference of the calls from all of them together, in standard deviations."""
        if len(self.calls) < 2:
            return 0.0
        mean, var = self.values.mean, self.values.unbiased_var
        from_all = [differences(call.mean, call.unbiased_var, mean, var, self.eps) for call in self.calls]
        return float(np.sqrt(np.mean([np.maximum(of_mean**2, of_var**2) for of_mean, of_var in from_all])))

    def _add_samples(self, of: Beside | None) -> None:
        """Add the means and mean squared deviations of some samples, which give realistic standard errors."""
        if of is None:
            return
        values = [tensor.numpy() for tensor in of.tensors]
        if of.note is None:
            self.image_means.add_rows(values[0])
            self.image_squares.add_rows(values[1])
        else:
            count = float(of.note)  # type: ignore[arg-type]
            self.image_means.add(count, *values[:2])
            self.image_squares.add(count, *values[2:])

    def result(self) -> Observed:
        """Return the merged statistics."""
        return Observed(
            batches=self.batches,
            images=self.images,
            count=int(self.values.count),
            smallest_count=self.smallest,
            mean=self.values.mean,
            var=self.values.unbiased_var,
            within_mean=self.batch_means.mean,
            within_var=self.batch_vars.mean,
            batch_mean_var=self.batch_means.unbiased_var,
            batch_var_var=self.batch_vars.unbiased_var,
            image_mean_var=self.image_means.unbiased_var,
            image_square_var=self.image_squares.unbiased_var,
            moments=self.sums,
            not_finite=self.not_finite,
            overflowed=self.overflowed,
            own_error=self.own_error,
            input_eps=self.input_eps,
            batch_rows=self.batch_rows.standardised(self.batch_means.mean, self.batch_vars.mean, self.eps),
            between_calls=self._between_calls(),
        )


def _samples_of(_: str, x: Tensor, mean: Tensor) -> Beside | None:
    """Return the means and the mean squared deviations of some samples: a row for each, shape (n, C), float64.

    A device merges the rows, of which a layer may have millions. What is beside the input is then the mean and the sum
    of squared deviations of both, and their number is the note.

    Args:
        x: The input of a layer. If its channels are not at position 1, nothing is computed.
        mean: Its mean. Shape (C,), float64.
    """
    if x.dim() < 2 or x.size(1) != len(mean):
        return None
    few = x[: max(4, x.size(0) // _SAMPLE_SHARE)] if x.dim() > 2 else x
    center = widened(mean)
    if few.dim() == 2:
        deviations = widened(few) - center
        means, squares = deviations, deviations.square()
    else:
        means, variances = _image_statistics(few)
        means = means - center
        squares = variances + means.square()
    rows = [means + center, squares]
    if is_at_hand(x):
        return Beside(rows)
    merged = [batch_moments(row) for row in rows]
    return Beside([value for one in merged for value in (one.mean, one.m2)], few.size(0))


def _image_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of every channel of every sample, in float64, of shape (N, C)."""
    mean, var, _ = batch_statistics(x.reshape(1, x.size(0) * x.size(1), -1))
    return mean.reshape(x.shape[:2]), var.reshape(x.shape[:2])
