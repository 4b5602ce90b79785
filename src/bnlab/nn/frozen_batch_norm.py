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

_MAX_IN_FLIGHT = 64
"""Number of batches whose statistics are kept for activation checkpointing. Each is a few vectors in size."""


class FrozenBatchNorm(BatchNormBase):
    """BN with running statistics in either mode: y = gamma (x - running_mean)/sqrt(running_var + eps) + beta.

    Forward passes do not change the buffers, and `.train()` on a parent module changes nothing. weight and bias are
    parameters that require no gradient, and the backward pass then needs no tensor of the size of the input. Call
    `requires_grad_(True)` to train them. With `moves_statistics`, each batch in train mode updates the buffers after
    the layer has normalised it.

    Use this layer to fine-tune with batches that are too small for good statistics (detection: 1 or 2 images per
    device), or on data that should not change the statistics. Use it also for the last epochs of a training run with
    small batches (Wu and Johnson 2021, figure 6: the error falls from 32.5 to 25.2 % at batch size 2). Do not train
    from scratch with it: nothing keeps the activations in range (Ioffe and Szegedy 2015, section 2). Do not fold it
    into a convolution that is trained further, because the fold changes the effect of the learning rate.

    :func:`bnlab.freeze` replaces the layers of a network by this one, and :func:`bnlab.unfreeze` restores them. This
    class takes input of any rank. `bnlab.freeze` puts it in the place of a SyncBatchNorm.

    Args:
        num_features: C, the size of dimension 1 of the input.
        moves_statistics: Whether train mode updates the running statistics. A batch is normalised before its update.
        options: As in :class:`BatchNormBase`. The initial statistics are 0 and 1: load a state dict.

    Source:
        Ioffe and Szegedy 2015, Algorithm 2. The outputs equal those of a torch layer in eval mode, up to its rounding.
    """

    ranks: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)
    shown = {**BatchNormBase.shown, "moves_statistics": False}  # noqa: RUF012 - declared a ClassVar in the base

    def __init__(self, num_features: int, *, moves_statistics: bool = False, **options: Unpack[Options]) -> None:
        super().__init__(num_features, **options)
        self.moves_statistics = moves_statistics
        self._recent: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_MAX_IN_FLIGHT)
        self.requires_grad_(False)

    def _normalizes_by_batch(self) -> bool:
        """Whether the layer computes batch statistics. They update the running ones and do not normalise."""
        return self.training and self.moves_statistics and self.track_running_stats

    def _request(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Request:
        """Return the request to the kernels: running statistics normalise, unless the layer has none."""
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
        """Return the running statistics, or those of the first pass when checkpointing recomputes a batch.

        The buffers have changed since then. The layer recognises a batch by the exact bits of its mean.
        """
        if is_recomputation():
            for recorded_mean, old_mean, old_var in reversed(self._recent):
                if torch.equal(recorded_mean, mean):
                    return old_mean, old_var
            raise UsageError(
                f"{layer_path(self)}: at most {_MAX_IN_FLIGHT} batches must be in flight between a forward pass and "
                f"its recomputation by activation checkpointing, got more. Keep the layer outside of the checkpoint."
            )
        if torch.compiler.is_compiling():
            # A compiler would recompute a clone in the backward pass, after the forward pass has changed the buffers.
            return copied(running_mean), copied(running_var)
        old_mean, old_var = running_mean.clone(), running_var.clone()
        self._recent.append((mean, old_mean, old_var))
        return old_mean, old_var

    def _check_batch(self, x: Tensor) -> None:
        """Check the requirements of batch statistics where the layer normalises with them."""
        withheld = self.running_mean is None or self.running_var is None
        if withheld or (x.numel() != self.num_features and self.eps > 0):
            super()._check_batch(x)

    def _update(self, batch: BatchStatistics) -> None:
        """Update the running statistics where the layer has them and `moves_statistics` is set."""
        if self.moves_statistics and self.running_mean is not None and self.running_var is not None:
            super()._update(batch)

    def __getstate__(self) -> dict[str, object]:
        """Return the state of a copy or pickle: everything except the batches in flight."""
        return {**vars(self), "_recent": deque(maxlen=_MAX_IN_FLIGHT)}


class FrozenBatchNorm1d(FrozenBatchNorm):
    """Frozen BN over (N, C) or (N, C, L); see :class:`FrozenBatchNorm`."""

    ranks = (2, 3)


class FrozenBatchNorm2d(FrozenBatchNorm):
    """Frozen BN over (N, C, H, W); see :class:`FrozenBatchNorm`."""

    ranks = (4,)


class FrozenBatchNorm3d(FrozenBatchNorm):
    """Frozen BN over (N, C, D, H, W); see :class:`FrozenBatchNorm`."""

    ranks = (5,)
