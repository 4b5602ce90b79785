"""The running statistics of a layer: how a batch updates them, and how they keep a wide dtype."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from bnlab.errors import BnlabWarning
from bnlab.functional.moments import sum_of_weights
from bnlab.functional.running import moving_average
from bnlab.kernels.compiled import is_in_backward
from bnlab.kernels.request import Buffers
from bnlab.nn.layer_path import layer_path
from bnlab.nn.options import Nonfinite

__all__ = [
    "BatchNormWithSafeStatistics",
    "BatchStatistics",
    "is_in_backward",
    "is_readable",
    "is_recomputation",
    "kind_of_buffers",
]

_STATISTICS = ("running_mean", "running_var")
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class BatchStatistics:
    """The statistics of a batch that update the running statistics.

    Attributes:
        mean: Shape (C,), float64.
        var: Biased. Shape (C,), float64.
        count: Values per channel, or the sum of their weights: a tensor of shape ().
    """

    mean: Tensor
    var: Tensor
    count: int | Tensor

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, x: Tensor, weights: Tensor | None) -> BatchStatistics:
        """Return the statistics of `x`, with the count that the weights imply."""
        return cls(mean, var, x.numel() // x.size(1) if weights is None else sum_of_weights(weights, x))


def kind_of_buffers(mean: Tensor | None, var: Tensor | None, batches: Tensor | None) -> Buffers:
    """Return how a layer keeps its running statistics and counter, as far as that matters to a kernel."""
    if mean is None or var is None:
        return "withheld"
    if mean.dtype not in _WIDE or var.dtype not in _WIDE:
        return "narrow"
    return "fit" if batches is None or batches.dtype is torch.int64 else "counted otherwise"


class BatchNormWithSafeStatistics(TorchBatchNorm):
    """torch's BN layer with other running statistics: they survive bad batches and conversion to half precision."""

    ranks: ClassVar[tuple[int, ...]]
    nonfinite: Nonfinite
    statistics_dtype: torch.dtype | None
    skipped_batches: Tensor
    _own_tensors: ClassVar[tuple[str, ...]] = ("skipped_batches",)
    """Tensors that are neither parameters nor buffers: tools that fill or broadcast buffers must not touch them."""

    def reset_running_stats(self) -> None:
        """Set the running statistics and counters back to their initial values."""
        super().reset_running_stats()
        if "skipped_batches" in vars(self):  # torch's constructor calls this method before the tensor exists
            self.skipped_batches.zero_()

    @torch.no_grad()
    def _update(self, batch: BatchStatistics) -> None:
        """Update the running statistics from a batch, unless it is not finite or has fewer than two values.

        Where reading a value would make a device wait, or stop a compiler, the decision stays a tensor.
        """
        mean, var, count = batch.mean, batch.var, batch.count
        if self.num_batches_tracked is None and self.momentum is None:
            return
        readable = is_readable(mean)
        total = float(count) if readable else count if isinstance(count, Tensor) else mean.new_full((), count)
        counts: bool | Tensor = total >= 2
        if self.nonfinite == "skip":
            finite = (mean + var).isfinite().all()
            counts = bool(counts and finite) if readable else counts & finite
        if readable and not counts:
            self._count_skipped(mean.device, 1)
            return
        if isinstance(counts, Tensor):
            self._count_skipped(mean.device, ~counts)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += counts
        if self.running_mean is None or self.running_var is None:
            return
        bessel = total / (total - 1 if isinstance(total, float) else (total - 1).clamp(min=1))
        for running, updated in (
            (self.running_mean, self._moving_average(self.running_mean, mean)),
            (self.running_var, self._updated_var(self.running_var, var, bessel)),
        ):
            running.copy_(torch.where(counts, updated, running) if isinstance(counts, Tensor) else updated)
        if readable:
            self._warn_if_saturated(self.running_var)

    def _count_skipped(self, device: torch.device, batches: int | Tensor) -> None:
        """Count batches that update nothing.

        Exported programs and functions under torch.func do not count them. Neither can change a tensor that is not a
        buffer, and under vmap one counter would have to count for many models.
        """
        if torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting():  # noqa: SLF001
            return
        if self.skipped_batches.device != device:
            self._place_own_tensors(device)
        gather = getattr(batches, "full_tensor", None)  # of a DTensor; the count itself is an ordinary tensor
        self.skipped_batches.add_(batches if gather is None else gather())

    def _moving_average(self, running: Tensor, new: Tensor) -> Tensor:
        """Return a moving average after one more update."""
        updates = 1 if self.num_batches_tracked is None else self.num_batches_tracked.clamp(min=1)
        return moving_average(running, new, self.momentum, updates)

    def _updated_var(self, running_var: Tensor, var: Tensor, bessel: float | Tensor) -> Tensor:
        """Return the running variance after one more update; `bessel` is m/(m-1)."""
        return self._moving_average(running_var, var * bessel)

    def _warn_if_saturated(self, running_var: Tensor) -> None:
        largest = torch.finfo(running_var.dtype).max
        if bool((running_var == largest).any()):
            warnings.warn(
                f"{layer_path(self)}: running_var must be finite in {running_var.dtype}, got a value clamped to "
                f"{largest:.3g}. Scale the input down, or use statistics_dtype=torch.float64.",
                BnlabWarning,
                stacklevel=2,
            )

    def keep_statistics_wide(self) -> None:
        """Widen running statistics that are narrower than `statistics_dtype`."""
        for key in _STATISTICS:
            buffer = self._buffers.get(key)
            if buffer is not None and self._is_too_narrow(buffer.dtype):
                self._buffers[key] = buffer.to(self.statistics_dtype)

    def _is_too_narrow(self, dtype: torch.dtype) -> bool:
        return self.statistics_dtype is not None and torch.finfo(dtype).eps > torch.finfo(self.statistics_dtype).eps

    def _load_from_state_dict(self, *arguments: object) -> None:
        """Load as torch does, then widen the buffers: with assign=True the loaded tensors replace them."""
        super()._load_from_state_dict(*arguments)
        if self.skipped_batches.device != self._layer_device():
            self._place_own_tensors(self._layer_device())
        self.keep_statistics_wide()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Apply a conversion, and keep the running statistics at least as wide as `statistics_dtype`."""
        before = {key: self._buffers.get(key) for key in _STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key, old in before.items():
            new = self._buffers.get(key)
            if old is not None and new is not None and self._is_too_narrow(new.dtype):
                self._buffers[key] = old.to(device=new.device)
        self.skipped_batches = _converted_count(fn, self.skipped_batches)
        return self

    def _place_own_tensors(self, device: torch.device) -> None:
        """Move the tensors that are neither parameters nor buffers to a device, which torch leaves to the layer.

        Some tools move only parameters and buffers, one by one. Tensors without values begin anew.
        """
        count = self.skipped_batches
        self.skipped_batches = torch.zeros_like(count, device=device) if count.is_meta else count.to(device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle. In older pickles the layer's own tensors are buffers."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in self._own_tensors:
            if name in self._buffers:
                setattr(self, name, _taken_out(self, name))

    def _layer_device(self) -> torch.device:
        """Return the device of the layer."""
        own = (*self.parameters(recurse=False), *(getattr(self, key) for key in _STATISTICS))
        return next((tensor.device for tensor in own if tensor is not None), self.skipped_batches.device)


def _taken_out(layer: nn.Module, name: str) -> Tensor:
    """Remove a buffer from a layer and return it."""
    buffer = layer.get_buffer(name)
    delattr(layer, name)
    return buffer


def _converted_count(fn: Callable[[Tensor], Tensor], count: Tensor) -> Tensor:
    """Apply a conversion of a layer to a count: to its device and memory, but never to its value or dtype.

    `to_empty` returns memory with any values. The count then begins anew.
    """
    converted = fn(count)
    if converted is count or converted.is_meta or type(converted) is not Tensor:
        return converted
    if count.is_meta or not torch.equal(converted.to(count.device, count.dtype), count):
        return torch.zeros_like(converted, dtype=count.dtype)
    return converted.to(count.dtype)


def is_readable(values: Tensor) -> bool:
    """Whether a value can be read without cost: in eager mode, on the CPU, in an ordinary tensor."""
    plain = type(values) is Tensor and values.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and not torch._C._are_functorch_transforms_active()  # noqa: SLF001


def is_recomputation() -> bool:
    """Whether activation checkpointing is recomputing this forward pass inside the backward pass."""
    return not torch.compiler.is_compiling() and is_in_backward()
