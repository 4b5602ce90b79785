"""A BN layer whose running statistics wait for the step of the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.parameter import is_lazy

from bnlab.errors import UsageError
from bnlab.functional.moments import batch_moments
from bnlab.kernels.compiled import KindOfPass, kind_of_compiled_pass, kind_of_pass
from bnlab.kernels.statistics import batch_statistics
from bnlab.nn.base import BatchNormBase
from bnlab.nn.input_check import position_weights
from bnlab.observe.passes.in_use import runs_command
from bnlab.uninterrupted import finishes
from bnlab.watching.class_forward import Forward
from bnlab.watching.pooled_batches import Block, CompiledPool, Pool, Pooled, Rule, merged
from bnlab.watching.update_bn import in_update_bn

__all__ = ["DeferredLayer"]

_KINDS = (KindOfPass.WITH_GRADIENTS, KindOfPass.WITHOUT_GRADIENTS)
"""The kinds of passes that are pooled, each on its own."""


class DeferredLayer:
    """Runs the forward of a layer without its update, and keeps the statistics of the batch for the next step.

    `track_running_stats` is False in the meantime: every layer then normalises as before and updates nothing.

    Args:
        path: The path of the layer.
        layer: The layer.

    Attributes:
        is_compiled: Whether compiled code runs the layer.
    """

    def __init__(self, path: str, layer: _BatchNorm) -> None:
        self.path = path
        self.layer = layer
        self.is_compiled = False
        self._momentum = layer.momentum
        self._call: _Call | None = None
        rule = Rule(
            fewest=1 if isinstance(layer, SyncBatchNorm) else 2,  # other ranks may have more values
            keeps_nonfinite=isinstance(layer, BatchNormBase) and layer.nonfinite == "propagate",
        )
        self._pools = {kind: _Pools(rule, layer.running_mean) for kind in _KINDS}

    def run(self, forward: Forward, args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        """Return the output of the layer, whose running statistics stay as they are."""
        if self._call is not None:  # a forward that calls the one of its base class, which shows what BN receives
            self._call.receive(args, keywords)
            return forward(self.layer, *args, **keywords)
        if torch.compiler.is_compiling():
            return self._run_compiled(forward, args, keywords)
        if not self._updates() or self._is_recalibrated():
            return forward(self.layer, *args, **keywords)
        call = _Call(self.layer, args, keywords)
        versions = _versions(self.layer)
        try:
            self._begin(call)
            y = forward(self.layer, *args, **keywords)
        finally:
            self.end()
        if _versions(self.layer) != versions or call.is_changed():
            raise UsageError(
                f"{self.path}: once_per_step must be able to defer the update of the layer, got a "
                f"{type(self.layer).__name__}, whose forward changes its input or its running statistics in its own "
                f"way. Use bnlab.convert(model, bnlab.nn.BatchNorm2d) before."
            )
        kind = kind_of_pass()
        if kind is not KindOfPass.RECOMPUTATION:
            self._pools[kind].eager.add(*call.statistics())
        return y

    def _run_compiled(self, forward: Forward, args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        """Do the same in code that a compiler traces. An exception then ends the trace, not the call."""
        with_gradients, without = (self._pools[kind].compiled for kind in _KINDS)
        is_recalibrated = not torch.is_grad_enabled() and self.layer.momentum != self._momentum
        if is_recalibrated or with_gradients is None or without is None or not self._updates():
            return forward(self.layer, *args, **keywords)
        self._call = call = _Call(self.layer, args, keywords)
        self.layer.track_running_stats = False
        y = forward(self.layer, *args, **keywords)
        self.layer.track_running_stats = True
        self._call = None
        self.is_compiled = True
        moments = call.moments()
        kind = kind_of_compiled_pass(moments[0])
        with_gradients.add(*moments, kind == int(KindOfPass.WITH_GRADIENTS))
        if not torch.is_grad_enabled():
            without.add(*moments, kind == int(KindOfPass.WITHOUT_GRADIENTS))
        return y

    def take(self) -> Pooled:
        """Return what the micro-batches of the step come to, and begin anew.

        Passes without gradients count only for a layer without any other pass, such as one of a teacher whose weights
        are an average.
        """
        (taken, batches), (without, _) = (self._pools[kind].take() for kind in _KINDS)
        if not isinstance(batches, Tensor):
            return taken if batches else without
        return _chosen(batches > 0, taken, without)

    def _updates(self) -> bool:
        """Return whether the layer updates running statistics without the block, and not those of a transform."""
        layer = self.layer
        if not (layer.training and layer.track_running_stats) or layer.running_mean is None:
            return False
        if torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting():  # noqa: SLF001
            return False
        return not isinstance(layer, BatchNormBase) or layer._normalizes_by_batch()  # noqa: SLF001 - of bnlab

    def _is_recalibrated(self) -> bool:
        """Return whether something other than training runs the layer, and reads what it updates."""
        if runs_command():
            return True
        if torch.is_grad_enabled():
            self._momentum = self.layer.momentum
            return False
        return self.layer.momentum != self._momentum or in_update_bn()

    @finishes
    def _begin(self, call: _Call) -> None:
        """Keep the layer from its update. It normalises as before."""
        self._call = call
        self.layer.track_running_stats = False

    @finishes
    def end(self) -> None:
        """Let the layer update itself again. This does nothing where it does already."""
        if self._call is not None:
            self.layer.track_running_stats = True
            self._call = None


class _Pools:
    """The statistics of one kind of passes since the last step."""

    def __init__(self, rule: Rule, running_mean: Tensor | None) -> None:
        self.eager = Pool(rule)
        has_shape = running_mean is not None and not is_lazy(running_mean)
        self.compiled = CompiledPool(rule, running_mean) if running_mean is not None and has_shape else None

    def take(self) -> tuple[Pooled, int | Tensor]:
        """Return what they come to, and their number; begin anew."""
        batches: int | Tensor = self.eager.batches
        pooled = self.eager.take()
        if self.compiled is None or not self.compiled.is_used:
            return pooled, batches
        more, more_batches = self.compiled.take()
        blocks = [block for block in (pooled.block, more.block) if block is not None]
        return Pooled(merged(blocks) if blocks else None, pooled.rejected + more.rejected), batches + more_batches


class _Call:
    """What a layer receives in one call."""

    def __init__(self, layer: _BatchNorm, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._layer = layer
        self._input: Tensor | None = None
        self._mask: Tensor | None = None
        self._version = 0
        self.receive(args, keywords)

    def receive(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Remember the arguments of a forward. The last one in a call receives what BN normalises."""
        x = args[0] if args else keywords.get("input")
        if isinstance(x, Tensor):
            self._input = x
            self._version = 0 if torch.compiler.is_compiling() else _version(x)
        self._mask = keywords.get("mask", self._mask)

    def is_changed(self) -> bool:
        """Return whether the input is another one than when the layer received it."""
        return self._input is None or _version(self._input) != self._version

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return mean, biased variance and count of the batch."""
        x = self._input
        assert x is not None  # a layer without an input has raised
        return batch_statistics(x.detach(), self._weights(x))

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, m2 and count by operators that a compiler sees through."""
        x = self._input
        assert x is not None  # a layer without an input has raised
        with torch.no_grad():
            moments = batch_moments(x.detach(), self._weights(x))
        return moments.mean, moments.m2, moments.count

    def _weights(self, x: Tensor) -> Tensor | None:
        if self._mask is None or not isinstance(self._layer, BatchNormBase):
            return None
        return position_weights(self._layer, x, self._mask)


def _chosen(first: Tensor, a: Pooled, b: Pooled) -> Pooled:
    """Return one of two on a device, without waiting for it."""
    if a.block is None or b.block is None:
        return b if a.block is None else a
    values = [torch.where(first, old, new) for old, new in zip(a.block, b.block, strict=True)]
    return Pooled(Block(*values), torch.where(first, a.rejected, b.rejected))


def _version(tensor: Tensor | None) -> int:
    """Return how often a tensor has been changed in place, as far as torch counts it."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version  # noqa: SLF001 - torch has no public name


def _versions(layer: _BatchNorm) -> tuple[int, int]:
    return _version(layer.running_mean), _version(layer.running_var)
