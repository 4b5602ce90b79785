"""BN layers that replace those of torch.nn without other changes. Each variant has a file of its own."""

from bnlab.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnlab.nn.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, RenormSchedule
from bnlab.nn.frozen_batch_norm import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from bnlab.nn.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "RenormSchedule",
]
