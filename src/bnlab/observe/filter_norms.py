"""Groups the weights of a convolution or linear layer by output channel, and computes the norm of each filter."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from bnlab.observe.evidence import Floats

__all__ = ["FILTERING", "filter_norms", "links_by_output"]

FILTERING = (nn.Linear, nn.modules.conv._ConvNd)  # noqa: SLF001 - the common base of all convolutions
"""Classes of the layers that compute each output channel with a filter of its own."""

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
    squares = weight.detach().double().square()
    links = links_by_output(module, squares.flatten(2).sum(2) if squares.dim() > 2 else squares)
    return np.asarray(np.sqrt(links.sum(2)).reshape(-1), dtype=np.float64)


def links_by_output(module: nn.Module, links: Tensor) -> NDArray[Any]:
    """Return one value for each link between an input channel and an output channel, ordered by output channel.

    Args:
        module: A convolution or linear layer.
        links: A value for each link, in the order of the first two axes of `module.weight`.

    Returns:
        Shape (groups, out / groups, in / groups).
    """
    grouped: NDArray[Any] = links.reshape(int(getattr(module, "groups", 1)), -1, links.size(1)).cpu().numpy()
    return grouped.swapaxes(1, 2) if isinstance(module, _TRANSPOSED) else grouped
