"""Samples the statistics of batches, to see whether the running statistics follow them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.conventions import noise_of_average
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
    def add(self, step: int, layer: _BatchNorm, x: Tensor, use: Callable[[Sample], None], *, is_fresh: bool) -> None:
        """Take the statistics of a batch, right after the forward pass that updated the layer.

        Args:
            step: Number of steps before.
            layer: The layer.
            x: Its input.
            use: Called with the sample, where this batch is the second one of a pair.
            is_fresh: Whether the running statistics began at 0 and 1 when the counter was 0, so that these values can
                be taken out of them.
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
        bessel = count / (count - 1)
        left = _share_left(layer, is_fresh, mean, updates=1 if momentum else 0)
        # What the running statistics were before the update, without the share of their initial values.
        old_mean = (running_mean.to(mean.dtype) - momentum * mean) / (1 - momentum) / (1 - left)
        old_var = ((running_var.to(mean.dtype) - momentum * var * bessel) / (1 - momentum) - left) / (1 - left)
        logs = [_log_std(one, layer.eps) for one in (var * bessel, previous[2] * bessel, old_var)]
        scale = (2 * logs[0]).exp()
        values = (
            ((mean - previous[1]) ** 2 / scale).mean() / 2,
            ((mean - old_mean) ** 2 / scale).mean(),
            ((logs[0] - logs[1]) ** 2).mean() / 2,
            ((logs[0] - logs[2]) ** 2).mean(),
            running_mean.to(mean.dtype).square().mean().sqrt(),
            running_var.to(mean.dtype).mean(),
            _running_noise(layer, left, mean),
        )
        self._pending.add([torch.stack(values)], lambda tensors: use(_sample(step, tensors[0], updated)))


def _log_std(var: Tensor, eps: float) -> Tensor:
    """Return ln(var + eps)/2."""
    return (var.clamp(min=0) + eps).clamp(min=torch.finfo(var.dtype).tiny).log() / 2


def _momentum(layer: _BatchNorm) -> float:
    """Return the weight of the latest batch in the running statistics, below 1; 0 for a cumulative average."""
    return 0.0 if layer.momentum is None else min(layer.momentum, 0.99)


def _share_left(layer: _BatchNorm, is_fresh: bool, like: Tensor, *, updates: int) -> Tensor:
    """Return the weight of the initial values before the latest updates, (1 - a)^k; 0 where it is not known."""
    counter = layer.num_batches_tracked
    if not is_fresh or counter is None or not layer.momentum:
        return like.new_zeros(())
    return (1 - _momentum(layer)) ** (counter.to(like.dtype) - updates).clamp(min=1)


def _running_noise(layer: _BatchNorm, left: Tensor, like: Tensor) -> Tensor:
    """Return the variance of the running statistics before the latest update, in units of the noise of a batch.

    It is the sum of the squared weights of the batches: a/(2 - a) (1 + r)/(1 - r) for a moving average without the
    share r of its initial values, and 1/k for a cumulative one of k batches.
    """
    if layer.momentum is not None:
        return noise_of_average(_momentum(layer)) * (1 + left) / (1 - left)
    counter = layer.num_batches_tracked
    return like.new_zeros(()) if counter is None else 1 / (counter.to(like.dtype) - 1).clamp(min=1)


def _sample(step: int, values: Tensor, updated: bool) -> Sample:
    noise, lag, log_noise, log_lag, mean, var, running_noise = values.tolist()
    return Sample(
        step=step,
        noise=noise,
        lag=lag,
        log_noise=log_noise,
        log_lag=log_lag,
        running_mean=mean,
        running_var=var,
        updated=updated,
        running_noise=running_noise,
    )
