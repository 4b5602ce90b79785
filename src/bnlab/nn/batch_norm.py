"""BatchNorm1d, BatchNorm2d and BatchNorm3d.

They derive from torch's layers of the same names, because many tools look for BN with `isinstance`. The variants derive
only from torch's common base class: what a tool does to plain BN by that test would be wrong for them.
"""

from __future__ import annotations

from torch import nn

from bnlab.nn.base import BatchNormBase

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm1d(BatchNormBase, nn.BatchNorm1d):
    """BN over (N, C) or (N, C, L). Replaces torch.nn.BatchNorm1d and takes the arguments of :class:`BatchNormBase`."""

    ranks = (2, 3)


class BatchNorm2d(BatchNormBase, nn.BatchNorm2d):
    """BN over (N, C, H, W). Replaces torch.nn.BatchNorm2d and takes the arguments of :class:`BatchNormBase`."""

    ranks = (4,)


class BatchNorm3d(BatchNormBase, nn.BatchNorm3d):
    """BN over (N, C, D, H, W). Replaces torch.nn.BatchNorm3d and takes the arguments of :class:`BatchNormBase`."""

    ranks = (5,)
