"""Samples the statistics of batches, to see whether the running statistics follow them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.kernels.statistics import batch_statistics
from bnlab.observe.training_run import Sample
from bnlab.observe.transfers import Pending
from bnlab.watching.once_per_step import is_deferred

__all__ = ["Sampler", "is_sampled"]


def is_sampled(step: int, every: int) -> bool:
    """Return whether the batch of a step is sampled: two consecutive ones of every `every` steps."""
    return step % every <= 1 or every == 1


class Sampler:
    """Samples pairs of consecutive batches of one layer.

    Their difference shows the noise of a batch, and the distance of the second one from the running statistics shows
    how far these lag behind. Everything is computed on the device of the layer, and nothing waits for it.

    Args:
        pending: Takes the results, which the host reads later where they are on a device.
    """

    def __init__(self, pending: Pending) -> None:
        self._pending = pending
        self._previous: tuple[int, Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, step: int, layer: _BatchNorm, x: Tensor, use: Callable[[Sample], None]) -> None:
        """Take the statistics of a batch, right after the forward pass that updated the layer.

        Args:
            step: Number of steps before.
            layer: The layer.
            x: Its input.
            use: Called with the sample, where this batch is the second one of a pair.
        """
        mean, var, _ = batch_statistics(x.detach())
        previous, self._previous = self._previous, (step, mean, var)
        running_mean, running_var = layer.running_mean, layer.running_var
        if previous is None or previous[0] != step - 1 or running_mean is None or running_var is None:
            return
        count = x.numel() // x.size(1)
        if count < 2:
            return
        updated = layer.training
        momentum = _momentum(layer) if updated and not is_deferred(layer) else 0.0
        scale = (var * (count / (count - 1)) + layer.eps).clamp(min=torch.finfo(mean.dtype).tiny)
        old_mean = running_mean.to(mean.dtype)
        old_var = running_var.to(mean.dtype).clamp(min=0) + layer.eps
        behind = (mean - old_mean) / (1 - momentum)  # the update has taken a share of the distance away
        log_behind = (scale.log() - old_var.log()) / (2 * (1 - momentum))
        before = (previous[2] * (count / (count - 1)) + layer.eps).clamp(min=torch.finfo(mean.dtype).tiny)
        values = (
            ((mean - previous[1]) ** 2 / scale).mean() / 2,
            (behind**2 / scale).mean(),
            (((scale.log() - before.log()) / 2) ** 2).mean() / 2,
            (log_behind**2).mean(),
            running_mean.to(mean.dtype).square().mean().sqrt(),
            running_var.to(mean.dtype).mean(),
        )
        self._pending.add([torch.stack(values)], lambda tensors: use(_sample(step, tensors[0], updated)))


def _momentum(layer: _BatchNorm) -> float:
    """Return the weight of the latest batch in the running statistics, below 1; 0 for a cumulative average."""
    return 0.0 if layer.momentum is None else min(layer.momentum, 0.99)


def _sample(step: int, values: Tensor, updated: bool) -> Sample:
    noise, lag, log_noise, log_lag, mean, var = values.tolist()
    return Sample(
        step=step,
        noise=noise,
        lag=lag,
        log_noise=log_noise,
        log_lag=log_lag,
        running_mean=mean,
        running_var=var,
        updated=updated,
    )
