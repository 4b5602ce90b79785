"""Reference formulas of BN in numpy's longest float, independent of the code under test."""

from __future__ import annotations

import numpy as np
import torch


def _long(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def statistics(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the biased variance of each channel, in two passes."""
    values = np.moveaxis(_long(x), 1, 0).reshape(x.size(1), -1)
    mean = values.mean(1)
    return mean, ((values - mean[:, None]) ** 2).mean(1)


def batch_norm(x: torch.Tensor, weight=None, bias=None, eps: float = 1e-5) -> np.ndarray:
    """Return gamma (x - mu)/sqrt(var + eps) + beta."""
    mean, var = statistics(x)
    shape = (1, -1, *([1] * (x.dim() - 2)))
    y = (_long(x) - mean.reshape(shape)) / np.sqrt(var + eps).reshape(shape)
    if weight is not None:
        y = y * _long(weight).reshape(shape)
    return y if bias is None else y + _long(bias).reshape(shape)


def backward(grad: torch.Tensor, x: torch.Tensor, weight=None, eps: float = 1e-5) -> np.ndarray:
    """Return the gradient of x, step by step as in section 3 of Ioffe and Szegedy (2015, arXiv:1502.03167)."""
    dims = (0, *range(2, x.dim()))
    shape = (1, -1, *([1] * (x.dim() - 2)))
    values, dy = _long(x), _long(grad)
    m = values.size // x.size(1)
    mean, var = (part.reshape(shape) for part in statistics(x))
    dx_hat = dy if weight is None else dy * _long(weight).reshape(shape)
    dvar = (dx_hat * (values - mean) * -0.5 * (var + eps) ** -1.5).sum(dims, keepdims=True)
    dmean = (-dx_hat / np.sqrt(var + eps)).sum(dims, keepdims=True)
    dmean = dmean + dvar * (-2 * (values - mean)).sum(dims, keepdims=True) / m
    return dx_hat / np.sqrt(var + eps) + dvar * 2 * (values - mean) / m + dmean / m


def error_in_eps(y: torch.Tensor, expected: np.ndarray) -> float:
    """Return the largest error of `y` in units of eps(dtype) * max(1, max|y|)."""
    scale = torch.finfo(y.dtype).eps * max(1.0, float(np.abs(expected).max()))
    return float(np.abs(_long(y) - expected).max()) / scale


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}
"""Memory layouts for the same values."""
