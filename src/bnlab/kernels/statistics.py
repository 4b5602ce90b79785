"""The statistics of a batch on the fastest exact kernel of its device, alone or beside the normalised batch."""

from __future__ import annotations

from torch import Tensor

from bnlab.functional.moments import moments_in_blocks
from bnlab.kernels import fused, native
from bnlab.kernels.calls import calls_of
from bnlab.kernels.compiled import batch_norm_train
from bnlab.kernels.dense import dense
from bnlab.kernels.dispatch import choose
from bnlab.kernels.form import Form
from bnlab.kernels.request import Request

__all__ = ["batch_statistics", "normalized_with_statistics"]


def batch_statistics(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return the statistics of every channel over a batch, on the device of the batch, which nothing waits for.

    Args:
        x: Shape (N, C, *spatial); any float dtype and layout.
        mask: Weight of every position, >= 0, of shape (N, 1, *spatial); None where every position counts.

    Returns:
        The mean and the biased variance, both of shape (C,) and float64 (float32 on a device without float64), and the
        sum of the weights, which is a tensor of shape () where it is computed on a device.
    """
    if choose(Request.of(x, mask)).name in ("native", "triton"):
        return fused.statistics(calls_of(x), x, mask)
    moments = moments_in_blocks(x, mask)
    return moments.mean, moments.var, moments.count


def normalized_with_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return BN(x) with the biased statistics of the batch, without a graph for a backward pass.

    Args:
        x: Shape (N, C, *spatial); any float dtype and layout.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        eps: Added to the variance.

    Returns:
        y of the shape and dtype of `x`, and the mean and variance of shape (C,), float64.
    """
    if x.device.type == "cpu":
        ready = x.dtype in fused.DTYPES and native.unavailable() is None
        return (
            fused.forward(calls_of(x), x, weight, bias, None, eps)
            if ready
            else batch_norm_train(x, weight, bias, None, eps)
        )
    if choose(Request.of(x, None)).name == "triton":
        y, moments, _, _ = calls_of(x).train(dense(x), None, weight, bias, Form(by_batch=True, eps=eps))
        return y, moments[0], moments[1]
    return batch_norm_train(x, weight, bias, None, eps)
