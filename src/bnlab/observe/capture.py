"""Per-layer statistics of real batches, in one streaming pass with every BN on batch statistics.

The statistics fall out of the BN operator itself: a layer of torch is given scratch buffers and a momentum of 1, so
that it leaves its batch statistics there. Only where those cannot be exact (another class, half precision, a mean far
from the spread, values that are not finite) are they computed again in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError
from bnlab.functional.moments import batch_moments, per_channel
from bnlab.nn._base import BatchNormBase
from bnlab.observe.batches import Forward, batches_of, run_batch, tensors_in
from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Floats
from bnlab.observe.gap import batch_sums
from bnlab.observe.model_evidence import Observed
from bnlab.observe.untouched import untouched

__all__ = ["observe"]

_UNWRITTEN = -1.0
"""A variance no layer leaves behind."""

_FAR = 50.0
"""abs(mean)/std above which the statistics of torch's kernels are computed again."""

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
            if dropout and _is_dropout(module):
                module.training = True
        with _metering(layers, meters) as order:
            short: dict[int, str] = {}
            index = -1
            for index, batch in enumerate(batches_of(data, model)):
                order.begin()
                try:
                    forward(model, batch)
                except _AllSeen:
                    pass
                except _OneValue as found:
                    short[index] = found.path
                advance()
    if short and len(short) == index + 1:
        raise UsageError(f"{short[index]}: data must leave more than 1 value per channel in each batch, got 1.")
    if skipped is not None:
        skipped.update(short)
    return {path: meter.result() for path, meter in meters.items() if meter.batches}


def _is_dropout(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return isinstance(module, nn.modules.dropout._DropoutNd) or "droppath" in name or "stochasticdepth" in name  # noqa: SLF001


class _AllSeen(Exception):
    """Raised to leave a forward pass after the last BN layer."""


class _OneValue(Exception):
    """Raised to leave a forward pass at a layer that has one value per channel."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass
class _Order:
    """How many layers the first batch ran through, so that later ones may stop after the last.

    If the first batch left a layer out, or ran one twice, every batch runs to its end: others may differ.
    """

    layers: int
    calls: int = 0
    seen: set[str] = field(default_factory=set)
    expected: int | None = None

    def begin(self) -> None:
        if self.expected is None and self.calls:
            self.expected = self.calls if len(self.seen) == self.calls == self.layers else 0
        elif self.expected is not None and self.calls != self.expected:
            self.expected = 0  # the batches differ: run each to its end
        self.calls = 0

    def count(self, path: str) -> None:
        self.calls += 1
        self.seen.add(path)
        if self.expected and self.calls == self.expected:
            raise _AllSeen


@contextmanager
def _metering(layers: Mapping[str, nn.Module], meters: Mapping[str, _Meter]) -> Iterator[_Order]:
    order, handles = _Order(len(layers)), []
    try:
        for path, layer in layers.items():
            reader = _Scratch(layer) if _leaves_statistics(layer) else None
            if reader is None and isinstance(layer, _BatchNorm):
                layer.running_mean = layer.running_var = None
            handles += _hooks(layer, meters[path], reader, order)
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _hooks(layer: nn.Module, meter: _Meter, scratch: _Scratch | None, order: _Order) -> list[Any]:
    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = _given(arguments, keywords)
        if x.numel() == meter.channels:
            raise _OneValue(meter.path)
        if scratch is not None:
            scratch.clear()

    def after(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], __: object) -> None:
        x = _given(arguments, keywords)
        if x.numel() and x.dim() > 1 and x.size(1) == meter.channels:
            meter.add(x, None if scratch is None else scratch.read())
        order.count(meter.path)

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]


def _given(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Return the input of a call: the first tensor."""
    return tensors_in([arguments, keywords])[0]


def _leaves_statistics(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    plain = isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and not isinstance(layer, BatchNormBase)
    weight = getattr(layer, "weight", None)
    dtype = torch.float32 if weight is None else weight.dtype
    return plain and dtype in (torch.float32, torch.float64)


class _Scratch:
    """Buffers in which a layer of torch leaves the statistics of a batch. The layer is put back by `untouched`."""

    def __init__(self, layer: _BatchNorm) -> None:
        weight: Tensor | None = layer.weight
        like = weight if weight is not None else next(iter(layer.buffers()), torch.zeros(()))
        dtype = like.dtype if like.is_floating_point() else torch.float32
        self._mean = torch.zeros(layer.num_features, dtype=dtype, device=like.device)
        self._var = torch.full_like(self._mean, _UNWRITTEN)
        layer.running_mean, layer.running_var = self._mean, self._var
        layer.num_batches_tracked = None
        layer.momentum, layer.track_running_stats, layer.training = 1.0, True, True

    def clear(self) -> None:
        """Forget the last batch."""
        self._mean.zero_()
        self._var.fill_(_UNWRITTEN)

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Return mean and unbiased variance of the batch; None if the layer did not leave them."""
        if bool((self._var == _UNWRITTEN).all()):
            return None
        return self._mean.to(torch.float64), self._var.to(torch.float64)


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
        count = x.numel() // self.channels
        mean, unbiased = self._statistics(x, left)
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
        self.batch_means.add(mean[None])
        self.batch_vars.add(unbiased[None])
        for name, value in batch_sums(float(count), mean, biased, count / (count - 1), self.eps).items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _sample(self, x: Tensor, mean: Tensor) -> None:
        """Take in the means and mean squared deviations of some samples, for honest standard errors."""
        few = x[: max(4, x.size(0) // _SAMPLE_SHARE)] if x.dim() > 2 else x
        dims = tuple(range(2, x.dim()))
        deviations = few.to(torch.promote_types(x.dtype, torch.float32)) - per_channel(mean.to(few.device), x).to(
            torch.promote_types(x.dtype, torch.float32)
        )
        means = deviations.mean(dims) if dims else deviations
        squares = deviations.double().square().mean(dims) if dims else deviations.double().square()
        self.image_means.add(means.double().cpu().numpy() + mean.cpu().numpy())
        self.image_squares.add(squares.double().cpu().numpy())

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

    @property
    def var(self) -> Floats:
        """Unbiased variance; 0 for fewer than two rows."""
        return self._m2 / max(self.count - 1, 1)
