"""Measures the inputs of BN layers batch by batch, for the evidence of a diagnosis and for recalibration.

The BN operator itself computes the statistics of a batch: a layer has scratch buffers, to which it writes them. A layer
of torch runs on the kernels of bnlab during that time, whose statistics are exact. This module computes the statistics
again in float64 only where those of the layer may be wrong by more than the rounding of their dtype: for a layer of
another class, half precision, a mean far from the spread, or values that are not finite.

The host reads nothing from a device while a batch runs. What a layer shows there waits until the host reads it with
much else in one transfer, at the latest when the pass ends. On the CPU it is read at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from bnlab.functional.moments import moments_in_blocks
from bnlab.kernels.statistics import batch_statistics
from bnlab.nn.base import BatchNormBase
from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Floats
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.dropout import drops
from bnlab.observe.passes.modes import kept_in_mode, set_eval_mode
from bnlab.observe.passes.order import ExecutionOrder, ForwardEnded, OneValuePerChannel, input_of
from bnlab.observe.passes.population import layers_read_by_others, use_batch_statistics
from bnlab.observe.passes.scratch import ExactScratch, scratch_of, statistics_in
from bnlab.observe.passes.subject import Subject
from bnlab.observe.transfers import Pending, is_at_hand

__all__ = ["Beside", "LayerCall", "Run", "measuring"]

_FAR = 16.0
"""abs(mean)/std above which rounding to float32 changes a mean by more than 1e-6 standard deviations."""

_AGREEING = 0.02
"""Difference in standard deviations that the kernels of torch explain. A larger one shows a changed input."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer.

    Attributes:
        path: Path of the layer.
        batch: Index of the batch in the pass.
        shape: Shape of its input, (N, C, *spatial), unless the forward of the layer moves the channels to that
            position.
        dtype: The dtype of its input.
        count: Values per channel.
        mean: Mean of the batch. Shape (C,), float64; not finite if the input is not finite.
        var: Unbiased variance of the batch. Shape (C,), float64.
        own: Returns mean and unbiased variance as the operator of the layer computes them, which may be inexact; None
            where they are not known.
        own_failed: Whether the statistics that `own` returns are known not to be finite.
        beside: What the pass computed from the input beside its statistics; None if it computed nothing.
    """

    path: str
    batch: int
    shape: torch.Size
    dtype: torch.dtype
    count: int
    mean: Floats
    var: Floats
    own: Callable[[], tuple[Floats, Floats]] | None = None
    own_failed: bool = False
    beside: Beside | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the statistics, and so the input, hold neither NaN nor inf."""
        return bool(np.isfinite(self.mean.sum() + self.var.sum()))


@dataclass(frozen=True, eq=False)
class Beside:
    """What a pass computes from the input of a layer beside its statistics.

    Attributes:
        tensors: Results on the device of the input, or copies of them on the host.
        note: Anything that the host knows about them.
    """

    tensors: Sequence[Tensor]
    note: object = None


Look = Callable[[str, Tensor, Tensor], "Beside | None"]
"""Computes something from the path of a layer, its input, and the mean of its channels, of shape (C,)."""


class Run:
    """A pass in progress.

    Attributes:
        order: The order in which the layers run.
        batch: Index of the batch that runs.
    """

    def __init__(self, subject: Subject, layers: int, take: Callable[[LayerCall], None]) -> None:
        self._subject, self._take = subject, take
        self._pending, self._ended = Pending(), -1
        self.order, self.batch = ExecutionOrder(layers), -1

    def one_batch(self, batch: Batch) -> str | None:
        """Run one batch; return the path of the layer at which it ended because of one value per channel, or None."""
        self.order.begin()
        self.batch += 1
        try:
            self._subject.run(batch)
        except ForwardEnded:
            return None
        except OneValuePerChannel as layer:
            return layer.path
        except Exception:
            if not self._would_have_ended():
                raise
        if self._pending.is_large:
            self.settle()
        return None

    def _would_have_ended(self) -> bool:
        """Return whether a call that waits ends the batch, so that the modules behind it would not have run."""
        self.settle()
        return self._ended == self.batch

    def add(self, tensors: Sequence[Tensor], call_of: Callable[[list[Tensor]], LayerCall | None]) -> None:
        """Take the call that tensors of a device show, once the host reads them."""
        batch = self.batch

        def take(values: list[Tensor]) -> None:
            call = call_of(values)
            if call is None:
                return
            try:
                self._take(call)
            except ForwardEnded:
                self._ended = batch

        self._pending.add(tensors, take)

    def then(self, action: Callable[[], None]) -> None:
        """Do something as soon as the calls so far are taken: now, unless some of them wait on a device."""
        self._pending.add([], lambda _: action())

    @property
    def is_settled(self) -> bool:
        """Whether every call so far is taken."""
        return self._pending.is_empty

    def settle(self) -> None:
        """Take the calls that wait on a device."""
        self._pending.settle()


