"""BN layers: drop-in replacements for those of torch.nn, one variant a file."""

from bnlab.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
