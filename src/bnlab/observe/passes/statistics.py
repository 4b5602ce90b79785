"""Measures the inputs of BN layers batch by batch, for the evidence of a diagnosis and for recalibration.

The BN operator itself computes the statistics of a batch: a layer has scratch buffers, to which it writes them. On the
CPU a layer of torch runs on the kernels of bnlab during that time, whose statistics are exact. This module computes the
statistics again in float64 only where those of the layer may be wrong by more than the rounding of their dtype: for a
layer of another class, half precision, a mean far from the spread, or values that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from bnlab.functional.moments import moments_in_blocks
from bnlab.nn.base import BatchNormBase
from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Floats
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.dropout import drops
from bnlab.observe.passes.modes import kept_in_mode, set_eval_mode
from bnlab.observe.passes.order import ExecutionOrder, ForwardEnded, OneValuePerChannel, input_of
from bnlab.observe.passes.population import layers_read_by_others, use_batch_statistics
from bnlab.observe.passes.scratch import ExactScratch, Scratch, scratch_of
from bnlab.observe.passes.subject import Subject

__all__ = ["LayerCall", "Run", "measuring"]

_FAR = 16.0
"""abs(mean)/std above which rounding to float32 changes a mean by more than 1e-6 standard deviations."""

_AGREEING = 0.02
"""Difference in standard deviations that the kernels of torch explain. A larger one shows a changed input."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer.

    Attributes:
        path: Path of the layer.
        x: Its input, of shape (N, C, *spatial), unless the forward of the layer moves the channels to that position.
        count: Values per channel.
        mean: Mean of the batch. Shape (C,), float64; not finite if the input is not finite.
        var: Unbiased variance of the batch. Shape (C,), float64.
        own: Returns mean and unbiased variance as the operator of the layer computes them, which may be inexact; None
            where they are not known.
        own_failed: Whether the statistics that `own` returns are known not to be finite.
    """

    path: str
    x: Tensor
    count: int
    mean: Floats
    var: Floats
    own: Callable[[], tuple[Floats, Floats]] | None
    own_failed: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether the statistics, and so the input, hold neither NaN nor inf."""
        return bool(np.isfinite(self.mean.sum() + self.var.sum()))


class Run:
    """A pass in progress.

    Attributes:
        order: The order in which the layers run.
    """

    def __init__(self, subject: Subject, layers: int) -> None:
        self._subject = subject
        self.order = ExecutionOrder(layers)

    def one_batch(self, batch: Batch) -> str | None:
        """Run one batch; return the path of the layer at which it ended because of one value per channel, or None."""
        self.order.begin()
        try:
            self._subject.run(batch)
        except ForwardEnded:
            return None
        except OneValuePerChannel as layer:
            return layer.path
        return None


@contextmanager
def measuring(
    subject: Subject,
    layers: Mapping[str, nn.Module],
    take: Callable[[LayerCall], None],
    *,
    by_batch: Collection[nn.Module] = (),
    dropping: Collection[str] = (),
) -> Iterator[Run]:
    """Watch the inputs of layers. The model is in eval mode inside the block, and is restored when the block ends.

    Args:
        subject: The model.
        layers: The layers to watch, by path. They normalise with the statistics of each batch.
        take: Function that receives every call of a watched layer.
        by_batch: Other layers that also normalise with the statistics of each batch. All remaining layers use running
            statistics.
        dropping: Paths of the modules that drop values. Every other dropout is off.

    Yields:
        The pass, which runs one batch after the other.
    """
    run = Run(subject, len(layers))
    with subject.untouched(), torch.no_grad(), _hooked() as handles:
        handles += set_eval_mode(subject.model)
        for path, module in subject.model.named_modules():
            if path in dropping or drops(module):
                handles.append(kept_in_mode(module, training=path in dropping))
        read = layers_read_by_others(subject.model)
        for path, layer in layers.items():
            handles += _watched(path, layer, take, run.order, is_read=layer in read)
        for layer in by_batch:
            handles.append(layer.register_forward_pre_hook(_refuse_one_value, with_kwargs=True))
            if isinstance(layer, _BatchNorm):
                handles += use_batch_statistics(layer, is_read=layer in read)
        yield run


