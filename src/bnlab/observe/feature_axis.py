"""Follows the axes of tensors through a forward pass, to see which axis of a BN layer's input holds the features."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any, TypeAlias

import torch
from torch import nn

from bnlab.observe.discover import channels_of
from bnlab.observe.model_evidence import FeatureAxis
from bnlab.observe.passes.executed_graph import Call, ExecutedGraph, Value
from bnlab.observe.passes.tensors import tensors_in

__all__ = ["feature_axes"]


class _Unwritten(IntEnum):
    """What is known about an axis along which no layer wrote features. The smaller value wins where tensors join."""

    LAST = 1
    """The last axis of a tensor of unknown origin. By convention it may hold features."""
    POSITIONS = 2
    """Time steps, tokens or pixels, as the convolution, recurrent layer, attention or embedding before it shows."""
    OTHER = 3
    """Another axis of a tensor of unknown origin."""
    WEIGHT = 4
    """An axis of a tensor that is computed from parameters alone."""
    UNCLEAR = 5
    """An axis behind a function whose effect on the axes is not known."""


_Axis: TypeAlias = Call | _Unwritten
"""The call that wrote features along an axis, or what else is known about the axis."""

_Axes: TypeAlias = tuple[_Axis, ...]
"""The axes of a tensor, in order."""

_Rule: TypeAlias = Callable[[Call, Sequence[_Axes]], Sequence[_Axes]]
"""Returns the axes of the first outputs of a call, from the axes of its inputs."""

_ENCODERS = (
    nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer
)  # fmt: skip
"""Modules of several layers that a report names instead of the layer inside."""

_SMALLEST_STRIDE = 1_000_003
"""Smallest stride of the tensor that shows where a view moves each axis, in values. No other stride comes near it."""


def feature_axes(model: nn.Module, graph: ExecutedGraph, layers: Mapping[str, nn.Module]) -> dict[str, FeatureAxis]:
    """Return which axis of the input of each layer holds the features; no entry for a layer of which this is unclear.

    Convolutions put features on axis 1. Linear layers, recurrent layers, attention and embeddings put them on the last
    axis. Their axes are followed through functions that keep, move, split or join axes. Any other function ends the
    trail. A linear layer mixes the last axis whatever it holds. Where axis 1 may hold features of its own, such as
    the channels of a convolution in front, the last axis is therefore no evidence.

    Args:
        model: The model.
        graph: The calls of a pass.
        layers: The BN layers by path.
    """
    modules = dict(model.named_modules())
    parameters = {graph.tensors[name] for name, _ in model.named_parameters() if name in graph.tensors}
    known: dict[int, _Axes] = {}
    by_layer: dict[str, list[FeatureAxis]] = {}
    for call in graph.calls:
        inputs = [known.get(value.id) or _axes_of_new(value, parameters) for value in call.inputs]
        path = call.modules[-1] if call.modules else ""
        if call.function is None and inputs and path in layers and _is_on_axis_1(layers[path], call.inputs[0]):
            axis = _feature_axis(modules, call, inputs[0])
            by_layer.setdefault(path, []).extend([] if axis is None else [axis])
        for value, axes in zip(call.outputs, _axes_after(call, inputs), strict=True):
            known[value.id] = axes
    return {path: max(axes, key=lambda each: each.axis) for path, axes in by_layer.items() if axes}


def _axes_of_new(value: Value, parameters: Collection[int]) -> _Axes:
    """Return the axes of a tensor that no recorded call returned."""
    if value.id in parameters:
        return (_Unwritten.WEIGHT,) * len(value.shape)
    return (*(_Unwritten.OTHER for _ in value.shape[1:]), _Unwritten.LAST) if value.shape else ()


def _is_on_axis_1(layer: nn.Module, value: Value) -> bool:
    """Return whether a layer is certain to normalise axis 1 of a tensor.

    A class with its own forward may move the axes itself. The number of its channels decides, unless the last axis has
    the same size.
    """
    channels = channels_of(layer)
    if len(value.shape) < 2 or value.shape[1] != channels:
        return False
    forward = vars(layer).get("forward", type(layer).forward)
    home = getattr(forward, "__module__", None) or ""
    return home.startswith(("torch.", "bnlab.")) or len(value.shape) == 2 or value.shape[-1] != channels


def _feature_axis(modules: Mapping[str, nn.Module], layer: Call, axes: _Axes) -> FeatureAxis | None:
    own, last = axes[1], axes[-1]
    if isinstance(own, Call):
        axis, writer = 1, own
    elif isinstance(last, Call) and own in (_Unwritten.POSITIONS, _Unwritten.OTHER):
        axis, writer = len(axes) - 1, last
    else:
        return None
    around = [path for path in writer.modules if path not in layer.modules and isinstance(modules[path], _ENCODERS)]
    producer = next(iter([*around, *writer.modules[-1:]]), "")
    return FeatureAxis(axis=axis, shape=layer.inputs[0].shape, producer=producer, kind=type(modules[producer]).__name__)


def _axes_after(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Return the axes of every output of a call."""
    if inputs and all(axis is _Unwritten.WEIGHT for axes in inputs for axis in axes):
        return [(_Unwritten.WEIGHT,) * len(value.shape) for value in call.outputs]
    rule = _same_shape if call.function is None else _RULES.get(_name(call.function))
    axes = [] if rule is None or not inputs else list(rule(call, inputs))
    axes += [()] * (len(call.outputs) - len(axes))
    return [
        each if len(each) == len(value.shape) else (_Unwritten.UNCLEAR,) * len(value.shape)
        for value, each in zip(call.outputs, axes, strict=False)
    ]


