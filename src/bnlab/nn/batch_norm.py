"""BatchNorm1d, BatchNorm2d and BatchNorm3d."""

from __future__ import annotations

from bnlab.nn.base import BatchNormBase

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm1d(BatchNormBase):
    """BN over (N, C) or (N, C, L); arguments as in :class:`BatchNormBase`, a drop-in for torch.nn.BatchNorm1d."""

    ranks = (2, 3)


class BatchNorm2d(BatchNormBase):
    """BN over (N, C, H, W); arguments as in :class:`BatchNormBase`, a drop-in for torch.nn.BatchNorm2d."""

    ranks = (4,)


class BatchNorm3d(BatchNormBase):
    """BN over (N, C, D, H, W); arguments as in :class:`BatchNormBase`, a drop-in for torch.nn.BatchNorm3d."""

    ranks = (5,)