@contextmanager
def _hooked() -> Iterator[list[RemovableHandle]]:
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _refuse_one_value(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if input_of(arguments, keywords).numel() == channels_of(layer):
        raise OneValuePerChannel("")


def _watched(
    path: str, layer: nn.Module, take: Callable[[LayerCall], None], order: ExecutionOrder, *, is_read: bool
) -> list[RemovableHandle]:
    channels, scratch = channels_of(layer), scratch_of(layer)
    imposing = []
    if scratch is None and isinstance(layer, _BatchNorm):
        imposing = use_batch_statistics(layer, is_read=is_read)

    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = input_of(arguments, keywords)
        if x.numel() == channels:
            raise OneValuePerChannel(path)
        if scratch is not None:
            layer.training = True  # a forward may have called eval() before this layer
            scratch.put(x)

    def after(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], __: object) -> None:
        x = input_of(arguments, keywords)
        x = x.dequantize() if x.is_quantized else x
        call = _call(path, layer, x, scratch) if x.numel() > 0 else None
        if scratch is not None:
            scratch.take_away()
        if call is not None:
            take(call)
        order.count(path)

    return [
        *imposing,
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]


def _call(path: str, layer: nn.Module, x: Tensor, scratch: Scratch | None) -> LayerCall | None:
    """Return a call with its statistics, computed again where those of the layer may be inexact; None without any."""
    channels = channels_of(layer)
    count = x.numel() // channels
    left = None if scratch is None else scratch.read()
    if x.dim() < 2 or x.size(1) != channels:  # a custom forward may move the channels to position 1
        return None if left is None else LayerCall(path, x, count, *left, own=None)
    if left is None:
        return LayerCall(path, x, count, *_computed(x), own=None)
    if isinstance(scratch, ExactScratch):
        exact = scratch
        return LayerCall(path, x, count, *left, own=lambda: exact.of_torch(x))
    if isinstance(layer, BatchNormBase):
        return LayerCall(path, x, count, *left, own=None)
    own = (left[0].copy(), left[1].copy())
    failed = not np.isfinite(own[0].sum() + own[1].sum())
    eps = float(getattr(layer, "eps", 0.0))
    if type(layer).forward is not _BatchNorm.forward:  # a custom forward may change its input before BN
        return LayerCall(path, x, count, *_computed_unless_different(_computed(x), left, eps), lambda: own, failed)
    return LayerCall(path, x, count, *(_kernel_statistics_or_none(x, left, eps) or _computed(x)), lambda: own, failed)


def _kernel_statistics_or_none(x: Tensor, left: tuple[Floats, Floats], eps: float) -> tuple[Floats, Floats] | None:
    """Return the statistics of the kernel of torch, with unreliable channels computed again; None if all may be wrong.

    torch sums in double precision along contiguous images. Along channels-last images, and along inputs of shape
    (N, C), torch sums in single precision, which is less exact.
    """
    images = x.is_contiguous() and x.numel() > x.size(0) * x.size(1)
    if x.device.type == "cpu" and not images:
        return None
    mean, var = left
    with np.errstate(invalid="ignore", over="ignore"):
        near = mean**2 <= _FAR**2 * (var + eps)  # False where either is NaN or inf
        near &= np.isfinite(var)
    if not near.all():
        far = np.flatnonzero(~near)
        mean[far], var[far] = _computed(x.index_select(1, torch.from_numpy(far).to(x.device)))
    return mean, var


def _computed_unless_different(
    computed: tuple[Floats, Floats], left: tuple[Floats, Floats], eps: float
) -> tuple[Floats, Floats]:
    """Return the computed statistics if they agree with those that BN left in the layer, else those of the layer.

    A negative variance shows a forward that updates the buffers in its own way, so that they hold no statistics.
    """
    if (left[1] < 0).any():
        return computed
    spread = np.sqrt(left[1] + eps)
    with np.errstate(invalid="ignore", over="ignore"):
        mean_agrees = np.abs(computed[0] - left[0]) <= _AGREEING * spread
        var_agrees = np.abs(np.sqrt(computed[1] + eps) - spread) <= _AGREEING * spread
    return computed if bool((mean_agrees & var_agrees).all()) else left


def _computed(x: Tensor) -> tuple[Floats, Floats]:
    """Compute mean and unbiased variance in float64."""
    moments = moments_in_blocks(x)
    mean, var = (values.cpu().numpy().astype(np.float64) for values in (moments.mean, moments.unbiased_var))
    return mean, var
