"""BN with fixed statistics by torch's own operators, where the eager kernel does not run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.functional.folding import scale_and_shift
from bnlab.functional.moments import arithmetic_dtype, per_channel, widened

__all__ = ["batch_norm_eval", "cast", "dtype_for_torch"]


def batch_norm_eval(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise with fixed statistics: a scale and a shift, computed in float64.

    The formula is (x - K) a + b', where K is the mean, rounded to the dtype of the arithmetic. Near the mean, x - K is
    exact, while a x + (b - a mean) rounds. If the parameters need no gradient, no tensor of the size of `x` is kept for
    the backward pass.

    An exporter sees torch's own operator, which every consumer knows, and no casts unless the dtypes differ.

    Args:
        x: Shape (N, C, *spatial); any float dtype and layout.
        mean: Shape (C,).
        var: Shape (C,).
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        eps: Added to the variance.

    Returns:
        Shape, dtype and layout of `x`.
    """
    dtype = arithmetic_dtype(x)
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        dtype = dtype_for_torch(x, mean, var, weight, bias)
        running = [cast(values, dtype) for values in (mean, var)]
        weight, bias = cast(weight, dtype), cast(bias, dtype)
        return F.batch_norm(x, running[0], running[1], weight, bias, training=False, eps=eps)
    pivot = mean.to(dtype)
    scale, _ = scale_and_shift(mean, var, weight, None, eps)
    shift = (pivot - widened(mean)) * scale
    shift = shift if bias is None else shift + bias
    scale, shift = per_channel(scale.to(dtype), x), per_channel(shift.to(dtype), x)
    return torch.addcmul(shift, x.to(dtype) - per_channel(pivot, x), scale).to(x.dtype)


def dtype_for_torch(x: Tensor, *values: Tensor | None) -> torch.dtype:
    """Return the dtype in which torch's own operator takes parameters and statistics together with an input.

    It takes all of them in the dtype of the input, or all of them in float32 with an input in half precision.
    """
    dtypes = {part.dtype for part in values if part is not None}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {x.dtype, arithmetic_dtype(x)} else arithmetic_dtype(x)


def cast(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return values in a dtype. Those that have it stay, because a cast in a graph hides BN from other tools."""
    return values if values is None or values.dtype == dtype else values.to(dtype)