def _name(function: Callable[..., Any]) -> str:
    """Return the name of a function of torch, without the underscore of its form in place.

    One name stands for all forms: `torch.relu`, `Tensor.relu_` and `F.relu`. A property such as `Tensor.mT` is read by
    its `__get__`.
    """
    name = getattr(function, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", "")
    return name if name.startswith("__") else name.rstrip("_")


def _joined(tensors: Sequence[_Axes]) -> _Axes:
    """Return the axes of a tensor that tensors of the same rank are joined to. Of two writers the later one counts."""

    def precedence(axis: _Axis) -> int:
        return -axis.outputs[0].id if isinstance(axis, Call) else axis.value

    return tuple(min(axes, key=precedence) for axes in zip(*tensors, strict=True))


def _positions(axes: _Axes) -> _Axes:
    """Return axes that a layer takes for positions. Features that another layer wrote there stay features."""
    return tuple(axis if isinstance(axis, Call) else _Unwritten.POSITIONS for axis in axes)


def _same_shape(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Elementwise functions and normalisation: the inputs that were not broadcast decide."""
    return [
        _joined([axes for value, axes in zip(call.inputs, inputs, strict=True) if value.shape == output.shape])
        for output in call.outputs
    ]


def _same_rank(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Concatenation, pooling and padding: axes change their size and keep their place."""
    return [_joined([axes for axes in inputs if len(axes) == len(output.shape)]) for output in call.outputs]


def _stack(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Stacks: a new last axis may hold features. What another new axis holds is not clear."""
    dim = call.keywords.get("dim", call.arguments[1] if len(call.arguments) > 1 else 0)
    rank = len(call.outputs[0].shape)
    joined, place = _joined([axes for axes in inputs if len(axes) == rank - 1]), dim % rank
    new = _Unwritten.LAST if place == len(joined) else _Unwritten.UNCLEAR
    return [(*joined[:place], new, *joined[place:])]


def _view(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Views that move, select or insert axes.

    The function runs once more, on a tensor without values whose axes differ in their strides. These strides show where
    each axis goes.
    """
    if len(call.inputs) != 1 or call.function is None:
        return []
    shape = call.inputs[0].shape
    strides = range(_SMALLEST_STRIDE, _SMALLEST_STRIDE + len(shape))
    probe = torch.empty_strided(shape, list(strides), device="meta")
    place = [probe if isinstance(argument, Value) else argument for argument in call.arguments]
    keywords = {key: probe if isinstance(argument, Value) else argument for key, argument in call.keywords.items()}
    with suppress(Exception):  # an index or a keyword that a tensor without values does not take
        by_stride: dict[int, _Axis] = dict(zip(strides, inputs[0], strict=True))
        views = tensors_in(call.function(*place, **keywords))
        return [tuple(by_stride.get(stride, _Unwritten.UNCLEAR) for stride in view.stride()) for view in views]
    return []


def _reshape(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Reshapes: the axes before and behind those that are split or merged keep what they hold."""
    old, new = call.inputs[0].shape, call.outputs[0].shape
    limit = min(len(old), len(new))
    before = next((index for index in range(limit) if old[index] != new[index]), limit)
    behind = next((index for index in range(limit - before) if old[-1 - index] != new[-1 - index]), limit - before)
    changed = inputs[0][before : len(old) - behind]
    middle: list[_Axis] = [_Unwritten.OTHER] * (len(new) - behind - before)
    if any(isinstance(axis, Call) or axis in (_Unwritten.UNCLEAR, _Unwritten.WEIGHT) for axis in changed):
        middle = [_Unwritten.UNCLEAR for _ in middle]
    elif changed and all(axis is _Unwritten.POSITIONS for axis in changed):
        middle = [_Unwritten.POSITIONS for _ in middle]
    elif middle and not behind:
        middle[-1] = _Unwritten.LAST
    return [(*inputs[0][:before], *middle, *inputs[0][len(old) - behind :])]


def _convolution(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Convolutions write the axis before the positions: axis 1, or axis 0 without a batch.

    The operator of a quantised layer takes its weights in another form than a tensor. Its axes are unclear.
    """
    if len(inputs) < 2:
        return []
    channel = len(inputs[0]) - len(inputs[1]) + 1
    return [(*inputs[0][:channel], call, *_positions(inputs[0][channel + 1 :]))]


def _linear(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Linear layers write the last axis, and take all others as they are."""
    return [(*inputs[0][:-1], call)]


def _product(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Matrix products: a parameter on one side writes features, as in a linear layer by hand."""
    left, right = inputs[-2:]
    if min(len(left), len(right)) < 2:
        return []
    rows, columns = (call if axis is _Unwritten.WEIGHT else axis for axis in (left[-2], right[-1]))
    return [(*max(left, right, key=len)[:-2], rows, columns)]


def _recurrent(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Recurrent layers write the last axis of the sequence and of the states behind it."""
    states: list[_Axes] = [(*(_Unwritten.POSITIONS for _ in value.shape[1:]), call) for value in call.outputs[1:]]
    return [(*_positions(inputs[0][:-1]), call), *states]


def _attention(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Attention with its projections writes the last axis. The other axes are those of the query."""
    return [(*_positions(inputs[0][:-1]), call)]


def _dot_product(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:  # noqa: ARG001 - the signature of a rule
    """Attention without projections takes the last axis from the values and the others from the query."""
    return [(*_positions(inputs[0][:-1]), *inputs[2][-1:])] if len(inputs) > 2 else []


def _embedding(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Embeddings write a new last axis behind those of the tokens."""
    return [(*(_Unwritten.POSITIONS for _ in inputs[0]), call)]


def _packing(call: Call, inputs: Sequence[_Axes]) -> list[_Axes]:
    """Packed sequences keep their last axis."""
    return [(*(_Unwritten.POSITIONS for _ in call.outputs[0].shape[1:]), *inputs[0][-1:])]


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        (
            *("abs", "add", "add_relu", "addcdiv", "addcmul", "div", "divide", "exp", "expm1", "lerp", "log", "log1p"),
            *("maximum", "minimum", "mul", "multiply", "neg", "negative", "pow", "reciprocal", "rsqrt", "rsub", "sqrt"),
            *("square", "sub", "subtract", "true_divide", "where", "__add__", "__iadd__", "__imul__", "__ipow__"),
            *("__isub__", "__itruediv__", "__mul__", "__neg__", "__pow__", "__radd__", "__rmul__", "__rpow__"),
            *("__rdiv__", "__rsub__", "__rtruediv__", "__setitem__", "__sub__", "__truediv__"),
            *("celu", "elu", "erf", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "sin"),
            *("log_sigmoid", "logsigmoid", "mish", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "cos"),
            *("softplus", "softshrink", "softsign", "tanh", "tanhshrink", "threshold", "softmax", "log_softmax"),
            *("softmin", "gumbel_softmax", "clamp", "clamp_max", "clamp_min", "clip", "masked_fill", "nan_to_num"),
            *("alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"),
            *("batch_norm", "group_norm", "instance_norm", "layer_norm", "normalize", "rms_norm"),
            *("bfloat16", "clone", "contiguous", "cpu", "cuda", "data", "detach", "double", "float", "half", "to"),
            *("requires_grad", "type", "type_as"),
        ),
        _same_shape,
    ),
    **dict.fromkeys(
        (
            *("cat", "concat", "concatenate", "flip", "glu", "index_select", "interpolate", "pad", "roll"),
            *(f"{kind}_pool{rank}d" for kind in ("avg", "lp", "max") for rank in (1, 2, 3)),
            *(f"adaptive_{kind}_pool{rank}d" for kind in ("avg", "max") for rank in (1, 2, 3)),
        ),
        _same_rank,
    ),
    **dict.fromkeys(
        (
            *("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT", "adjoint"),
            *("__getitem__", "chunk", "narrow", "select", "split", "tensor_split", "unbind", "unsafe_chunk"),
        ),
        _view,
    ),
    **dict.fromkeys(("flatten", "reshape", "reshape_as", "squeeze", "unflatten", "unsqueeze", "view"), _reshape),
    **dict.fromkeys((f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)), _convolution),
    **dict.fromkeys(("linear", "bilinear", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _linear),
    **dict.fromkeys(("addmm", "baddbmm", "bmm", "matmul", "mm", "__matmul__"), _product),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("embedding", "one_hot"), _embedding),
    **dict.fromkeys(("_pack_padded_sequence", "_pad_packed_sequence"), _packing),
    "stack": _stack,
    "multi_head_attention_forward": _attention,
    "scaled_dot_product_attention": _dot_product,
}
"""How each function passes the axes of its inputs on, by its name."""
