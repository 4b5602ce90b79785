"""Computes the norm of the filter of each output channel of a convolution or linear layer."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from bnlab.observe.evidence import Floats

__all__ = ["filter_norms"]

_TRANSPOSED = nn.modules.conv._ConvTransposeNd  # noqa: SLF001 - the common base of all transposed convolutions


def filter_norms(module: nn.Module) -> Floats | None:
    """Return the Euclidean norm of the weights of each output channel, without the bias.

    An input whose values change by a vector of length 1 changes the output of a channel by this norm at most.

    Args:
        module: The layer. Its `weight` has the shape (out, in / groups, *kernel), or (in, out / groups, *kernel) for a
            transposed convolution.

    Returns:
        Shape (out,), output per input unit, float64; None for a weight that is no ordinary tensor, such as a quantised
        one.
    """
    weight: object = getattr(module, "weight", None)
    if type(weight) not in (Tensor, nn.Parameter) or not isinstance(weight, Tensor) or weight.is_meta:
        return None
    squares = weight.detach().double().square().flatten(2).sum(2) if weight.dim() > 2 else weight.detach().double() ** 2
    groups = int(getattr(module, "groups", 1))
    if isinstance(module, _TRANSPOSED):
        squares = squares.reshape(groups, -1, squares.size(1)).sum(1).flatten()
    else:
        squares = squares.sum(1)
    return np.asarray(squares.sqrt().cpu().numpy(), dtype=np.float64)
