"""GhostBatchNorm1d, GhostBatchNorm2d and GhostBatchNorm3d."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from bnlab.errors import UsageError
from bnlab.nn.base import BatchNormBase
from bnlab.nn.input_check import refusal
from bnlab.nn.options import Options
from bnlab.nn.running_update import BatchStatistics

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]


class GhostBatchNorm(BatchNormBase):
    """BN that normalises a large batch as several small, *virtual* ones.

    The layer splits the N samples of a batch, in order, into K = max(1, N // ghost_size) parts whose sizes differ by at
    most one. No part is smaller than `ghost_size` unless the whole batch is. Train mode normalises each part with its
    own statistics, and the parts update the running statistics one after the other:

        mu <- (1-a)^K mu + sum_i a (1-a)^(K-i) mu_i

    `num_batches_tracked` counts parts. Eval mode is that of plain BN.

    Use this layer to keep the regularising noise of small batches when you train with large ones. It also undoes the
    leakage of batches that were put together by class or by video, if each part holds one sample of each. Do not use
    it where batches are small already, or to save memory: it saves none.

    Args:
        num_features: C, the size of dimension 1 of the input.
        ghost_size: Samples per virtual batch, at least 1; 32 to 128 is usual.
        options: As in :class:`BatchNormBase`. A momentum that was chosen for plain BN forgets K times as fast here.
            Use the momentum of a training run with the small batch size.

    Raises:
        UsageError: If an argument has a value that is not allowed, or, in forward, if a part has one value per channel.

    Source:
        Hoffer, Hubara and Soudry 2017, "Train longer, generalize better", Algorithm 1.
    """

    shown = {**BatchNormBase.shown, "ghost_size": None}  # noqa: RUF012 - declared a ClassVar in the base

    def __init__(self, num_features: int, *, ghost_size: int = 32, **options: Unpack[Options]) -> None:
        if type(ghost_size) is not int or ghost_size < 1:
            raise UsageError(f"{type(self).__name__}: ghost_size must be an integer >= 1, got {ghost_size!r}.")
        super().__init__(num_features, **options)
        self.ghost_size = ghost_size

    def _normalized_by_batch(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, list[BatchStatistics]]:
        normalized = super()._normalized_by_batch
        parts = self._parts(x)
        if parts == 1:
            return normalized(x, weights)
        masks = [None] * parts if weights is None else weights.tensor_split(parts)
        results = [normalized(part, mask) for part, mask in zip(x.tensor_split(parts), masks, strict=True)]
        return torch.cat([y for y, _ in results]), [batch for _, batches in results for batch in batches]

    def _check_batch(self, x: Tensor) -> None:
        super()._check_batch(x)
        if self.ghost_size == 1 and x.size(0) > 1 and x[0, 0].numel() == 1:
            raise refusal(
                self,
                "ghost_size",
                "leave more than 1 value per channel in each virtual batch",
                f"{self.ghost_size} for an input of shape {tuple(x.shape)}",
                "Use a larger one.",
            )

    def _parts(self, x: Tensor) -> int:
        return max(1, x.size(0) // self.ghost_size)


class GhostBatchNorm1d(GhostBatchNorm):
    """Ghost BN over (N, C) or (N, C, L); see :class:`GhostBatchNorm`."""

    ranks = (2, 3)


class GhostBatchNorm2d(GhostBatchNorm):
    """Ghost BN over (N, C, H, W); see :class:`GhostBatchNorm`."""

    ranks = (4,)


class GhostBatchNorm3d(GhostBatchNorm):
    """Ghost BN over (N, C, D, H, W); see :class:`GhostBatchNorm`."""

    ranks = (5,)