@contextmanager
def measuring(
    subject: Subject,
    layers: Mapping[str, nn.Module],
    take: Callable[[LayerCall], None],
    *,
    by_batch: Collection[nn.Module] = (),
    dropping: Collection[str] = (),
    look: Look | None = None,
    wants_own: bool = False,
) -> Iterator[Run]:
    """Watch the inputs of layers. The model is in eval mode inside the block, and is restored when the block ends.

    Args:
        subject: The model.
        layers: The layers to watch, by path. They normalise with the statistics of each batch.
        take: Function that receives every call of a watched layer, in their order. On the CPU it gets a call while the
            batch runs, and may raise `ForwardEnded`. On a device it gets the call later, when the block ends at the
            latest.
        by_batch: Other layers that also normalise with the statistics of each batch. All remaining layers use running
            statistics.
        dropping: Paths of the modules that drop values. Every other dropout is off.
        look: Computes something else from the input of every call, unless the input is known not to be finite.
        wants_own: Whether the statistics that the layers themselves compute are wanted too.

    Yields:
        The pass, which runs one batch after the other.
    """
    run = Run(subject, len(layers), take)
    with subject.untouched(), torch.no_grad(), _hooked() as handles:
        handles += set_eval_mode(subject.model)
        for path, module in subject.model.named_modules():
            if path in dropping or drops(module):
                handles.append(kept_in_mode(module, training=path in dropping))
        read = layers_read_by_others(subject.model)
        for path, layer in layers.items():
            watched = _Watched(path, layer, run, take, look, wants_own=wants_own)
            handles += watched.hooks(is_read=layer in read)
        for layer in by_batch:
            handles.append(layer.register_forward_pre_hook(_refuse_one_value, with_kwargs=True))
            if isinstance(layer, _BatchNorm):
                handles += use_batch_statistics(layer, is_read=layer in read)
        yield run
        run.settle()


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


_Values = tuple[Floats, Floats]
"""Mean and unbiased variance, both of shape (C,) and float64."""


