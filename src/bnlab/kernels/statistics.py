"""The statistics of a batch on the fastest exact kernel of its device, alone or beside the normalised batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bnlab.functional.moments import moments_in_blocks
from bnlab.kernels import native
from bnlab.kernels.compiled import batch_norm_train
from bnlab.kernels.dispatch import choose
from bnlab.kernels.native.calls import Form
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
    name = choose(Request.of(x, mask)).name
    if name == "native":
        return native.statistics(x, mask)
    if name == "triton":
        from bnlab.kernels.backends import triton  # type: ignore[attr-defined,unused-ignore]

        of_kernel: tuple[Tensor, Tensor, Tensor] = triton.statistics(x, mask)  # type: ignore[attr-defined,unused-ignore]
        return of_kernel
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
        ready = x.dtype in native.DTYPES and native.unavailable() is None
        return native.forward(x, weight, bias, None, eps) if ready else batch_norm_train(x, weight, bias, None, eps)
    if choose(Request.of(x, None)).name == "triton":
        from bnlab.kernels.backends.triton import calls  # type: ignore[import-not-found,attr-defined,unused-ignore]

        form: Any = Form(by_batch=True, eps=eps)
        y, moments, _, _ = calls.train(native.dense(x), None, weight, bias, form)
        return y, moments[0], moments[1]
    return batch_norm_train(x, weight, bias, None, eps)
