"""BN with fixed statistics by torch's own operators, where the eager kernel does not run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.functional.folding import scale_and_shift
from bnlab.functional.moments import per_channel, widened

__all__ = ["batch_norm_eval"]


def batch_norm_eval(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise with fixed statistics: a scale and a shift, computed in float64.

    The formula is (x - K) a + b', where K is the mean, rounded to the dtype of the arithmetic. Near the mean, x - K is
    exact, while a x + (b - a mean) rounds. If the parameters need no gradient, no tensor of the size of `x` is kept for
    the backward pass.

    An exporter sees torch's own operator, which every consumer knows.

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
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        mean, var = mean.to(dtype), var.to(dtype)
        weight, bias = (None if values is None else values.to(dtype) for values in (weight, bias))
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    pivot = mean.to(dtype)
    scale, _ = scale_and_shift(mean, var, weight, None, eps)
    shift = (pivot - widened(mean)) * scale
    shift = shift if bias is None else shift + bias
    scale, shift = per_channel(scale.to(dtype), x), per_channel(shift.to(dtype), x)
    return torch.addcmul(shift, x.to(dtype) - per_channel(pivot, x), scale).to(x.dtype)