class _Watched:
    """One layer that a pass watches."""

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        run: Run,
        take: Callable[[LayerCall], None],
        look: Look | None,
        *,
        wants_own: bool,
    ) -> None:
        self._path, self._layer, self._run, self._take, self._look = path, layer, run, take, look
        self._wants_own, self._channels = wants_own, channels_of(layer)
        self._eps = float(getattr(layer, "eps", 0.0))
        self._scratch = scratch_of(layer, wants_own=wants_own)

    def hooks(self, *, is_read: bool) -> list[RemovableHandle]:
        """Make the layer normalise with the statistics of its batch, and return the hooks that watch it."""
        layer = self._layer
        imposing = []
        if self._scratch is None and isinstance(layer, _BatchNorm):
            imposing = use_batch_statistics(layer, is_read=is_read)
        return [
            *imposing,
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = input_of(arguments, keywords)
        if x.numel() == self._channels:
            raise OneValuePerChannel(self._path)
        if self._scratch is not None:
            layer.training = True  # a forward may have called eval() before this layer
            self._scratch.put(x)

    def _after(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], __: object) -> None:
        x = input_of(arguments, keywords)
        x = x.dequantize() if x.is_quantized else x
        call = None
        if x.numel() > 0:
            if is_at_hand(x):
                call = self._with_look(self._call(x), x)
            else:
                self._defer(x, is_masked=len(arguments) + len(keywords) > 1)
        if self._scratch is not None:
            self._scratch.take_away()
        if call is not None:
            self._take(call)
        self._run.order.count(self._path)

    def _fits(self, shape: torch.Size) -> bool:
        """Return whether an input has its channels at position 1, to which a custom forward may move them."""
        return len(shape) > 1 and shape[1] == self._channels

    def _call(self, x: Tensor) -> LayerCall | None:
        """Return a call on the CPU; None without any statistics."""
        scratch = self._scratch
        left = None if scratch is None else scratch.read()

        def of_torch() -> _Values:
            assert isinstance(scratch, ExactScratch)
            return _arrays(*scratch.of_torch(x))

        return self._decided(
            self._run.batch,
            x.shape,
            x.dtype,
            left,
            lambda: _computed(x),
            lambda own: _kernel_statistics_or_none(x, own, self._eps) or _computed(x),
            of_torch,
        )

    def _with_look(self, call: LayerCall | None, x: Tensor) -> LayerCall | None:
        if call is None or self._look is None or not call.is_finite:
            return call
        return replace(call, beside=self._look(self._path, x, torch.from_numpy(call.mean)))

    def _defer(self, x: Tensor, *, is_masked: bool) -> None:
        """Let a call on a device wait, with the tensors that show its statistics."""
        scratch, shape, dtype = self._scratch, x.shape, x.dtype
        left, factor = ([], 1.0) if scratch is None else (scratch.buffers, scratch.factor)
        computed = list(batch_statistics(x)[:2]) if self._needs_input(shape, left, is_masked=is_masked) else []
        own = self._of_torch(x)
        means = [*computed[:1], *left[:1]]
        seen = self._look(self._path, x, means[0]) if self._look is not None and means else None
        decided = partial(self._decided, self._run.batch, shape, dtype)
        count = shape.numel() // self._channels

        def call_of(values: list[Tensor]) -> LayerCall | None:
            rest = iter(values)
            of_left, of_input, of_own = ([next(rest) for _ in part] for part in (left, computed, own))

            def of_computed() -> _Values:
                if not of_input:  # a layer of bnlab leaves a batch alone that is not finite
                    return np.full(self._channels, np.nan), np.full(self._channels, np.nan)
                mean, var = _arrays(*of_input)
                return mean, var * (count / max(count - 1, 1))

            values_left = statistics_in(of_left, factor) if of_left else None
            call = decided(values_left, of_computed, lambda _: of_computed(), lambda: _arrays(*of_own))
            return call if call is None or seen is None else replace(call, beside=Beside(list(rest), seen.note))

        self._run.add([*left, *computed, *own, *(() if seen is None else seen.tensors)], call_of)

    def _needs_input(self, shape: torch.Size, left: Sequence[Tensor], *, is_masked: bool) -> bool:
        """Return whether the statistics that a layer left behind on a device may have to be computed from its input."""
        if not self._fits(shape):
            return False
        is_exact = isinstance(self._scratch, ExactScratch) or (isinstance(self._layer, BatchNormBase) and not is_masked)
        return not left or not is_exact

    def _of_torch(self, x: Tensor) -> Sequence[Tensor]:
        """Return the statistics of torch's kernel on a device, where the layer ran on another one; else nothing."""
        scratch = self._scratch
        is_wanted = self._wants_own and isinstance(scratch, ExactScratch) and self._fits(x.shape)
        return scratch.of_torch(x) if is_wanted and isinstance(scratch, ExactScratch) else ()

    def _decided(
        self,
        batch: int,
        shape: torch.Size,
        dtype: torch.dtype,
        left: _Values | None,
        computed: Callable[[], _Values],
        corrected: Callable[[_Values], _Values],
        of_torch: Callable[[], _Values],
    ) -> LayerCall | None:
        """Return a call with the statistics that are exact; None without any.

        Args:
            batch: Index of the batch.
            shape: Shape of the input.
            dtype: The dtype of the input.
            left: The statistics that the layer left behind, or None.
            computed: Returns the statistics of the input in float64.
            corrected: Returns the statistics of the kernel of torch, exact where it may be wrong.
            of_torch: Returns what the kernel of torch computes, where the layer did not run on it.
        """
        call = partial(LayerCall, self._path, batch, shape, dtype, shape.numel() // self._channels)
        if not self._fits(shape):
            return None if left is None else call(*left)
        if left is None:
            return call(*computed())
        if isinstance(self._scratch, ExactScratch):
            return call(*left, own=of_torch if self._wants_own else None)
        if isinstance(self._layer, BatchNormBase):
            return call(*left)
        own = (left[0].copy(), left[1].copy())
        failed = not np.isfinite(own[0].sum() + own[1].sum())
        if type(self._layer).forward is not _BatchNorm.forward:  # a custom forward may change its input before BN
            values = _computed_unless_different(computed(), left, self._eps)
        else:
            values = corrected(left)
        return call(*values, own=lambda: own, own_failed=failed)


def _kernel_statistics_or_none(x: Tensor, left: tuple[Floats, Floats], eps: float) -> tuple[Floats, Floats] | None:
    """Return the statistics of the kernel of torch, with unreliable channels computed again; None if all may be wrong.

    torch sums in double precision along contiguous images. Along channels-last images, and along inputs of shape
    (N, C), torch sums in single precision, which is less exact.
    """
    if not (x.is_contiguous() and x.numel() > x.size(0) * x.size(1)):
        return None
    mean, var = left
    with np.errstate(invalid="ignore", over="ignore"):
        near = mean**2 <= _FAR**2 * (var + eps)  # False where either is NaN or inf
        near &= np.isfinite(var)
    if not near.all():
        far = np.flatnonzero(~near)
        mean[far], var[far] = _computed(x.index_select(1, torch.from_numpy(far)))
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


def _computed(x: Tensor) -> _Values:
    """Compute mean and unbiased variance of an input on the CPU in float64."""
    moments = moments_in_blocks(x)
    return _arrays(moments.mean, moments.unbiased_var)


def _arrays(mean: Tensor, var: Tensor) -> _Values:
    return mean.numpy().astype(np.float64), var.numpy().astype(np.float64)
