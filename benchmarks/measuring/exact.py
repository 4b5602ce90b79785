"""The exact output of BN in train mode, and the distance of another output from it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LIMIT", "RATIOS", "error", "exact", "shifted"]

RATIOS = (0.0, 1e2, 1e4, 1e6)
"""Means of an input, in standard deviations."""

LIMIT = 4.0
"""The largest error of bnlab, for means up to 1e4 standard deviations."""


def shifted(shape: tuple[int, ...], dtype: torch.dtype, ratio: float) -> Tensor:
    """Return a random input with a standard deviation of 1 and a mean of `ratio`, rounded to a dtype."""
    generator = torch.Generator().manual_seed(0)
    return (ratio + torch.randn(shape, generator=generator)).to(dtype)


def exact(x: Tensor) -> NDArray[np.longdouble]:
    """Return (x - mean)/sqrt(var + eps) for x of the shape (N, C, H, W), computed in two passes."""
    values = x.double().numpy().astype(np.longdouble)
    mean = values.mean((0, 2, 3), keepdims=True)
    var = ((values - mean) ** 2).mean((0, 2, 3), keepdims=True)
    normalised: NDArray[np.longdouble] = (values - mean) / np.sqrt(var + 1e-5)
    return normalised


def error(y: Tensor, expected: NDArray[np.longdouble]) -> float:
    """Return the largest error in eps(dtype) * max(1, max|y|)."""
    scale = torch.finfo(y.dtype).eps * max(1.0, float(np.abs(expected).max()))
    return float(np.abs(y.double().numpy() - expected).max()) / scale
