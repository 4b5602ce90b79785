"""FrozenBatchNorm1d, FrozenBatchNorm2d and FrozenBatchNorm3d."""

from __future__ import annotations

from collections import deque
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from bnlab.errors import UsageError
from bnlab.kernels import Request, batch_norm_eval, batch_norm_train
from bnlab.kernels.compiled import copied
from bnlab.nn.base import BatchNormBase
from bnlab.nn.layer_path import layer_path
from bnlab.nn.options import Options
from bnlab.nn.running_update import BatchStatistics, is_recomputation

__all__ = ["FrozenBatchNorm1d", "FrozenBatchNorm2d", "FrozenBatchNorm3d"]

_REMEMBERED = 64
"""Batches whose statistics are kept for activation checkpointing, each of the size of a few vectors."""


class FrozenBatchNorm(BatchNormBase):
    """BN with running statistics in either mode: y = gamma (x - running_mean)/sqrt(running_var + eps) + beta.

    Nothing moves the buffers, and `.train()` on a parent changes nothing. weight and bias are parameters that require
    no gradient; nothing of the size of the input is then kept for the backward pass. `requires_grad_(True)` trains
    them all the same. With `moves_statistics` each batch in train mode moves the buffers after it was normalised.

    Use it to fine-tune with batches too small for good statistics (detection: 1 or 2 images per device), or on other
    data than the statistics are wanted for; and for the last epochs of a training with small batches (Wu and Johnson
    2021, figure 6: 32.5 to 25.2 % error at batch 2). Do not train from scratch with it: nothing keeps the activations
    in range (Ioffe and Szegedy 2015, section 2). Do not fold it into a convolution that is trained further: the
    learning rate means something else there.

    :func:`bnlab.freeze` turns the layers of a network into this, and :func:`bnlab.unfreeze` back. This class takes
    input of any rank: a SyncBatchNorm becomes it.

    Args:
        num_features: C, the size of dimension 1 of the input.
        moves_statistics: Whether train mode moves the running statistics. A batch is normalised with those before it.
        options: As in :class:`BatchNormBase`. Fresh statistics are 0 and 1: load a state dict.

    Source:
        Ioffe and Szegedy 2015, Algorithm 2; equals a torch layer in eval mode up to the rounding of the latter.
    """

    ranks: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)
    shown = {**BatchNormBase.shown, "moves_statistics": False}  # noqa: RUF012 - declared a ClassVar in the base

    def __init__(self, num_features: int, *, moves_statistics: bool = False, **options: Unpack[Options]) -> None:
        super().__init__(num_features, **options)
        self.moves_statistics = moves_statistics
        self._recent: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_REMEMBERED)
        self.requires_grad_(False)

    def _normalizes_by_batch(self) -> bool:
        """Whether the statistics of the batch are looked at: to move the running ones, not to normalise."""
        return self.training and self.moves_statistics and self.track_running_stats

    def _request(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Request:
        """Return what a call asks of the kernels: statistics of the batch that only move others do not normalise."""
        request = super()._request(x, residual, mask)
        withheld = self.running_mean is None or self.running_var is None
        return request if withheld or not self._normalizes_by_batch() else request._replace(statistics="running")

    def _normalized_by_batch(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, list[BatchStatistics]]:
        if self.running_mean is None or self.running_var is None:
            return super()._normalized_by_batch(x, weights)
        _, mean, var = batch_norm_train(x.detach(), None, None, weights, self.eps)
        before = self._statistics_before(mean, self.running_mean, self.running_var)
        y = batch_norm_eval(x, *before, self.weight, self.bias, self.eps)
        return y, [BatchStatistics.of(mean, var, x, weights)]

    def _statistics_before(self, mean: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
        """Return the running statistics: when activation checkpointing runs a batch again, those of the first time.

        By then they have moved. A batch is known again by its mean, bit by bit.
        """
        if is_recomputation():
            for known, old_mean, old_var in reversed(self._recent):
                if torch.equal(known, mean):
                    return old_mean, old_var
            raise UsageError(
                f"{layer_path(self)}: at most {_REMEMBERED} batches must be in flight between a forward pass and its "
                f"recomputation by activation checkpointing, got more. Keep the layer outside of the checkpoint."
            )
        if torch.compiler.is_compiling():
            # a clone would be made again in the backward pass, of what the forward pass has moved meanwhile
            return copied(running_mean), copied(running_var)
        old_mean, old_var = running_mean.clone(), running_var.clone()
        self._recent.append((mean, old_mean, old_var))
        return old_mean, old_var

    def _check_batch(self, x: Tensor) -> None:
        """Check what only normalising with the batch needs, where that is done."""
        withheld = self.running_mean is None or self.running_var is None
        if withheld or (x.numel() != self.num_features and self.eps > 0):
            super()._check_batch(x)

    def _update(self, batch: BatchStatistics) -> None:
        """Do nothing unless asked to, nor where the running statistics are withheld and those of the batch stand in."""
        if self.moves_statistics and self.running_mean is not None and self.running_var is not None:
            super()._update(batch)

    def __getstate__(self) -> dict[str, object]:
        """Return what a copy or pickle keeps: all but the batches in flight."""
        return {**vars(self), "_recent": deque(maxlen=_REMEMBERED)}


class FrozenBatchNorm1d(FrozenBatchNorm):
    """Frozen BN over (N, C) or (N, C, L); see :class:`FrozenBatchNorm`."""

    ranks = (2, 3)


class FrozenBatchNorm2d(FrozenBatchNorm):
    """Frozen BN over (N, C, H, W); see :class:`FrozenBatchNorm`."""

    ranks = (4,)


class FrozenBatchNorm3d(FrozenBatchNorm):
    """Frozen BN over (N, C, D, H, W); see :class:`FrozenBatchNorm`."""

    ranks = (5,)
