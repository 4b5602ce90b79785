"""The BN transform and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from bnlab.functional.moments import Moments, batch_moments, channel_sum, per_channel, position_weights, widened

__all__ = ["batch_norm_backward", "normalize"]


def normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return gamma (x - mean)/sqrt(var + eps) + beta, computed in float64 and rounded once.

    With batch statistics this is the forward pass of Algorithm 1. With population or running statistics it is the
    inference of Algorithm 2.

    Args:
        x: Activations. Shape (N, C, *spatial); any float dtype.
        mean: Shape (C,).
        var: Shape (C,); biased for batch statistics.
        weight: gamma, shape (C,); 1 if None.
        bias: beta, shape (C,); 0 if None.
        eps: Added to the variance, squared input units.

    Returns:
        y: Shape and dtype of `x`.

    Source:
        Ioffe and Szegedy 2015, Algorithms 1 and 2.
    """
    x_hat = (widened(x) - per_channel(widened(mean), x)) * per_channel((widened(var) + eps).rsqrt(), x)
    if weight is not None:
        x_hat = x_hat * per_channel(widened(weight), x)
    if bias is not None:
        x_hat = x_hat + per_channel(widened(bias), x)
    return x_hat.to(x.dtype)


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    mask: Tensor | None = None,
    moments: Moments | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the transform with batch statistics in closed form.

    dx_i = gamma r (dy_i - w_i/W (sum_j dy_j + x_hat_i sum_j dy_j x_hat_j)) with r = 1/sqrt(var + eps), weights w_i of
    sum W (all 1 without a mask), dgamma = sum dy_j x_hat_j, dbeta = sum dy_j.

    The operations are differentiable, and differentiating them gives the second derivative. For that, do not pass
    `moments`: they depend on `x`.

    Args:
        grad: dL/dy. Shape of `x`.
        x: Input of the forward pass. Shape (N, C, *spatial).
        weight: gamma, shape (C,); 1 if None.
        eps: As in the forward pass.
        mask: As in the forward pass; broadcasts to (N, 1, *spatial).
        moments: The moments of the forward pass, to avoid computing them again.

    Returns:
        dx: Shape and dtype of `x`.
        dgamma: Shape (C,), float64.
        dbeta: Shape (C,), float64.

    Source:
        Ioffe and Szegedy 2015, section 3, after substitution of dmu and dsigma^2.
    """
    moments = batch_moments(x, mask) if moments is None else moments
    dy, values = widened(grad), widened(x)
    share: Tensor = 1 / moments.count.clamp(min=1)
    if mask is not None:
        share = position_weights(mask, x) / torch.where(moments.count > 0, moments.count, 1)
    inv_std = (moments.var + eps).rsqrt()
    x_hat = (values - per_channel(moments.mean, x)) * per_channel(inv_std, x)
    dbeta, dgamma = channel_sum(dy), channel_sum(dy * x_hat)
    dx = dy - share * (per_channel(dbeta, x) + x_hat * per_channel(dgamma, x))
    scale = inv_std if weight is None else inv_std * widened(weight)
    return (dx * per_channel(scale, x)).to(x.dtype), dgamma, dbeta
