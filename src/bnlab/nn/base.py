"""What every BN layer of bnlab is made of."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from bnlab.functional.activations import Activation, activation_function
from bnlab.functional.moments import without_padding_garbage
from bnlab.kernels import Choice, Request, batch_norm_eval, batch_norm_train, choose
from bnlab.kernels.compiled import batch_norm_activated_train
from bnlab.kernels.eager import eval_in_one_kernel, train_in_one_kernel
from bnlab.kernels.native.calls import SATURATED, Running
from bnlab.kernels.request import Buffers, Statistics
from bnlab.nn import input_check
from bnlab.nn.options import Nonfinite, Options, check_options
from bnlab.nn.running_update import BatchStatistics, RunningStatistics, is_in_backward, is_recomputation, kept_as

__all__ = ["BatchNormBase", "BatchStatistics", "Options", "is_recomputation"]

_NOTHING_MOVES = Running()
_OVERRIDABLE = ("_normalized_by_batch", "_update", "_moving_average", "_updated_var")


class BatchNormBase(RunningStatistics):
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

    shown: ClassVar[dict[str, object]] = {"activation": None, "nonfinite": "skip", "statistics_dtype": torch.float32}
    _is_special: ClassVar[bool] = False
    """Whether a class normalises by the batch, or updates, in a way of its own, so that one kernel cannot do both."""

    def __init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401 - whatever another base takes
        super().__init_subclass__(**options)
        cls._is_special = any(getattr(cls, name) is not getattr(BatchNormBase, name) for name in _OVERRIDABLE)

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
        nonfinite: Nonfinite = "skip",
        statistics_dtype: torch.dtype | None = torch.float32,
    ) -> None:
        check_options(type(self).__name__, eps, momentum, activation, nonfinite, statistics_dtype)
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
        if input.dim() not in self.ranks or input.size(1) != self.num_features:
            input_check.check_input(self, input)
        request = self._request(input, residual, mask)
        choice = choose(request)
        if choice.way == "eager kernel":
            return self._in_one_kernel(input, residual, request.statistics == "batch")
        by_batch = self._needs_batch_statistics()
        weights = self._checked(input, residual, mask, by_batch)
        activate = activation_function(self.activation)
        x = input if weights is None else without_padding_garbage(input, weights)
        batches: list[BatchStatistics] = []
        if choice.way == "compiler operator":
            y, mean, var = batch_norm_activated_train(x, residual, self.weight, self.bias, self.eps, self.activation)
            batches = [BatchStatistics.of(mean, var, x, None)]
            residual = activate = None
        elif by_batch:
            y, batches = self._normalized_by_batch(x, weights)
        else:
            y = batch_norm_eval(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)  # type: ignore[arg-type]
        y = y if residual is None else y + residual
        y = y if activate is None else activate(y)
        if self.training and self.track_running_stats:
            for batch in batches:
                self._update(batch)
        return y

    def _request(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Request:
        """Return what a call asks of the kernels; the input has the right rank and channels."""
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        is_withheld = mean is None or var is None
        by_batch = is_withheld or self._normalizes_by_batch()
        moving: Buffers = "fit"
        if by_batch and self.training and self.track_running_stats:
            moving = kept_as(mean, var, self._buffers["num_batches_tracked"])
        statistics: Statistics = "batch" if by_batch else "running"
        special = by_batch and self._is_special
        return Request.of_layer(x, residual, mask, self.num_features, statistics, self.activation, moving, special)

    def _in_one_kernel(self, x: Tensor, residual: Tensor | None, by_batch: bool) -> Tensor:
        parameters, buffers, momentum = self._parameters, self._buffers, self.momentum
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var = buffers["running_mean"], buffers["running_var"]
        if not by_batch:
            return eval_in_one_kernel(x, residual, mean, var, weight, bias, self.eps, self.activation)  # type: ignore[arg-type]
        if not (self.eps > 0 and (momentum is None or 0 <= momentum <= 1)):
            self._check_batch(x)
        running = _NOTHING_MOVES
        if self.training and self.track_running_stats:
            batches = buffers["num_batches_tracked"]
            if (momentum is not None or batches is not None) and not is_in_backward():
                running = Running(mean, var, batches, buffers["skipped_batches"])
        skips = self.nonfinite == "skip"
        y, status = train_in_one_kernel(x, residual, weight, bias, running, momentum, self.eps, self.activation, skips)
        if status == SATURATED and var is not None:
            self._warn_if_saturated(var)
        return y

    def extra_repr(self) -> str:
        """Return the arguments, those of bnlab only where they are not what `shown` says, and what runs the layer."""
        changed = [f"{key}={getattr(self, key)!r}" for key, usual in self.shown.items() if getattr(self, key) != usual]
        return ", ".join([str(super().extra_repr()), *changed, f"backend={self._choice()}"])  # type: ignore[no-untyped-call]

    def _choice(self) -> Choice:
        """Return what runs the layer as it is, on a contiguous batch in the dtype of its parameters."""
        weight = self._parameters["weight"]
        dtype = torch.get_default_dtype() if weight is None else weight.dtype
        batch = torch.empty((2, self.num_features, *[1] * (self.ranks[0] - 2)), dtype=dtype, device="meta")
        request = self._request(batch, None, None)
        return choose(request._replace(device=self._home().type, context="eager"))

    def _needs_batch_statistics(self) -> bool:
        buffers = self._buffers
        return self._normalizes_by_batch() or buffers["running_mean"] is None or buffers["running_var"] is None

    def _normalizes_by_batch(self) -> bool:
        """Whether the statistics of the batch are wanted although there are running statistics."""
        return self.training

    def _normalized_by_batch(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, list[BatchStatistics]]:
        """Return the transform with batch statistics, and the statistics the running ones are moved by, in order."""
        y, mean, var = batch_norm_train(x, self.weight, self.bias, weights, self.eps)
        return y, [BatchStatistics.of(mean, var, x, weights)]

    def _checked(self, x: Tensor, residual: Tensor | None, mask: Tensor | None, by_batch: bool) -> Tensor | None:
        """Validate a call; return the mask in the shape the operator takes."""
        input_check.check_input(self, x)
        input_check.check_residual(self, x, residual)
        if by_batch:
            self._check_batch(x)
        return None if mask is None else input_check.position_weights(self, x, mask)

    def _check_batch(self, x: Tensor) -> None:
        input_check.check_batch(self, x)
