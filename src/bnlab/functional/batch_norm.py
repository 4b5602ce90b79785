"""`batch_norm` with the signature of torch's function, as an executable specification."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bnlab.errors import DtypeError, UsageError
from bnlab.functional.activations import Activation, activation_function
from bnlab.functional.moments import batch_moments, without_padding_garbage
from bnlab.functional.running import moving_average
from bnlab.functional.transform import normalize

__all__ = ["batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    mask: Tensor | None = None,
    nonfinite: Literal["skip", "propagate"] = "skip",
) -> Tensor:
    """Return activation(BN(input) + residual), computed in float64. Replaces torch's function of this name.

    In training mode, the function normalises with batch statistics and updates the running statistics in place, if they
    are passed: the mean with the batch mean, the variance with the unbiased batch variance. Otherwise it normalises
    with the running statistics, or with batch statistics if there are none.

    Args:
        input: Shape (N, C, *spatial); any float dtype and layout.
        running_mean: Shape (C,) or None.
        running_var: Shape (C,) or None.
        weight: gamma, shape (C,); 1 if None.
        bias: beta, shape (C,); 0 if None.
        training: Whether to normalise with the statistics of the batch.
        momentum: Weight of the new batch in the running statistics.
        eps: Added to the variance, squared input units.
        residual: The tensor that is added after the transform; shape of `input`.
        activation: The activation that is applied last.
        mask: Weight of every position in the statistics; broadcasts to (N, 1, *spatial). Every position is transformed.
        nonfinite: "skip": a batch with an inf or NaN does not update the running statistics. "propagate": it does, as
            in torch.

    Returns:
        Shape and dtype of `input`.

    Raises:
        UsageError: If the input has no channel dimension, an argument has the wrong shape, batch statistics would come
            from one value per channel, or there is no such activation.
        DtypeError: If the input is not floating point.

    Source:
        Ioffe and Szegedy 2015, Algorithms 1 and 2. The result equals that of torch.nn.functional.batch_norm, up to
        torch's rounding.

    Example:
        >>> batch_norm(torch.tensor([[1e5], [2e5]]), None, None, training=True).flatten()
        tensor([-1.,  1.])
    """
    function = activation_function(activation)
    _check(input, residual, {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var})
    x = input if mask is None else without_padding_garbage(input, mask)
    moments = None
    if training or running_mean is None or running_var is None:
        if input.numel() == input.size(1):
            raise UsageError(f"batch_norm: input must have more than 1 value per channel, got {tuple(input.shape)}.")
        moments = batch_moments(x, mask)
        y = normalize(x, moments.mean, moments.var, weight, bias, eps)
    else:
        y = normalize(x, running_mean, running_var, weight, bias, eps)
    y = y if residual is None else y + residual
    y = y if function is None else function(y)
    if training and moments is not None and running_mean is not None and running_var is not None:
        with torch.no_grad():
            finite = torch.isfinite(moments.mean).all() & torch.isfinite(moments.m2).all()
            counts = (moments.count >= 2) & (finite | (nonfinite == "propagate"))
            for running, new in ((running_mean, moments.mean), (running_var, moments.unbiased_var)):
                running.copy_(torch.where(counts, moving_average(running, new, momentum), running))
    return y


def _check(x: Tensor, residual: Tensor | None, per_channel: dict[str, Tensor | None]) -> None:
    if x.dim() < 2:
        raise UsageError(f"batch_norm: input must have the shape (N, C, *spatial), got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise DtypeError(f"batch_norm: input must be floating point, got {x.dtype}. Convert it: input.float().")
    if residual is not None and residual.shape != x.shape:
        raise UsageError(f"batch_norm: residual must have the shape {tuple(x.shape)}, got {tuple(residual.shape)}.")
    for name, values in per_channel.items():
        if values is not None and values.shape != (x.size(1),):
            raise UsageError(f"batch_norm: {name} must have the shape ({x.size(1)},), got {tuple(values.shape)}.")
