"""Modules that compute what operators of a graph compute, with the very tensors of the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from typing_extensions import override

from bnlab.observe.programs.graph_layers import GraphLayer, attribute_at, path_of, source_of
from bnlab.observe.programs.operators import operator_name

__all__ = ["ProgramBatchNorm", "activation_function", "batch_norm_module", "dropout_module", "filter_module"]


class ProgramBatchNorm(nn.BatchNorm2d):
    """A BN layer of a program, for inputs of any rank."""

    @override
    def _check_input_dim(self, input: Tensor) -> None:
        """Accept what the operator accepts."""


def batch_norm_module(program: nn.Module, layer: GraphLayer) -> nn.Module:
    """Return a BN layer that shares the parameters and buffers of a layer of a program, in the mode of its operators.

    A layer without running statistics, whose operators always normalise with the batch, is in eval mode.
    """
    arguments = layer.calls[0][1]
    tensors = {
        role: None if (path := source_of(value)) is None else attribute_at(program, path)
        for role, value in (
            ("weight", arguments.weight),
            ("bias", arguments.bias),
            ("running_mean", arguments.running_mean),
            ("running_var", arguments.running_var),
        )
    }
    module = ProgramBatchNorm(
        _channels(arguments.input, tensors), eps=float(arguments.eps), affine=False, device="meta"
    )
    module.momentum = _momentum(layer)
    mean_path = source_of(arguments.running_mean)
    owner = None if mean_path is None else program.get_submodule(path_of(mean_path))
    counter = getattr(owner, "num_batches_tracked", None)
    tensors["num_batches_tracked"] = counter if isinstance(counter, Tensor) else None
    module.track_running_stats = layer.keeps_statistics
    _share(module, tensors)
    module.training = layer.trains
    return module


def _channels(input_: Any, tensors: Mapping[str, Tensor | None]) -> int:  # noqa: ANN401
    known = next((tensor for tensor in tensors.values() if tensor is not None), None)
    if known is not None:
        return known.numel()
    value = input_.meta.get("val") if isinstance(input_, Node) else None
    return int(value.shape[1]) if isinstance(value, Tensor) else 0


def _momentum(layer: GraphLayer) -> float | None:
    """Return the momentum; None for a cumulative average, whose factor is computed in train mode and 0 in eval mode."""
    momentum = layer.calls[0][1].momentum
    if not isinstance(momentum, (int, float)) or (momentum == 0 and not layer.trains):
        return None
    return float(momentum)


def _share(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    """Give a module the very tensors of a program; a tensor that is no parameter becomes a buffer."""
    for name, tensor in tensors.items():
        module._parameters.pop(name, None)  # noqa: SLF001
        module._buffers.pop(name, None)  # noqa: SLF001
        if isinstance(tensor, nn.Parameter) or (tensor is None and name in ("weight", "bias")):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)


_FILTERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "aten::linear": (nn.Linear, ()),
    **{
        f"aten::conv{rank}d": (kind, ("stride", "padding", "dilation", "groups"))
        for rank, kind in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d))
    },
}
"""The classes of filters by operator, with the arguments behind input, weight and bias."""

_CONVOLUTIONS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Conv1d, nn.ConvTranspose1d),
    (nn.Conv2d, nn.ConvTranspose2d),
    (nn.Conv3d, nn.ConvTranspose3d),
)
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def filter_module(program: nn.Module, node: Node) -> nn.Module | None:
    """Return a convolution or linear layer that shares the weights of an operator; None for any other node."""
    name = operator_name(node.target)  # type: ignore[arg-type]
    arguments = list(node.args)
    if node.kwargs or len(arguments) < 2 or name not in (*_FILTERS, "aten::convolution"):
        return None
    paths = [source_of(value) for value in (*arguments[1:3], None)][:2]
    bias_is_known = len(arguments) < 3 or arguments[2] is None or paths[1] is not None
    if paths[0] is None or not bias_is_known:
        return None
    weight = attribute_at(program, paths[0])
    kind, options = _kind_and_options(name, arguments, weight)
    if kind is None or any(isinstance(value, Node) for value in options.values()):
        return None
    module = _empty_filter(kind, weight, options)
    _share(module, {"weight": weight, "bias": None if paths[1] is None else attribute_at(program, paths[1])})
    return module


def _kind_and_options(
    name: str, arguments: Sequence[Any], weight: Tensor
) -> tuple[type[nn.Module] | None, dict[str, Any]]:
    if name != "aten::convolution":
        kind, names = _FILTERS[name]
        return kind, {key: _DEFAULTS[key] for key in names} | dict(zip(names, arguments[3:], strict=False))
    stride, padding, dilation, transposed, output_padding, groups = arguments[3:9]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if not 3 <= weight.dim() <= 5:
        return None, options
    plain, turned = _CONVOLUTIONS[weight.dim() - 3]
    return (turned, options | {"output_padding": output_padding}) if transposed else (plain, options)


def _empty_filter(kind: type[nn.Module], weight: Tensor, options: Mapping[str, Any]) -> nn.Module:
    if kind is nn.Linear:
        return nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
    groups = int(options["groups"])
    own = {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in options.items()}
    if issubclass(kind, nn.modules.conv._ConvTransposeNd):  # noqa: SLF001
        channels = weight.size(0), weight.size(1) * groups
    else:
        channels = weight.size(1) * groups, weight.size(0)
    build: Callable[..., nn.Module] = kind
    return build(*channels, tuple(weight.shape[2:]), bias=False, device="meta", **own)


def dropout_module(node: Node) -> nn.Module | None:
    """Return a dropout layer for an operator that drops values, in its mode; None for any other node."""
    if operator_name(node.target) not in ("aten::dropout", "aten::native_dropout") or len(node.args) < 3:  # type: ignore[arg-type]
        return None
    rate, training = node.args[1:3]
    if not isinstance(rate, (int, float)) or not isinstance(training, bool):
        return None
    module = nn.Dropout(float(rate))
    module.training = training
    return module


def activation_function(node: Node) -> Callable[[Tensor], Tensor] | None:
    """Return the function of torch that an activation of a graph is; None for any other node."""
    return _ACTIVATIONS.get(operator_name(node.target))  # type: ignore[arg-type]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"aten::sigmoid": torch.sigmoid, "aten::tanh": torch.tanh}
