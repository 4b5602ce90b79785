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
from bnlab.functional.moments import arithmetic_dtype, per_channel
from bnlab.kernels import batch_norm_train, renorm_correction
from bnlab.nn.base import BatchNormBase
from bnlab.nn.layer_path import layer_path
from bnlab.nn.options import Options
from bnlab.nn.running_update import BatchStatistics, is_recomputation

__all__ = ["BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d", "RenormSchedule"]


_MAX_IN_FLIGHT = 64
"""Number of batches whose correction is kept for activation checkpointing. Each is a few vectors in size."""


class BatchRenorm(BatchNormBase):
    """Batch renormalization: BN with a correction in train mode towards the running statistics.

        x_hat = (x - mu_B)/sigma_B * r + d,     y = gamma x_hat + beta
        r = clip(sigma_B/sigma, 1/r_max, r_max),     d = clip((mu_B - mu)/sigma, -d_max, d_max)

    Here sigma_B = sqrt(var_B + eps) is biased, and mu and sigma are the moving averages before this batch. No gradient
    flows through r and d. Where nothing is clipped, x_hat is (x - mu)/sigma, and train mode equals eval mode. With
    r_max = 1 and d_max = 0 the layer is plain BN.

    The moving averages are mu <- mu + a (mu_B - mu) and sigma <- sigma + a (sigma_B - sigma). The second one averages
    the biased standard deviation, not the variance. The buffer holds running_var = sigma^2 - eps. Eval mode,
    gamma (x - mu)/sigma + beta, and the state dict are therefore those of plain BN.

    Use this layer for batches that are small (2 to 16 samples) or not drawn at random, whose batch statistics are
    poor. Start with plain BN and let the limits grow (:class:`RenormSchedule`): training diverges if the limits are
    large while the running statistics are far off. The layer repairs neither batches of one value per channel nor a
    difference between the data of training and testing.

    Args:
        num_features: C, the size of dimension 1 of the input.
        r_max: Limit of r, at least 1. It may be set at any time.
        d_max: Limit of d, at least 0. It may be set at any time.
        options: As in :class:`BatchNormBase`, with two differences: the default momentum is 0.01, as in the paper, and
            the layer must have running statistics.

    Raises:
        UsageError: If an argument has a value that is not allowed.

    Source:
        Ioffe 2017, "Batch Renormalization", Algorithm 1.
    """

    shown = {**BatchNormBase.shown, "r_max": None, "d_max": None}  # noqa: RUF012 - declared a ClassVar in the base
    renorm_limits: Tensor
    _own_tensors = (*BatchNormBase._own_tensors, "renorm_limits")  # noqa: SLF001 - of its base class

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
        # The limits are a tensor because a float that a schedule changes would recompile the model at every step.
        self._limits = [r_max, d_max]
        self._fill_limits(self._layer_device())
        self._recent: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_MAX_IN_FLIGHT)
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

    def _place_own_tensors(self, device: torch.device) -> None:
        super()._place_own_tensors(device)
        self._fill_limits(device)

    def _fill_limits(self, device: torch.device) -> None:
        widest = torch.float32 if device.type == "mps" else torch.float64
        self.renorm_limits = torch.tensor(self._limits, dtype=widest, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Apply a conversion to everything except the limits, which it would round."""
        super()._apply(fn, recurse)
        self._fill_limits(self._layer_device())
        return self

    def _normalized_by_batch(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, list[BatchStatistics]]:
        if self.running_mean is None or self.running_var is None:
            return super()._normalized_by_batch(x, weights)
        dtype = arithmetic_dtype(x)
        x_hat, mean, var = batch_norm_train(x.to(dtype), None, None, weights, self.eps)
        r, d = self._correction(mean, var, self.running_mean, self.running_var)
        scale, shift = _composed(r, d, self.weight, self.bias)
        y = torch.addcmul(per_channel(shift.to(dtype), x), x_hat, per_channel(scale.to(dtype), x)).to(x.dtype)
        return y, [BatchStatistics.of(mean, var, x, weights)]

    def _correction(
        self, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return r and d. When activation checkpointing recomputes a batch, return the values of its first pass.

        The running statistics have changed since then. The layer recognises a batch by the exact bits of its mean.
        """
        if is_recomputation():
            for recorded_mean, r, d in reversed(self._recent):
                if torch.equal(recorded_mean, mean):
                    return r, d
            raise UsageError(
                f"{layer_path(self)}: at most {_MAX_IN_FLIGHT} batches must be in flight between a forward pass and "
                f"its recomputation by activation checkpointing, got more. Keep the layer outside of the checkpoint."
            )
        if self.renorm_limits.device != mean.device:
            self._place_own_tensors(mean.device)
        r, d = renorm_correction(mean, var, running_mean, running_var, self.renorm_limits, self.eps)
        if not torch.compiler.is_compiling():
            self._recent.append((mean, r, d))
        return r, d

    def __getstate__(self) -> dict[str, object]:
        """Return the state of a copy or pickle: everything except the batches in flight."""
        return {**vars(self), "_recent": deque(maxlen=_MAX_IN_FLIGHT)}

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
    """A schedule of the limits of batch renormalization over a training run.

    The layers do plain BN for `warmup` steps. Then the limit of r grows linearly to `r_max` at step `r_end`, and the
    limit of d to `d_max` at step `d_end`. The defaults are those of the paper, for runs of at least 130,000 steps.
    Scale them for a shorter run. State dicts do not contain the limits: call :meth:`apply` after resuming.

    Attributes:
        warmup: Steps of plain BN.
        r_max: Final limit of r.
        r_end: Step at which r reaches its final limit.
        d_max: Final limit of d.
        d_end: Step at which d reaches its final limit.

    Raises:
        UsageError: If `r_end` or `d_end` comes before the end of the warm-up, or if a limit is too small.

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
        """Set the limits of every batch renormalization layer of a model. Call this before each training step."""
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
