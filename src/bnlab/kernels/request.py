"""A request to the kernels: everything that the choice of a backend depends on."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bnlab.functional.activations import Activation

__all__ = ["Buffers", "Context", "Request", "Statistics", "context_of", "is_channels_last", "needs_formulas"]

Context = Literal["eager", "compiler", "exporter", "tracer", "transform", "subclass"]
Statistics = Literal["batch", "running"]
Buffers = Literal["fit", "narrow", "withheld", "counted otherwise"]

_TENSORS = (Tensor, nn.Parameter)
_DTYPE_NAMES = {
    dtype: str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if type(dtype) is torch.dtype
}
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state  # noqa: SLF001 - what torch.jit.is_tracing asks
_has_transforms = torch._C._are_functorch_transforms_active  # noqa: SLF001
_ENOUGH = 2
"""From this number of values per channel on, no choice depends on the number."""


class Request(NamedTuple):
    """A request to process one batch.

    The defaults describe the call of an operator that normalises with batch statistics and does nothing else.

    Attributes:
        device: Type of device, such as "cpu".
        dtype: Name of the dtype of the input, such as "float32".
        masked: Whether positions are weighted.
        count: Values per channel. `of` and `of_layer` reduce larger numbers to 2.
        by_layer: Whether a layer makes the request. A layer may also add a residual, activate and update statistics.
        statistics: The statistics that normalise: those of the batch, or the running ones.
        activation: The activation that is applied last.
        residual: "none"; "fits": a dense tensor of the shape, dtype and strides of the input; or "differs".
        is_dense: Whether the input is contiguous, channels_last or channels_last_3d.
        buffers: Running statistics to update: they "fit" the kernels, are "narrow" (half precision), "withheld" or
            "counted otherwise" than by an int64.
        is_special: Whether the class of the layer overrides how to normalise by the batch or how to update the running
            statistics.
        context: Who sees the operations: nobody ("eager"), a compiler, an exporter, torch.jit's tracer, a transform of
            torch.func or forward-mode differentiation, or a subclass of Tensor.
    """

    device: str
    dtype: str
    masked: bool
    count: int  # type: ignore[assignment] # hides tuple.count, which nobody calls on a request
    by_layer: bool = False
    statistics: Statistics = "batch"
    activation: Activation | None = None
    residual: Literal["none", "fits", "differs"] = "none"
    is_dense: bool = True
    buffers: Buffers = "fit"
    is_special: bool = False
    context: Context = "eager"

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None) -> Request:
        """Return the request to normalise an input of the shape (N, C, *spatial) by its own statistics."""
        context = context_of(x)
        return cls(x.device.type, _DTYPE_NAMES[x.dtype], mask is not None, _count(x, context), context=context)

    @classmethod
    def of_layer(
        cls,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        channels: int,
        statistics: Statistics,
        activation: Activation | None,
        buffers: Buffers,
        is_special: bool,
    ) -> Request:
        """Return the request of a layer for an input of the shape (N, C, *spatial).

        Every training step calls this. It makes the tuple without a call of the class, which would double the time.
        """
        context = context_of(x)
        fields = (
            "cpu" if x.is_cpu else x.device.type,
            _DTYPE_NAMES[x.dtype],
            mask is not None,
            _ENOUGH if context != "eager" or x.numel() > channels else x.numel() // max(channels, 1),
            True,
            statistics,
            activation,
            "none" if residual is None else "fits" if _residual_has_same_layout(residual, x, context) else "differs",
            context != "eager" or x.is_contiguous() or is_channels_last(x),
            buffers,
            is_special,
            context,
        )
        return tuple.__new__(cls, fields)


def context_of(x: Tensor) -> Context:
    """Return who sees the operations on a tensor."""
    if _has_transforms():  # first, because a compiler sees through a transform, and under vmap layouts are unknown
        return "transform"
    if _is_compiling():
        return "exporter" if torch.compiler.is_exporting() else "compiler"
    if _tracing_state() is not None:
        return "exporter" if torch.onnx.is_in_onnx_export() else "tracer"
    if forward_ad._current_level >= 0:  # noqa: SLF001
        return "transform"
    return "eager" if type(x) in _TENSORS else "subclass"


def needs_formulas() -> bool:
    """Whether torch.func, forward-mode differentiation or an ONNX exporter sees the operations: none knows bnlab's."""
    if _has_transforms():
        return True
    if _is_compiling():
        return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    if _tracing_state() is not None:
        return torch.onnx.is_in_onnx_export()
    return forward_ad._current_level >= 0  # noqa: SLF001


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is in channels_last or channels_last_3d."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def _count(x: Tensor, context: Context) -> int:
    """Return the values per channel, at most 2. Code that is compiled once for many sizes must not read the number."""
    if context in ("compiler", "exporter"):
        return _ENOUGH
    channels = x.size(1)
    return _ENOUGH if x.numel() >= _ENOUGH * channels > 0 else x.numel() // max(channels, 1)


def _residual_has_same_layout(residual: Tensor, x: Tensor, context: Context) -> bool:
    """Whether a kernel can read a residual beside the input. Strides count in eager mode only."""
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        return False
    return context != "eager" or (type(residual) in _TENSORS and residual.stride() == x.stride())
