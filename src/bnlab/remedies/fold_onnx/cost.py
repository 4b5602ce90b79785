"""Estimates the memory and the time of an ONNX model before it is run, from the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnlab.remedies.fold_onnx.scope import uses_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, TypeProto

__all__ = ["Cost", "cost_of", "typed"]

_MAX_KNOWN_BYTES = 1 << 12
"""Smaller initializers may be shapes, which shape inference must know."""
_SUMS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Cost:
    """What a run of a model takes, at least.

    Attributes:
        memory: The bytes of all tensors that exist at the same time, beside the weights.
        kept: The bytes of those tensors that are wanted afterwards.
        products: The number of multiplications in convolutions and matrix products of the outer graph.
    """

    memory: int
    kept: int
    products: int


def typed(model: ModelProto, shapes: Mapping[str, Sequence[int]] | None = None) -> ModelProto:
    """Return a model of the same nodes with the types that shape inference can determine, without the large weights.

    Args:
        model: The model.
        shapes: The shapes of inputs of the model, in place of those that it declares.
    """
    from onnx import shape_inference

    light = _without_large_weights(model)
    for value in light.graph.input:
        if shapes and value.name in shapes:
            del value.type.tensor_type.shape.dim[:]
            for side in shapes[value.name]:
                value.type.tensor_type.shape.dim.add(dim_value=side)
    if shapes:
        for value in (*light.graph.output, *light.graph.value_info):
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")
    try:
        return shape_inference.infer_shapes(light, data_prop=True)
    except Exception:  # BN can be folded in a model that is invalid elsewhere
        return light


def cost_of(model: ModelProto, shapes: Mapping[str, Sequence[int]], wanted: Collection[str]) -> Cost:
    """Estimate what a run of a model on inputs of these shapes takes. Tensors of unknown shape count as nothing.

    Args:
        model: The model.
        shapes: The shapes of the inputs by name.
        wanted: The tensors that are kept beside the outputs.
    """
    graph = typed(model, shapes).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type for value in values if value.type.HasField("tensor_type")}
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    sizes = {name: _bytes(kind) for name, kind in types.items() if name not in weights}
    known = {**{name: _shape(kind) for name, kind in types.items()}, **weights}
    keep = {*wanted, *(output.name for output in graph.output)}
    last = {name: index for index, node in enumerate(graph.node) for name in uses_of(node)}
    alive = sum(sizes.get(name, 0) for name in shapes)
    peak, products = alive, 0
    for index, node in enumerate(graph.node):
        alive += sum(sizes.get(name, 0) for name in node.output)
        peak = max(peak, alive)
        products += _products(node, known)
        ended = {name for name in (*uses_of(node), *node.output) if last.get(name, index) <= index} - keep
        alive -= sum(sizes.get(name, 0) for name in ended)
    return Cost(peak, sum(sizes.get(name, 0) for name in keep), products)


def _without_large_weights(model: ModelProto) -> ModelProto:
    """Return a copy in which the large initializers are inputs."""
    import onnx
    from onnx import helper

    light = onnx.ModelProto()
    light.ir_version = model.ir_version
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = model.graph
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(light.graph, field).extend(getattr(graph, field))
    listed = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if _stored_bytes(tensor) <= _MAX_KNOWN_BYTES:
            light.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return light


def _stored_bytes(tensor: TensorProto) -> int:
    return int(tensor.ByteSize()) if not tensor.external_data else _MAX_KNOWN_BYTES + 1


def _shape(kind: TypeProto) -> list[int] | None:
    if not kind.tensor_type.HasField("shape"):
        return None
    sides = [int(side.dim_value) if side.HasField("dim_value") else -1 for side in kind.tensor_type.shape.dim]
    return sides if min(sides, default=0) >= 0 else None


def _bytes(kind: TypeProto) -> int:
    from onnx import helper

    shape = _shape(kind)
    try:
        item = np.dtype(helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)).itemsize
    except KeyError:
        return 0
    return 0 if shape is None else math.prod(shape) * item


def _products(node: NodeProto, known: Mapping[str, list[int] | None]) -> int:
    """Return the products that a convolution or matrix product sums up."""
    shapes = [known.get(name) for name in (*node.input[:2], *node.output[:1])]
    if node.op_type not in (*_SUMS, "ConvTranspose") or len(shapes) < 3 or None in shapes:
        return 0
    x, weight, out = (shape or [] for shape in shapes)
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(x) * math.prod(weight[1:])
    return math.prod(out) * (x[-1] if x else 1)
