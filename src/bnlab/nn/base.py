"""The base class of every BN layer of bnlab."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnlab.functional.activations import Activation, activation_function
from bnlab.functional.moments import without_padding_garbage
from bnlab.kernels import Choice, Request, batch_norm_eval, batch_norm_train, choose
from bnlab.kernels.compiled import batch_norm_activated_train
from bnlab.kernels.eager import eval_in_one_kernel, train_in_one_kernel
from bnlab.kernels.form import Running
from bnlab.kernels.native.calls import SATURATED
from bnlab.kernels.request import Buffers, Context, Statistics
from bnlab.nn import input_check
from bnlab.nn.exported import batch_norm_of_torch, exports_updates, is_exporting, trains_as_torch
from bnlab.nn.fx_leaf import PROXY, module_node
from bnlab.nn.options import Nonfinite, Options, check_options
from bnlab.nn.running_update import (
    BatchNormWithSafeStatistics,
    BatchStatistics,
    is_in_backward,
    is_recomputation,
    kind_of_buffers,
)
from bnlab.nn.sync_conversion import warn_if_dropped

__all__ = ["BatchNormBase", "BatchStatistics", "Options", "is_recomputation"]

_NO_BUFFERS = Running()
_OVERRIDABLE = ("_normalized_by_batch", "_update", "_moving_average", "_updated_var")


class BatchNormBase(BatchNormWithSafeStatistics):
    """BN with exact statistics in every layout, buffers that survive bad batches, and fused forms.

    State dicts load from torch's layer and into it. The positional arguments are those of torch's layer.

    Args:
        num_features: C, the size of dimension 1 of the input.
        eps: Added to the variance, squared input units; above 0 in train mode.
        momentum: Weight of the new batch in the running statistics, in [0, 1]; None for a cumulative average.
        affine: Whether the layer has a weight and a bias.
        track_running_stats: Whether the layer has running statistics. Without them, eval mode uses batch statistics.
        device: The device of the parameters and buffers.
        dtype: The dtype of the parameters, and of the buffers where it is wider than `statistics_dtype`.
        bias: Whether an affine layer has a bias.
        activation: The activation that is applied last: "relu", "relu6", "leaky_relu", "elu", "silu", "gelu",
            "hardswish", "sigmoid" or "tanh".
        nonfinite: "skip": the layer normalises a batch with an inf or NaN as usual, but updates neither the running
            statistics nor `num_batches_tracked` from it. `skipped_batches` counts these batches. "propagate": the
            layer does what torch does, where one such batch spoils the buffers for good. A batch with fewer than two
            values per channel is skipped either way.
        statistics_dtype: The narrowest dtype of the running statistics, also after `.half()` or `.bfloat16()`. With
            None these calls convert the statistics too, as in torch.

    Raises:
        UsageError: If an argument has a value that is not allowed.

    Source:
        Ioffe and Szegedy 2015. The outputs equal those of the torch layer of the same name, up to torch's rounding.
    """

    shown: ClassVar[dict[str, object]] = {"activation": None, "nonfinite": "skip", "statistics_dtype": torch.float32}
    _is_special: ClassVar[bool] = False
    """Whether a class overrides how a layer normalises or updates. One kernel cannot do both for such a class."""

    def __init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401 - another base class may take any
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
        self.skipped_batches = torch.zeros((), dtype=torch.long, device=device)
        self.keep_statistics_wide()

    def forward(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Return activation(BN(input) + residual).

        Args:
            input: Shape (N, C, *spatial); any float dtype and layout.
            residual: The tensor that is added after the transform. It broadcasts to the shape of `input`.
            mask: Weight of every position in the statistics, >= 0: True or 1 for data, False or 0 for padding. Shape
                (N, *spatial) or (N, 1, *spatial). The layer transforms every position, but padding never enters the
                statistics.

        Returns:
            A tensor with the shape, dtype and layout of `input`. A residual of another dtype promotes the dtype.

        Raises:
            UsageError: If the input has the wrong rank or number of channels, a mask or residual does not fit, batch
                statistics would come from one value per channel, or eps is 0 in train mode.
            DtypeError: If the input is not floating point.
        """
        if isinstance(input, PROXY):
            return module_node(self, input, residual, mask)  # type: ignore[no-any-return]
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
        if batches and self.training and self.track_running_stats:
            self._move_statistics(batches, request.context)
        return y

    def _move_statistics(self, batches: list[BatchStatistics], context: Context) -> None:
        if is_recomputation() or (context == "exporter" and not exports_updates(self)):
            return
        if context == "transform":
            input_check.check_buffers_under_vmap(self, batches[0].mean)
        for batch in batches:
            self._update(batch)

    def _request(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Request:
        """Return the request to the kernels for an input of the right rank and channels."""
        buffers = self._buffers
        try:
            mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:  # a tool keeps them as attributes, which are slower to read
            mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        is_withheld = mean is None or var is None
        by_batch = is_withheld or self._normalizes_by_batch()
        buffers_kind: Buffers = "fit"
        if by_batch and self.training and self.track_running_stats:
            buffers_kind = kind_of_buffers(mean, var, batches)
        statistics: Statistics = "batch" if by_batch else "running"
        special = by_batch and self._is_special
        return Request.of_layer(
            x, residual, mask, self.num_features, statistics, self.activation, buffers_kind, special
        )

    def _in_one_kernel(self, x: Tensor, residual: Tensor | None, by_batch: bool) -> Tensor:
        parameters, buffers, momentum = self._parameters, self._buffers, self.momentum
        try:
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:
            weight, bias = self.weight, self.bias
            mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if not by_batch:
            return eval_in_one_kernel(x, residual, mean, var, weight, bias, self.eps, self.activation)  # type: ignore[arg-type]
        if not (self.eps > 0 and (momentum is None or 0 <= momentum <= 1)):
            self._check_batch(x)
        running = _NO_BUFFERS
        updates = self.training and self.track_running_stats and (momentum is not None or batches is not None)
        if updates and not is_in_backward():
            skipped = self.skipped_batches
            if not (skipped.is_cpu and x.is_cpu) and skipped.device != x.device:
                self._place_own_tensors(x.device)
            running = Running(mean, var, batches, self.skipped_batches)
        skips = self.nonfinite == "skip"
        y, status = train_in_one_kernel(x, residual, weight, bias, running, momentum, self.eps, self.activation, skips)
        if status == SATURATED and var is not None:
            self._warn_if_saturated(var)
        return y

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the submodules with their names, as torch does."""
        warn_if_dropped(self, self.activation, sys._getframe(1))  # noqa: SLF001 - documented; shows who asks
        return super().named_children()

    def extra_repr(self) -> str:
        """Return the arguments and the backend. bnlab's own arguments appear where they differ from `shown`."""
        changed = [f"{key}={getattr(self, key)!r}" for key, usual in self.shown.items() if getattr(self, key) != usual]
        return ", ".join([str(super().extra_repr()), *changed, f"backend={self._choice()}"])  # type: ignore[no-untyped-call]

    def _choice(self) -> Choice:
        """Return the backend for the layer in its current state, on a contiguous batch in its parameters' dtype."""
        weight: Tensor | None = self.weight
        dtype = torch.get_default_dtype() if weight is None else weight.dtype
        batch = torch.empty((2, self.num_features, *[1] * (self.ranks[0] - 2)), dtype=dtype, device="meta")
        request = self._request(batch, None, None)
        return choose(request._replace(device=self._layer_device().type, context="eager"))

    def _needs_batch_statistics(self) -> bool:
        return self._normalizes_by_batch() or self.running_mean is None or self.running_var is None

    def _normalizes_by_batch(self) -> bool:
        """Whether the layer uses batch statistics although it has running statistics."""
        return self.training

    def _normalized_by_batch(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, list[BatchStatistics]]:
        """Return the output by batch statistics, and the statistics that update the running ones, in order."""
        if is_exporting(x) and trains_as_torch(self, x, weights):
            return batch_norm_of_torch(self, x), []
        y, mean, var = batch_norm_train(x, self.weight, self.bias, weights, self.eps)
        return y, [BatchStatistics.of(mean, var, x, weights)]

    def _checked(self, x: Tensor, residual: Tensor | None, mask: Tensor | None, by_batch: bool) -> Tensor | None:
        """Check the arguments of a call. Return the mask in the shape that the operator takes."""
        input_check.check_input(self, x)
        input_check.check_residual(self, x, residual)
        if by_batch:
            self._check_batch(x)
        return None if mask is None else input_check.position_weights(self, x, mask)

    def _check_batch(self, x: Tensor) -> None:
        input_check.check_batch(self, x)
