"""BatchRenorm1d, BatchRenorm2d and BatchRenorm3d, and the schedule of their limits."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from bnlab.errors import UsageError
from bnlab.functional.moments import per_channel
from bnlab.kernels import batch_norm_train, renorm_correction
from bnlab.nn.base import BatchNormBase
from bnlab.nn.layer_path import layer_path
from bnlab.nn.options import Options
from bnlab.nn.running_update import BatchStatistics, is_recomputation

__all__ = ["BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d", "RenormSchedule"]


_REMEMBERED = 64
"""Batches whose correction is kept for activation checkpointing, each of the size of a few vectors."""


class BatchRenorm(BatchNormBase):
    """Batch renormalization: BN whose train mode is corrected towards the running statistics.

        x_hat = (x - mu_B)/sigma_B * r + d,     y = gamma x_hat + beta
        r = clip(sigma_B/sigma, 1/r_max, r_max),     d = clip((mu_B - mu)/sigma, -d_max, d_max)

    with sigma_B = sqrt(var_B + eps), biased, and the moving mu and sigma before this batch. No gradient flows through r
    and d. Where nothing is clipped x_hat is (x - mu)/sigma: train mode does what eval mode does. With r_max = 1 and
    d_max = 0 it is BN.

    The moving averages are mu <- mu + a (mu_B - mu) and sigma <- sigma + a (sigma_B - sigma): of the standard
    deviation, not of the variance, and biased. The buffer is running_var = sigma^2 - eps, so that eval mode,
    gamma (x - mu)/sigma + beta, and the state dict are those of plain BN.

    Use it for batches that are small (2 to 16 samples) or not drawn at random, where the statistics of the batch are no
    good. Start with BN and let the limits grow (:class:`RenormSchedule`): while the running statistics are far off,
    large limits blow up. Do not expect it to repair batches of one value per channel, or data that train and test time
    do not share.

    Args:
        num_features: C, the size of dimension 1 of the input.
        r_max: Limit of r, at least 1; may be set at any time.
        d_max: Limit of d, at least 0; may be set at any time.
        options: As in :class:`BatchNormBase`, but the momentum is 0.01 unless given, as in the paper, and there must be
            running statistics.

    Raises:
        UsageError: If an argument is outside what it may be.

    Source:
        Ioffe 2017, "Batch Renormalization", Algorithm 1.
    """

    shown = {**BatchNormBase.shown, "r_max": None, "d_max": None}  # noqa: RUF012 - declared a ClassVar in the base
    renorm_limits: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        **options: Unpack[Options],
    ) -> None:
        if not options.get("track_running_stats", True):
            raise UsageError(f"{type(self).__name__}: track_running_stats must be True, got False.")
        options.setdefault("momentum", 0.01)
        super().__init__(num_features, **options)
        # a tensor: a float that a schedule changes would recompile a compiled model at every step
        self.register_buffer("renorm_limits", torch.ones(2, device=options.get("device")), persistent=False)
        self._limits = [r_max, d_max]
        self._fill_limits()
        self._recent: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_REMEMBERED)
        self.r_max = r_max
        self.d_max = d_max

    @property
    def r_max(self) -> float:
        """Limit of r = sigma_B/sigma and of 1/r."""
        return self._limits[0]

    @r_max.setter
    def r_max(self, value: float) -> None:
        if not value >= 1:
            raise UsageError(f"{type(self).__name__}: r_max must be >= 1, got {value}.")
        self._limits = [float(value), self._limits[1]]
        self.renorm_limits[0] = value

    @property
    def d_max(self) -> float:
        """Limit of abs(d), d = (mu_B - mu)/sigma."""
        return self._limits[1]

    @d_max.setter
    def d_max(self, value: float) -> None:
        if not value >= 0:
            raise UsageError(f"{type(self).__name__}: d_max must be >= 0, got {value}.")
        self._limits = [self._limits[0], float(value)]
        self.renorm_limits[1] = value

    def _fill_own_buffers(self) -> None:
        super()._fill_own_buffers()
        self._fill_limits()

    def _fill_limits(self) -> None:
        device = self._home()
        widest = torch.float32 if device.type == "mps" else torch.float64
        self.renorm_limits = torch.tensor(self._limits, dtype=widest, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Apply a conversion to all but the limits, which would be rounded."""
        super()._apply(fn, recurse)
        self._fill_limits()
        return self

    def _normalized_by_batch(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, list[BatchStatistics]]:
        if self.running_mean is None or self.running_var is None:
            return super()._normalized_by_batch(x, weights)
        dtype = torch.promote_types(x.dtype, torch.float32)
        x_hat, mean, var = batch_norm_train(x.to(dtype), None, None, weights, self.eps)
        r, d = self._correction(mean, var, self.running_mean, self.running_var)
        scale, shift = _composed(r, d, self.weight, self.bias)
        y = torch.addcmul(per_channel(shift.to(dtype), x), x_hat, per_channel(scale.to(dtype), x)).to(x.dtype)
        return y, [BatchStatistics.of(mean, var, x, weights)]

    def _correction(
        self, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return r and d: when activation checkpointing runs a batch again, those of the first time.

        By then the running statistics have moved. A batch is known again by its mean, bit by bit.
        """
        if is_recomputation():
            for known, r, d in reversed(self._recent):
                if torch.equal(known, mean):
                    return r, d
            raise UsageError(
                f"{layer_path(self)}: at most {_REMEMBERED} batches must be in flight between a forward pass and its "
                f"recomputation by activation checkpointing, got more. Keep the layer outside of the checkpoint."
            )
        r, d = renorm_correction(mean, var, running_mean, running_var, self.renorm_limits, self.eps)
        if not torch.compiler.is_compiling():
            self._recent.append((mean, r, d))
        return r, d

    def __getstate__(self) -> dict[str, object]:
        """Return what a copy or pickle keeps: all but the batches in flight."""
        return {**vars(self), "_recent": deque(maxlen=_REMEMBERED)}

    def _updated_var(self, running_var: Tensor, var: Tensor, bessel: float | Tensor) -> Tensor:  # noqa: ARG002
        std = self._moving_average((running_var.to(var.dtype) + self.eps).sqrt(), (var + self.eps).sqrt())
        largest = torch.finfo(running_var.dtype).max
        return (std.square() - self.eps).clamp(0, largest).to(running_var.dtype)


class BatchRenorm1d(BatchRenorm):
    """Batch renormalization over (N, C) or (N, C, L); see :class:`BatchRenorm`."""

    ranks = (2, 3)


class BatchRenorm2d(BatchRenorm):
    """Batch renormalization over (N, C, H, W); see :class:`BatchRenorm`."""

    ranks = (4,)


class BatchRenorm3d(BatchRenorm):
    """Batch renormalization over (N, C, D, H, W); see :class:`BatchRenorm`."""

    ranks = (5,)


@dataclass(frozen=True)
class RenormSchedule:
    """The limits of batch renormalization over the course of a training.

    Plain BN for `warmup` steps, then r_max grows linearly to `r_max` at step `r_end`, and d_max to `d_max` at `d_end`.
    The defaults are the paper's, for a training of 130,000 steps and more; scale them for a shorter one. The limits are
    no part of a state dict: call :meth:`apply` after resuming.

    Attributes:
        warmup: Steps of plain BN.
        r_max: Final limit of r.
        r_end: Step at which it is reached.
        d_max: Final limit of d.
        d_end: Step at which it is reached.

    Raises:
        UsageError: If an end comes before the warm-up does, or a limit is too small.

    Source:
        Ioffe 2017, section 4.1.

    Example:
        >>> RenormSchedule().limits(15_000)
        (1.5714285714285714, 2.5)
    """

    warmup: int = 5_000
    r_max: float = 3.0
    r_end: int = 40_000
    d_max: float = 5.0
    d_end: int = 25_000

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= min(self.r_end, self.d_end):
            ends = f"{self.warmup}, {self.r_end} and {self.d_end}"
            raise UsageError(f"RenormSchedule: warmup must be >= 0 and before r_end and d_end, got {ends}.")
        if not (1 <= self.r_max < math.inf and 0 <= self.d_max < math.inf):
            raise UsageError(f"RenormSchedule: limits must be >= 1 and >= 0, got {self.r_max} and {self.d_max}.")

    def limits(self, step: int) -> tuple[float, float]:
        """Return r_max and d_max at a step, counted from 0."""
        r = _ramp(step, self.warmup, self.r_end)
        return 1 + (self.r_max - 1) * r, self.d_max * _ramp(step, self.warmup, self.d_end)

    def apply(self, model: nn.Module, step: int) -> None:
        """Set the limits of every batch renormalization layer in a model: call it before each training step."""
        r_max, d_max = self.limits(step)
        for layer in model.modules():
            if isinstance(layer, BatchRenorm):
                layer.r_max, layer.d_max = r_max, d_max


def _composed(r: Tensor, d: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a and b of gamma (x r + d) + beta = a x + b."""
    scale, shift = (r, d) if weight is None else (r * weight, d * weight)
    return scale, shift if bias is None else shift + bias


def _ramp(step: int, start: int, end: int) -> float:
    return float(step >= end) if end == start else min(1.0, max(0.0, (step - start) / (end - start)))
