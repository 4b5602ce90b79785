"""`batch_norm` with the signature of torch's, as an executable specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.errors import UsageError
from bnlab.functional.moments import batch_moments
from bnlab.functional.running import moving_average
from bnlab.functional.transform import normalize

__all__ = ["ACTIVATIONS", "Activation", "activation_function", "batch_norm"]

Activation = Literal["relu", "leaky_relu", "elu", "silu", "gelu", "hardswish", "sigmoid", "tanh"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""What may follow the transform, each with torch's default parameters."""


def activation_function(name: str | None) -> Callable[[Tensor], Tensor] | None:
    """Return the function of this name.

    Raises:
        UsageError: If there is none.
    """
    if name is None:
        return None
    if name not in ACTIVATIONS:
        raise UsageError(f"activation: name must be one of {', '.join(ACTIVATIONS)} or None, got {name!r}.")
    return ACTIVATIONS[name]


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
    """Return activation(BN(input) + residual), computed in float64; a drop-in for torch's function of this name.

    In training mode the statistics of the batch normalise and the running statistics, where given, are updated in
    place: the mean by that of the batch, the variance by its unbiased variance. Otherwise the running statistics
    normalise, or those of the batch where there are none.

    Args:
        input: Shape (N, C, *spatial); any float dtype and layout.
        running_mean: Shape (C,) or None.
        running_var: Shape (C,) or None.
        weight: gamma, shape (C,); 1 if None.
        bias: beta, shape (C,); 0 if None.
        training: Whether to normalise with the statistics of the batch.
        momentum: Weight of the new batch in the running statistics.
        eps: Added to the variance, squared input units.
        residual: Added behind the transform; shape of `input`.
        activation: Applied last.
        mask: Weight of every position in the statistics; broadcasts to (N, 1, *spatial). Every position is transformed.
        nonfinite: "skip": a batch with an inf or NaN does not reach the running statistics. "propagate": as torch.

    Returns:
        Shape and dtype of `input`.

    Raises:
        UsageError: If the input has no channel dimension, or there is no such activation.

    Source:
        Ioffe and Szegedy 2015, Algorithms 1 and 2; equals torch.nn.functional.batch_norm up to the rounding of the
        latter.

    Example:
        >>> batch_norm(torch.tensor([[1e5], [2e5]]), None, None, training=True).flatten()
        tensor([-1.,  1.])
    """
    if input.dim() < 2:
        raise UsageError(f"batch_norm: input must have the shape (N, C, *spatial), got {tuple(input.shape)}.")
    if training or running_mean is None or running_var is None:
        moments = batch_moments(input, mask)
        y = normalize(input, moments.mean, moments.var, weight, bias, eps)
        if training and running_mean is not None and running_var is not None:
            with torch.no_grad():
                finite = torch.isfinite(moments.mean).all() & torch.isfinite(moments.m2).all()
                counts = (moments.count >= 2) & (finite | (nonfinite == "propagate"))
                for running, new in ((running_mean, moments.mean), (running_var, moments.unbiased_var)):
                    running.copy_(torch.where(counts, moving_average(running, new, momentum), running))
    else:
        y = normalize(input, running_mean, running_var, weight, bias, eps)
    y = y if residual is None else y + residual
    function = activation_function(activation)
    return y if function is None else function(y)
