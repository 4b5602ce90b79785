"""What BN layers get, batch by batch: the one engine behind the evidence of a diagnosis and behind recalibration.

The statistics of a batch fall out of the BN operator itself: a layer is given scratch buffers and leaves them there. On
the CPU a layer of torch runs on bnlab's kernels meanwhile, which leave exact ones. Only where those a layer leaves are
not right to the rounding of their dtype (another class, half precision, a mean far from the spread, values that are not
finite) are they computed again in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from bnlab.functional.moments import batch_moments, merge
from bnlab.nn.base import BatchNormBase
from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Floats
from bnlab.observe.passes.batches import Batch, Forward, run_batch
from bnlab.observe.passes.dropout import drops
from bnlab.observe.passes.order import AllSeen, ExecutionOrder, OneValue, input_of
from bnlab.observe.passes.scratch import ExactScratch, Scratch, scratch_of
from bnlab.observe.passes.subject import Subject

__all__ = ["LayerCall", "Run", "measuring"]

_FAR = 16.0
"""abs(mean)/std above which a mean rounded to float32 is off by more than 1e-6 standard deviations."""

_AGREEING = 0.02
"""Difference in standard deviations that the kernels of torch explain: beyond it a layer has changed its input."""

_BLOCK = 1 << 21
"""Values that are widened to float64 at once."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer.

    Attributes:
        path: Of the layer.
        x: Its input: of shape (N, C, *spatial), unless the layer moves the channels to their place itself.
        count: Values per channel.
        mean: Of the batch. Shape (C,), float64; not finite if the input is not.
        var: Unbiased, of the batch. Shape (C,), float64.
        own: Returns mean and unbiased variance as the layer's own operator takes them, which may be off; None where
            that is not known.
        own_failed: Whether those are known not to be finite.
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
        """Whether neither NaN nor inf came in."""
        return bool(np.isfinite(self.mean.sum() + self.var.sum()))


class Run:
    """A pass that is going on.

    Attributes:
        order: The order of the layers.
    """

    def __init__(self, model: nn.Module, layers: int, forward: Forward) -> None:
        self._model, self._forward = model, forward
        self.order = ExecutionOrder(layers)

    def one_batch(self, batch: Batch) -> str | None:
        """Run one batch; return the path of a layer at which it ended, as one value per channel has no statistics."""
        self.order.begin()
        try:
            self._forward(self._model, batch)
        except AllSeen:
            return None
        except OneValue as layer:
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
    forward: Forward = run_batch,
) -> Iterator[Run]:
    """Watch what layers get; the model is in eval mode meanwhile, and put back when the block ends.

    Args:
        subject: The model.
        layers: The layers to watch, by path; they normalise with the statistics of each batch.
        take: Called with every call of such a layer.
        by_batch: Other layers that are to normalise with the statistics of each batch; the rest uses running ones.
        dropping: Paths of the modules that drop values; every other dropout is off.
        forward: Calls the model on a batch.

    Yields:
        What runs one batch after the other.
    """
    run = Run(subject.model, len(layers), forward)
    with subject.untouched(), torch.no_grad():
        subject.model.eval()
        with _hooked() as handles:
            for path, module in subject.model.named_modules():
                if path in dropping or drops(module):
                    handles += _kept_in_mode(module, path in dropping)
            for path, layer in layers.items():
                handles += _watched(path, layer, take, run.order)
            for layer in by_batch:
                handles.append(layer.register_forward_pre_hook(_refuse_one_value, with_kwargs=True))
                layer.running_mean = layer.running_var = None  # type: ignore[assignment]
            yield run


@contextmanager
def _hooked() -> Iterator[list[RemovableHandle]]:
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _kept_in_mode(module: nn.Module, training: bool) -> list[RemovableHandle]:
    """Keep dropout on or off, also where a forward calls train() or eval() on its way."""

    def switch(module: nn.Module, _: object) -> None:
        module.training = training

    module.training = training
    return [module.register_forward_pre_hook(switch)]


def _refuse_one_value(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if input_of(arguments, keywords).numel() == channels_of(layer):
        raise OneValue("")


def _watched(
    path: str, layer: nn.Module, take: Callable[[LayerCall], None], order: ExecutionOrder
) -> list[RemovableHandle]:
    channels, scratch = channels_of(layer), scratch_of(layer)
    if scratch is None and isinstance(layer, _BatchNorm):
        layer.running_mean = layer.running_var = None

    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if input_of(arguments, keywords).numel() == channels:
            raise OneValue(path)
        if scratch is not None:
            layer.training = True  # a forward may have called eval() on its way here
            scratch.clear()

    def after(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], __: object) -> None:
        x = input_of(arguments, keywords)
        call = _call(path, layer, x, scratch) if x.numel() > 0 else None
        if call is not None:
            take(call)
        order.count(path)

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]


def _call(path: str, layer: nn.Module, x: Tensor, scratch: Scratch | None) -> LayerCall | None:
    """Return the statistics of a call, computed again where those the layer left may be off; None if there are none."""
    channels = channels_of(layer)
    count = x.numel() // channels
    left = None if scratch is None else scratch.read()
    if x.dim() < 2 or x.size(1) != channels:  # a forward of its own may move the channels to their place
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
    if type(layer).forward is not _BatchNorm.forward:  # it may do something to its input before BN sees it
        return LayerCall(path, x, count, *_agreeing(_computed(x), left, eps), lambda: own, failed)
    return LayerCall(path, x, count, *(_trusted(x, left, eps) or _computed(x)), lambda: own, failed)


def _trusted(x: Tensor, left: tuple[Floats, Floats], eps: float) -> tuple[Floats, Floats] | None:
    """Return what torch's kernel left as far as it can be trusted, with the channels computed again where it cannot.

    torch sums in double precision along contiguous images, and in single precision, the faster the less exact, along
    channels-last ones, of which (N, C) is one.
    """
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
