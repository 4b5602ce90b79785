"""Per-layer statistics of real batches, in one streaming pass with every BN on batch statistics.

The statistics fall out of the BN operator itself: on the CPU a layer of torch runs on bnlab's kernels meanwhile, which
leave exact ones; elsewhere it is given scratch buffers and a momentum of 1, so that it leaves its own there. Only where
those cannot be exact (another class, half precision, a mean far from the spread, values that are not finite) are they
computed again in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError
from bnlab.functional.moments import batch_moments
from bnlab.kernels import native
from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Floats
from bnlab.observe.gap import batch_sums
from bnlab.observe.model_evidence import Observed
from bnlab.observe.passes.batch_pass import AllSeen, OneValue, Order, Scratch, given, is_dropout
from bnlab.observe.passes.batches import Forward, batches_of, run_batch
from bnlab.observe.passes.exact_scratch import ExactScratch, scratch_of
from bnlab.observe.passes.untouched import untouched

__all__ = ["observe"]

_FAR = 50.0
"""abs(mean)/std above which the statistics of torch's kernels are computed again."""

_LARGE = 1e30
"""Variance above which the sums of torch's kernels may overflow."""

_SAMPLE_SHARE = 8
"""One in this many samples of a batch, and at least 4, serve for the standard errors."""


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Iterable[Any],
    *,
    dropout: bool = False,
    forward: Forward = run_batch,
    advance: Callable[[], None] = lambda: None,
    skipped: set[int] | None = None,
) -> dict[str, Observed]:
    """Return what every layer gets over a data set, with every BN on batch statistics and the rest in eval mode.

    Args:
        model: Untouched afterwards.
        layers: The BN layers to observe, by path.
        data: Batches.
        dropout: Whether dropout is on.
        forward: Calls the model on a batch.
        advance: Called after every batch.
        skipped: Gets the indices of batches that leave one value per channel in a layer, which has no statistics. They
            are left out from that layer on.

    Returns:
        One entry for each layer that ran on at least one finite batch.

    Raises:
        UsageError: If every batch leaves one value per channel in a layer.
    """
    meters = {
        path: _Meter(path, channels_of(layer), float(getattr(layer, "eps", 0.0))) for path, layer in layers.items()
    }
    with untouched(model), torch.no_grad():
        model.eval()
        for module in model.modules():
            if dropout and is_dropout(module):
                module.training = True
        with _metering(layers, meters) as order:
            short: dict[int, str] = {}
            index = -1
            for index, batch in enumerate(batches_of(data, model)):
                order.begin()
                try:
                    forward(model, batch)
                except AllSeen:
                    pass
                except OneValue as found:
                    short[index] = found.path
                advance()
    if short and len(short) == index + 1:
        raise UsageError(f"{short[index]}: data must leave more than 1 value per channel in each batch, got 1.")
    if skipped is not None:
        skipped.update(short)
    return {path: meter.result() for path, meter in meters.items() if meter.batches}


@contextmanager
def _metering(layers: Mapping[str, nn.Module], meters: Mapping[str, _Meter]) -> Iterator[Order]:
    order, handles = Order(len(layers)), []
    try:
        for path, layer in layers.items():
            reader = scratch_of(layer)
            if reader is None and isinstance(layer, _BatchNorm):
                layer.running_mean = layer.running_var = None
            handles += _hooks(layer, meters[path], reader, order)
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _hooks(layer: nn.Module, meter: _Meter, scratch: Scratch | None, order: Order) -> list[Any]:
    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = given(arguments, keywords)
        if x.numel() == meter.channels:
            raise OneValue(meter.path)
        if scratch is not None:
            scratch.clear()

    def after(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], __: object) -> None:
        x = given(arguments, keywords)
        if x.numel() and x.dim() > 1 and x.size(1) == meter.channels:
            if isinstance(scratch, ExactScratch):
                meter.add_exact(x, scratch)
            else:
                meter.add(x, None if scratch is None else scratch.read())
        order.count(meter.path)

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]


