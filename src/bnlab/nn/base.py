"""What every BN layer of bnlab is made of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from bnlab.errors import BnlabWarning, DtypeError, UsageError
from bnlab.functional.activations import Activation, activation_function
from bnlab.functional.moments import sum_of_weights, without_padding_garbage
from bnlab.functional.running import moving_average
from bnlab.kernels import Choice, Request, batch_norm_eval, batch_norm_train, choose
from bnlab.kernels.activated import batch_norm_activated_train, is_one_operator
from bnlab.kernels.eager import SATURATED, Running, fused_eval, fused_train, fuses
from bnlab.nn.layer_path import layer_path

__all__ = ["BatchNormBase", "BatchStatistics", "Options", "is_recomputation"]

_MOMENTUM_WAY_OUT = "Give the weight of the new batch, 1 - decay."
_STATISTICS = ("running_mean", "running_var")
_WIDE = (torch.float32, torch.float64)
_NOTHING_MOVES = Running()
_OVERRIDABLE = ("_normalized_by_batch", "_update", "_moved", "_moved_var")


@dataclass(frozen=True)
class BatchStatistics:
    """Statistics of a batch that go into the running statistics.

    Attributes:
        mean: Shape (C,), float64.
        var: Biased. Shape (C,), float64.
        count: Values per channel, or the sum of their weights: a tensor of shape ().
    """

    mean: Tensor
    var: Tensor
    count: int | Tensor

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, x: Tensor, weights: Tensor | None) -> BatchStatistics:
        """Return the statistics of `x` with the count that the weights leave."""
        return cls(mean, var, x.numel() // x.size(1) if weights is None else sum_of_weights(weights, x))


class Options(TypedDict, total=False):
    """The keyword arguments every BN layer takes, as in :class:`BatchNormBase`."""

    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    device: torch.device | str | int | None
    dtype: torch.dtype | None
    bias: bool
    activation: Activation | None
    nonfinite: Literal["skip", "propagate"]
    statistics_dtype: torch.dtype | None


class BatchNormBase(TorchBatchNorm):
    """BN with exact statistics in every layout, buffers that survive bad batches, and fused forms.

    The state dict is that of torch's layer, both ways, and so are the positional arguments.

    Args:
        num_features: C, the size of dimension 1 of the input.
        eps: Added to the variance, squared input units; above 0 in train mode.
        momentum: Weight of the new batch in the running statistics, in [0, 1]; None for a cumulative average.
        affine: Whether there are weight and bias.
        track_running_stats: Whether there are running statistics; without them eval mode uses those of the batch.
        device: Of parameters and buffers.
        dtype: Of the parameters, and of the buffers where it is wider than `statistics_dtype`.
        bias: Whether an affine layer has a bias.
        activation: What is applied last: "relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish",
            "sigmoid" or "tanh".
        nonfinite: "skip": a batch with an inf or NaN normalises as usual, but reaches neither the running statistics
            nor `num_batches_tracked`; `skipped_batches` counts how often. "propagate": as torch, where one such batch
            spoils the buffers for good. A batch with fewer than two values per channel is skipped either way.
        statistics_dtype: The running statistics never get narrower than this, whatever `.half()` or `.bfloat16()` do
            to the rest; None lets them follow, as torch does.

    Raises:
        UsageError: If an argument is outside what it may be.

    Source:
        Ioffe and Szegedy 2015; equals the torch layer of the same name up to the rounding of the latter.
    """

    ranks: ClassVar[tuple[int, ...]]
    shown: ClassVar[dict[str, object]] = {"activation": None, "nonfinite": "skip", "statistics_dtype": torch.float32}
    skipped_batches: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
        nonfinite: Literal["skip", "propagate"] = "skip",
        statistics_dtype: torch.dtype | None = torch.float32,
    ) -> None:
        name = type(self).__name__
        if not (eps >= 0 and math.isfinite(eps)):
            raise UsageError(f"{name}: eps must be finite and >= 0, got {eps}.")
        if momentum is not None and not 0 <= momentum <= 1:
            raise UsageError(f"{name}: momentum must be in [0, 1] or None, got {momentum}. {_MOMENTUM_WAY_OUT}")
        if statistics_dtype is not None and not getattr(statistics_dtype, "is_floating_point", False):
            raise UsageError(
                f"{name}: statistics_dtype must be a floating torch.dtype or None, got {statistics_dtype!r}."
            )
        if nonfinite not in ("skip", "propagate"):
            raise UsageError(f"{name}: nonfinite must be 'skip' or 'propagate', got {nonfinite!r}.")
        activation_function(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        self.nonfinite = nonfinite
        self.statistics_dtype = statistics_dtype
        self.register_buffer("skipped_batches", torch.zeros((), dtype=torch.long, device=device), persistent=False)
        self.keep_statistics_wide()

    def forward(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Return activation(BN(input) + residual).

        Args:
            input: Shape (N, C, *spatial); any float dtype and layout.
            residual: Added behind the transform; broadcasts to the shape of `input`.
            mask: Weight of every position in the statistics, >= 0: True or 1 for data, False or 0 for padding. Shape
                (N, *spatial) or (N, 1, *spatial). Every position is transformed; padding never counts.

        Returns:
            Shape, dtype and layout of `input`; with a residual of another dtype, what their sum has.

        Raises:
            UsageError: If the input has the wrong rank or number of channels, a mask or residual does not fit, there is
                one value per channel to take statistics of, or eps is 0 in train mode.
            DtypeError: If the input is not floating point.
        """
        if mask is None and fuses(input, residual, self.activation):
            y = self._in_one_kernel(input, residual)
            if y is not None:
                return y
        weights = self._checked(input, residual, mask)
        activate = activation_function(self.activation)
        x = input if weights is None else without_padding_garbage(input, weights)
        batches: list[BatchStatistics] = []
        if self.running_mean is not None and self.running_var is not None and not self._normalizes_by_batch():
            y = batch_norm_eval(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        elif weights is None and _normalizes_as_base(type(self)) and is_one_operator(x, residual, self.activation):
            y, mean, var = batch_norm_activated_train(x, residual, self.weight, self.bias, self.eps, self.activation)
            batches = [BatchStatistics.of(mean, var, x, None)]
            residual = activate = None
        else:
            y, batches = self._normalized_by_batch(x, weights)
        y = y if residual is None else y + residual
        y = y if activate is None else activate(y)
        if self.training and self.track_running_stats:
            for batch in batches:
                self._update(batch)
        return y

    def _in_one_kernel(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """Return the output by one kernel; None where the input is wrong or the layer needs more than that."""
        if x.dim() not in self.ranks or x.size(1) != self.num_features or x.numel() <= self.num_features:
            return None
        parameters, buffers = self._parameters, self._buffers
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var = buffers["running_mean"], buffers["running_var"]
        withheld = mean is None or var is None
        if not withheld and not self._normalizes_by_batch():
            return fused_eval(x, residual, mean, var, weight, bias, self.eps, self.activation)  # type: ignore[arg-type]
        moves, momentum = self.training and self.track_running_stats, self.momentum
        if not _is_plain(type(self)) or not self.eps > 0 or (withheld and moves):  # type: ignore[arg-type]
            return None
        running = _NOTHING_MOVES
        if moves:
            if mean.dtype not in _WIDE or not (momentum is None or 0 <= momentum <= 1):  # type: ignore[union-attr]
                return None
            batches = buffers["num_batches_tracked"]
            if (momentum is not None or batches is not None) and not is_recomputation():
                running = Running(mean, var, batches, buffers["skipped_batches"])
        skips = self.nonfinite == "skip"
        y, status = fused_train(x, residual, weight, bias, running, momentum, self.eps, self.activation, skips)
        if status == SATURATED and var is not None:
            self._warn_if_saturated(var)
        return y

    def extra_repr(self) -> str:
        """Return the arguments, those of bnlab only where they are not what `shown` says, and what runs the layer."""
        changed = [f"{key}={getattr(self, key)!r}" for key, usual in self.shown.items() if getattr(self, key) != usual]
        return ", ".join([str(super().extra_repr()), *changed, f"backend={self._backend()}"])  # type: ignore[no-untyped-call]

    def _backend(self) -> Choice:
        """Return what runs the layer on a batch in the dtype of its parameters."""
        weight = self._parameters["weight"]
        dtype = torch.get_default_dtype() if weight is None else weight.dtype
        return choose(Request(self._home().type, str(dtype).removeprefix("torch."), masked=False, count=2))

    def reset_running_stats(self) -> None:
        """Set the running statistics and counters back to their initial values."""
        super().reset_running_stats()
        if "skipped_batches" in self._buffers:  # torch's constructor calls this before it is there
            self.skipped_batches.zero_()

    def _normalizes_by_batch(self) -> bool:
        """Whether the statistics of the batch are wanted although there are running statistics."""
        return self.training

    def _normalized_by_batch(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, list[BatchStatistics]]:
        """Return the transform with batch statistics, and the statistics the running ones are moved by, in order."""
        y, mean, var = batch_norm_train(x, self.weight, self.bias, weights, self.eps)
        return y, [BatchStatistics.of(mean, var, x, weights)]

    @torch.no_grad()
    def _update(self, batch: BatchStatistics) -> None:
        """Move the running statistics by one batch, unless it is not finite or has fewer than two values.

        Where looking at a value would make a device wait, or stop a compiler, the decision stays a tensor.
        """
        mean, var, count = batch.mean, batch.var, batch.count
        if is_recomputation() or (self.num_batches_tracked is None and self.momentum is None):
            return
        look = _may_look_at(mean)
        total = float(count) if look else count if isinstance(count, Tensor) else mean.new_full((), count)
        counts: bool | Tensor = total >= 2
        if self.nonfinite == "skip":
            finite = (mean + var).isfinite().all()
            counts = bool(counts and finite) if look else counts & finite
        if look and not counts:
            self.skipped_batches += 1
            return
        if isinstance(counts, Tensor):
            self.skipped_batches += ~counts
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += counts
        if self.running_mean is None or self.running_var is None:
            return
        bessel = total / (total - 1 if isinstance(total, float) else (total - 1).clamp(min=1))
        for running, moved in (
            (self.running_mean, self._moved(self.running_mean, mean)),
            (self.running_var, self._moved_var(self.running_var, var, bessel)),
        ):
            running.copy_(torch.where(counts, moved, running) if isinstance(counts, Tensor) else moved)
        if look:
            self._warn_if_saturated(self.running_var)

    def _moved(self, running: Tensor, new: Tensor) -> Tensor:
        """Return a moving average one update later."""
        updates = 1 if self.num_batches_tracked is None else self.num_batches_tracked.clamp(min=1)
        return moving_average(running, new, self.momentum, updates)

    def _moved_var(self, running_var: Tensor, var: Tensor, bessel: float | Tensor) -> Tensor:
        """Return the running variance one update later; `bessel` is m/(m-1)."""
        return self._moved(running_var, var * bessel)

    def _warn_if_saturated(self, running_var: Tensor) -> None:
        largest = torch.finfo(running_var.dtype).max
        if bool((running_var == largest).any()):
            warnings.warn(
                f"{layer_path(self)}: running_var must be finite in {running_var.dtype}, got one that stopped at "
                f"{largest:.3g}. Scale the input down, or use statistics_dtype=torch.float64.",
                BnlabWarning,
                stacklevel=2,
            )

    def _checked(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Validate a call; return the mask in the shape the operator takes."""
        if x.dim() not in self.ranks:
            allowed = " or ".join(f"{rank}-d" for rank in self.ranks)
            raise self._refusal("input", f"be {allowed}", f"shape {tuple(x.shape)}")
        if x.size(1) != self.num_features:
            raise self._refusal("input", f"have {self.num_features} channels in dimension 1", f"shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise DtypeError(
                f"{layer_path(self)}: input must be floating point, got {x.dtype}. Convert it: input.float()."
            )
        if residual is not None and not _fits(residual, x):
            raise self._refusal(
                "residual",
                f"broadcast to the shape of the input, {tuple(x.shape)}, on {x.device}",
                f"{tuple(residual.shape)} on {residual.device}",
            )
        if self._normalizes_by_batch() or self.running_mean is None or self.running_var is None:
            self._check_batch(x)
        return None if mask is None else self._checked_mask(x, mask)

    def _check_batch(self, x: Tensor) -> None:
        if x.numel() == self.num_features:
            raise self._refusal(
                "input",
                "have more than 1 value per channel to take statistics of",
                f"shape {tuple(x.shape)}",
                "Use a larger batch (drop_last=True in the loader), or eval mode.",
            )
        if self.training and not self.eps > 0:
            raise self._refusal("eps", "be > 0 in train mode", f"{self.eps}", "Set it to 1e-5.")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise self._refusal("momentum", "be in [0, 1] or None", f"{self.momentum}", _MOMENTUM_WAY_OUT)

    def _checked_mask(self, x: Tensor, mask: object) -> Tensor:
        if not isinstance(mask, Tensor) or mask.requires_grad:
            raise self._refusal("mask", "be a tensor without gradient", "one that requires it or another type")
        whole = (x.size(0), 1, *x.shape[2:])
        wanted = mask.unsqueeze(1) if mask.dim() == x.dim() - 1 else mask
        if wanted.dim() != x.dim() or any(
            have not in (1, want) for have, want in zip(wanted.shape, whole, strict=True)
        ):
            raise self._refusal("mask", f"broadcast to {(x.size(0), *x.shape[2:])}", f"{tuple(mask.shape)}")
        if mask.is_complex():
            raise self._refusal("mask", "be real", str(mask.dtype))
        if mask.dtype != torch.bool and _may_look_at(mask) and not bool(((mask >= 0) & mask.isfinite()).all()):
            worst = mask.amin() if bool((mask < 0).any()) else mask.amax()
            raise self._refusal("mask", "be finite and >= 0 everywhere", f"{float(worst):g}")
        return wanted.expand(whole)

    def _refusal(self, argument: str, rule: str, got: str, way_out: str = "") -> UsageError:
        return UsageError(f"{layer_path(self)}: {argument} must {rule}, got {got}. {way_out}".strip())

    def _is_too_narrow(self, dtype: torch.dtype) -> bool:
        return self.statistics_dtype is not None and torch.finfo(dtype).eps > torch.finfo(self.statistics_dtype).eps

    def _load_from_state_dict(self, *arguments: object) -> None:
        """Load as torch does; with assign=True those of the file replace the buffers, and may be too narrow."""
        super()._load_from_state_dict(*arguments)
        if self.skipped_batches.device != self._home():
            self._fill_own_buffers()
        self.keep_statistics_wide()

    def keep_statistics_wide(self) -> None:
        """Widen running statistics that are narrower than `statistics_dtype`."""
        for key in _STATISTICS:
            buffer = self._buffers.get(key)
            if buffer is not None and self._is_too_narrow(buffer.dtype):
                self._buffers[key] = buffer.to(self.statistics_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Apply a conversion, but keep the running statistics at least as wide as `statistics_dtype`."""
        before = {key: self._buffers.get(key) for key in _STATISTICS}
        was_meta = self.skipped_batches.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key, old in before.items():
            new = self._buffers.get(key)
            if old is not None and new is not None and self._is_too_narrow(new.dtype):
                self._buffers[key] = old.to(device=new.device)
        if was_meta and not self.skipped_batches.is_meta:
            self._fill_own_buffers()
        return self

    def _fill_own_buffers(self) -> None:
        """Give the buffers that are no part of a state dict their values, where nothing else does."""
        self.skipped_batches = torch.zeros((), dtype=torch.long, device=self._home())

    def _home(self) -> torch.device:
        """Return the device of the layer."""
        own = (*self.parameters(recurse=False), *(self._buffers[key] for key in _STATISTICS))
        return next((tensor.device for tensor in own if tensor is not None), self.skipped_batches.device)


@cache
def _is_plain(kind: type[BatchNormBase]) -> bool:
    """Whether a class normalises and updates as the base does, so that one kernel can do both."""
    return all(getattr(kind, name) is getattr(BatchNormBase, name) for name in _OVERRIDABLE)


def _normalizes_as_base(kind: type[BatchNormBase]) -> bool:
    """Whether a class normalises as the base does; without a cache, of which compilers warn."""
    return kind._normalized_by_batch is BatchNormBase._normalized_by_batch  # noqa: SLF001


def _fits(residual: Tensor, x: Tensor) -> bool:
    if residual.device != x.device or residual.dim() > x.dim():
        return False
    trailing = x.shape[x.dim() - residual.dim() :]
    return all(have in (1, want) for have, want in zip(residual.shape, trailing, strict=True))


def _may_look_at(values: Tensor) -> bool:
    """Whether reading a value costs nothing and is possible: in eager mode, on the CPU, in an ordinary tensor."""
    plain = type(values) is Tensor and values.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and not torch._C._are_functorch_transforms_active()  # noqa: SLF001


def is_recomputation() -> bool:
    """Whether activation checkpointing is running this forward a second time, inside the backward pass."""
    if torch.compiler.is_compiling() or not hasattr(torch._C, "_current_graph_task_id"):  # noqa: SLF001
        return False
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001 - the only sign there is
