"""Train mode in an exported graph: torch's own operator wherever it does what the layer does.

Tools that rewrite exported graphs recognise BN by this operator. torchao's `move_exported_model_to_eval` replaces it by
that of eval mode. No tool would do this with an operator of bnlab: the model would go on to normalise by the batch.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.errors import BnlabWarning
from bnlab.kernels.fixed_statistics import cast, dtype_for_torch
from bnlab.kernels.request import context_of
from bnlab.nn.layer_path import layer_path
from bnlab.nn.running_update import BatchNormWithSafeStatistics

__all__ = ["batch_norm_of_torch", "exports_updates", "is_exporting", "trains_as_torch"]

_UPDATES = ("_update", "_moving_average", "_updated_var")


def is_exporting(x: Tensor) -> bool:
    """Whether torch.export or torch.onnx.export records the operations on a tensor."""
    return context_of(x) == "exporter"


def trains_as_torch(layer: BatchNormWithSafeStatistics, x: Tensor, weights: Tensor | None) -> bool:
    """Whether torch's operator does in train mode what a layer does to an input, up to rounding.

    It does not where a mask weights the positions, where the running statistics are a cumulative average, where the
    class of the layer updates them in its own way, and where they have a dtype that the operator does not take.
    """
    if weights is not None:
        return False
    mean, var = _running(layer)
    if mean is None or var is None:
        return True
    updates_as_torch = all(
        getattr(type(layer), name) is getattr(BatchNormWithSafeStatistics, name) for name in _UPDATES
    )
    fits = mean.dtype == var.dtype == dtype_for_torch(x, mean, var, layer.weight, layer.bias)
    return updates_as_torch and fits and layer.momentum is not None


def batch_norm_of_torch(layer: BatchNormWithSafeStatistics, x: Tensor) -> Tensor:
    """Normalise with the statistics of the batch and update the running statistics, by torch's own operator.

    A batch with an inf or NaN updates them too, as it does in torch's layer.

    Args:
        layer: A layer for which :func:`trains_as_torch` holds.
        x: Shape (N, C, *spatial); any float dtype.

    Returns:
        Shape and dtype of `x`.
    """
    mean, var = _running(layer)
    if _moves(layer) and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    dtype = dtype_for_torch(x, mean, var, layer.weight, layer.bias)
    weight, bias = cast(layer.weight, dtype), cast(layer.bias, dtype)
    momentum = 0.0 if layer.momentum is None else layer.momentum
    return F.batch_norm(x, mean, var, weight, bias, True, momentum, layer.eps)


def _moves(layer: BatchNormWithSafeStatistics) -> bool:
    """Whether a batch updates the running statistics. An ONNX graph keeps no state.

    With running statistics, the ONNX exporter writes train mode as eval mode:
    https://github.com/microsoft/onnxscript/issues/1791.
    """
    return layer.training and layer.track_running_stats and not torch.onnx.is_in_onnx_export()


def _running(layer: BatchNormWithSafeStatistics) -> tuple[Tensor | None, Tensor | None]:
    """Return the running statistics that a batch updates, or twice None."""
    mean, var = layer.running_mean, layer.running_var
    return (None, None) if mean is None or var is None or not _moves(layer) else (mean, var)


def exports_updates(layer: BatchNormWithSafeStatistics) -> bool:
    """Return whether an exported graph can hold the updates of a layer that torch has no operator for.

    Where it can, the function warns that no tool will be able to move the graph to eval mode.
    """
    if not _moves(layer):
        return False
    warnings.warn(
        f"{layer_path(layer)}: a train-mode export must hold torch's own BN to follow a later switch to eval mode, got "
        f"a call that torch has no operator for. Export the model in eval mode to deploy it.",
        BnlabWarning,
        stacklevel=4,
    )
    return True