@dataclass
class _Meter:
    """Merges the batches of one layer."""

    path: str
    channels: int
    eps: float
    batches: int = 0
    images: int = 0
    sampled: int = 0
    count: int = 0
    smallest: int = 0
    not_finite: int = 0
    overflowed: int = 0
    own_error: float = 0.0
    input_eps: float = 2.0**-23
    sums: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        zeros = np.zeros(self.channels)
        self.mean, self.m2 = zeros, zeros
        self.batch_means, self.batch_vars = _Welford(self.channels), _Welford(self.channels)
        self.image_means, self.image_squares = _Welford(self.channels), _Welford(self.channels)

    def add(self, x: Tensor, left: tuple[Tensor, Tensor] | None) -> None:
        """Take in the input of one call, and the statistics the layer left if it did."""
        self._take(x, *self._statistics(x, left))

    def add_exact(self, x: Tensor, scratch: ExactScratch) -> None:
        """Take in the input of one call and its exact statistics; torch's own are looked at where they may be off."""
        mean, var = scratch.mean, scratch.var
        if not bool(((mean.abs() <= _FAR * var.sqrt()) & (var < _LARGE)).all()):
            self._compare(mean, var, *scratch.of_torch(x))
        self._take(x, mean, var)

    def _take(self, x: Tensor, mean: Tensor, unbiased: Tensor) -> None:
        count = x.numel() // self.channels
        if not bool(torch.isfinite(mean + unbiased).all()):
            self.not_finite += 1
            return
        self.input_eps = torch.finfo(x.dtype).eps
        self._merge(count, mean.cpu().numpy(), unbiased.cpu().numpy())
        self._sample(x, mean)
        self.images += x.size(0)
        self.smallest = count if self.batches == 1 else min(self.smallest, count)

    def _statistics(self, x: Tensor, left: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if left is not None:
            mean, var = left
            near = bool(((mean.abs() <= _FAR * var.sqrt()) & torch.isfinite(mean + var)).all())
            if near:
                return mean, var
        moments = batch_moments(x)
        if left is not None:
            self._compare(moments.mean, moments.unbiased_var, *left)
        return moments.mean, moments.unbiased_var

    def _compare(self, mean: Tensor, var: Tensor, own_mean: Tensor, own_var: Tensor) -> None:
        """Note how far the layer's own statistics are off, in standard deviations."""
        if not bool(torch.isfinite(mean + var).all()):
            return
        if not bool(torch.isfinite(own_mean + own_var).all()):
            self.overflowed += 1
            return
        std = (var + self.eps).sqrt()
        error = torch.maximum((own_mean - mean).abs() / std, ((own_var.clamp(min=0) + self.eps).sqrt() / std - 1).abs())
        self.own_error = max(self.own_error, float(error.amax()))

    def _merge(self, count: int, mean: Floats, unbiased: Floats) -> None:
        biased = unbiased * ((count - 1) / count)
        total, delta = self.count + count, mean - self.mean
        self.m2 = self.m2 + biased * count + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count, self.batches = total, self.batches + 1
        self.batch_means.add_row(mean)
        self.batch_vars.add_row(unbiased)
        for name, value in batch_sums(float(count), mean, biased, count / (count - 1), self.eps).items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _sample(self, x: Tensor, mean: Tensor) -> None:
        """Take in the means and mean squared deviations of some samples, for honest standard errors."""
        few = x[: max(4, x.size(0) // _SAMPLE_SHARE)] if x.dim() > 2 else x
        if few.dim() == 2:
            deviations = few.to(torch.float64) - mean.to(few.device)
            means, squares = deviations, deviations.square()
        else:
            means, variances = _image_statistics(few)
            means = means - mean.to(few.device)
            squares = variances + means.square()
        self.image_means.add(means.cpu().numpy() + mean.cpu().numpy())
        self.image_squares.add(squares.cpu().numpy())

    def result(self) -> Observed:
        """Return what was merged."""
        return Observed(
            batches=self.batches,
            images=self.images,
            count=self.count,
            smallest_count=self.smallest,
            mean=self.mean,
            var=self.m2 / max(self.count - 1, 1),
            within_mean=self.batch_means.mean,
            within_var=self.batch_vars.mean,
            batch_mean_var=self.batch_means.var,
            batch_var_var=self.batch_vars.var,
            image_mean_var=self.image_means.var,
            image_square_var=self.image_squares.var,
            moments=self.sums,
            not_finite=self.not_finite,
            overflowed=self.overflowed,
            own_error=self.own_error,
            input_eps=self.input_eps,
        )


def _image_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel of every sample, float64 of shape (N, C)."""
    planes = x.reshape(1, x.size(0) * x.size(1), -1)
    if x.device.type == "cpu" and x.dtype in native.DTYPES and native.unavailable() is None:
        mean, var, _ = native.statistics(planes)
    else:
        moments = batch_moments(planes)
        mean, var = moments.mean, moments.var
    return mean.reshape(x.shape[:2]), var.reshape(x.shape[:2])


class _Welford:
    """Mean and variance of rows, merged block by block."""

    def __init__(self, columns: int) -> None:
        self.count = 0
        self.mean = np.zeros(columns)
        self._m2 = np.zeros(columns)

    def add(self, rows: Floats) -> None:
        count, mean = len(rows), rows.mean(0)
        total, delta = self.count + count, mean - self.mean
        self._m2 = self._m2 + ((rows - mean) ** 2).sum(0) + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def add_row(self, row: Floats) -> None:
        self.count += 1
        delta = row - self.mean
        self.mean = self.mean + delta / self.count
        self._m2 = self._m2 + delta * (row - self.mean)

    @property
    def var(self) -> Floats:
        """Unbiased variance; 0 for fewer than two rows."""
        return self._m2 / max(self.count - 1, 1)
