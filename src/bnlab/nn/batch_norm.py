"""BatchNorm1d, BatchNorm2d and BatchNorm3d."""

from __future__ import annotations

from bnlab.nn.base import BatchNormBase

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm1d(BatchNormBase):
    """BN over (N, C) or (N, C, L). Replaces torch.nn.BatchNorm1d and takes the arguments of :class:`BatchNormBase`."""

    ranks = (2, 3)


class BatchNorm2d(BatchNormBase):
    """BN over (N, C, H, W). Replaces torch.nn.BatchNorm2d and takes the arguments of :class:`BatchNormBase`."""

    ranks = (4,)


class BatchNorm3d(BatchNormBase):
    """BN over (N, C, D, H, W). Replaces torch.nn.BatchNorm3d and takes the arguments of :class:`BatchNormBase`."""

    ranks = (5,)
