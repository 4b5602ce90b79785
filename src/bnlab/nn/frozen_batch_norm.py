"""FrozenBatchNorm1d, FrozenBatchNorm2d and FrozenBatchNorm3d."""

from __future__ import annotations

from typing_extensions import Unpack

from bnlab.nn._base import BatchNormBase, BatchStatistics, Options

__all__ = ["FrozenBatchNorm1d", "FrozenBatchNorm2d", "FrozenBatchNorm3d"]


class FrozenBatchNorm(BatchNormBase):
    """BN with running statistics in either mode: y = gamma (x - running_mean)/sqrt(running_var + eps) + beta.

    Nothing moves the buffers, and `.train()` on a parent changes nothing. weight and bias are parameters that require
    no gradient; nothing of the size of the input is then kept for the backward pass. `requires_grad_(True)` trains
    them all the same.

    Use it to fine-tune with batches too small for good statistics (detection: 1 or 2 images per device), or on other
    data than the statistics are wanted for; and for the last epochs of a training with small batches (Wu and Johnson
    2021, figure 6: 32.5 to 25.2 % error at batch 2). Do not train from scratch with it: nothing keeps the activations
    in range (Ioffe and Szegedy 2015, section 2). Do not fold it into a convolution that is trained further: the
    learning rate means something else there.

    Args:
        num_features: C, the size of dimension 1 of the input.
        options: As in :class:`BatchNormBase`. Fresh statistics are 0 and 1: load a state dict.

    Source:
        Ioffe and Szegedy 2015, Algorithm 2; equals a torch layer in eval mode up to the rounding of the latter.
    """

    def __init__(self, num_features: int, **options: Unpack[Options]) -> None:
        super().__init__(num_features, **options)
        self.requires_grad_(False)

    def _normalizes_by_batch(self) -> bool:
        return False

    def _update(self, batch: BatchStatistics) -> None:
        """Do nothing, also where the running statistics are withheld and those of the batch stand in."""


class FrozenBatchNorm1d(FrozenBatchNorm):
    """Frozen BN over (N, C) or (N, C, L); see :class:`FrozenBatchNorm`."""

    ranks = (2, 3)


class FrozenBatchNorm2d(FrozenBatchNorm):
    """Frozen BN over (N, C, H, W); see :class:`FrozenBatchNorm`."""

    ranks = (4,)


class FrozenBatchNorm3d(FrozenBatchNorm):
    """Frozen BN over (N, C, D, H, W); see :class:`FrozenBatchNorm`."""

    ranks = (5,)
