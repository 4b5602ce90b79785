"""Folds a BatchNormalization node into the node before it or the node after it, or replaces it by Mul and Add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from bnlab.functional.folding import fold_into_consumer, fold_into_producer, scale_and_shift
from bnlab.observe.files.tensors import widen
from bnlab.remedies.fold_onnx.scope import Scope, is_standard
from bnlab.remedies.refusal import Refusal, attempted

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["Attempt", "BatchNormNode", "Fold", "plan"]

Value = TypeVar("Value")
DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")
_DEFAULT_EPSILON = float(np.float32(1e-5))
_FIRST_OPSET = {"broadcasting": 7, "always per channel": 9, "mode is an attribute": 14, "parameters of own dtype": 15}


@dataclass(frozen=True)
class BatchNormNode:
    """A BatchNormalization node with fixed statistics, as y = scale*x + shift.

    Attributes:
        node: The node.
        name: The name of the node in receipts.
        scale: Shape (C,), float64.
        shift: Shape (C,), float64.
        mean: Running mean, shape (C,), float64.
        var: Running variance, shape (C,), float64.
        dtype: The dtype of the parameters.
    """

    node: NodeProto
    name: str
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    dtype: np.dtype[Any]

    @classmethod
    def read(cls, node: NodeProto, name: str, scope: Scope) -> BatchNormNode:
        """Read a node.

        Raises:
            Refusal: If the node normalises with batch statistics, or if its parameters are unknown or invalid.
        """
        _refuse_other_modes(node, scope)
        parameters = {}
        for key, tensor in zip(_PARAMETERS, node.input[1:5], strict=True):
            values = scope.constant(tensor)
            if values is None:
                raise Refusal(f"its {key} {scope.why_no_constant(tensor)}")
            if values.dtype not in DTYPES:
                raise Refusal(f"its {key} has dtype {values.dtype}, not float16, float32 or float64")
            parameters[key] = values
        shapes = {values.shape for values in parameters.values()}
        if len(shapes) != 1 or parameters["weight"].ndim != 1 or not parameters["weight"].size:
            raise Refusal(f"its parameters have the shapes {sorted(shapes)}, not all (C,)")
        weight, bias, mean, var = (widen(parameters[key]) for key in _PARAMETERS)
        eps = _attribute(node, "epsilon", _DEFAULT_EPSILON)
        tensors = [torch.from_numpy(values) for values in (mean, var, weight, bias)]
        with np.errstate(all="ignore"):
            scale, shift = scale_and_shift(tensors[0], tensors[1], tensors[2], tensors[3], eps)
        broken = int((~(scale.isfinite() & shift.isfinite())).sum())
        if broken:
            raise Refusal(f"its scale or shift is not finite in {broken} of {len(scale)} channels")
        return cls(node, name, scale.numpy(), shift.numpy(), mean, var, parameters["weight"].dtype)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift as tensors, for bnlab.functional."""
        return torch.from_numpy(self.scale), torch.from_numpy(self.shift)

    @property
    def source(self) -> str:
        """The name of the input."""
        return str(self.node.input[0])

    @property
    def result(self) -> str:
        """The name of the output."""
        return str(self.node.output[0])


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Nodes, and other nodes that compute the same and can replace them.

    Attributes:
        before: The nodes to replace, in order.
        after: The nodes that replace them.
        at: The node of `before` in whose place the new nodes are inserted.
        values: The new constants of `after`, by name.
        source: The name of the input tensor, which both have in common.
        result: The name of the output tensor, which both have in common.
        outcome: The text for the receipt.
    """

    before: tuple[NodeProto, ...]
    after: tuple[NodeProto, ...]
    at: NodeProto
    values: Mapping[str, NDArray[Any]]
    source: str
    result: str
    outcome: str


Attempt = Callable[[BatchNormNode, Scope], Fold]


def plan(bn: BatchNormNode, scope: Scope) -> tuple[Fold, tuple[str, ...]]:
    """Return the best possible fold of a BN, and the reasons why better folds are impossible.

    Raises:
        Refusal: If no fold is possible. It has all the reasons.
    """
    reasons: list[str] = []
    attempts: tuple[Attempt, ...] = (_into_producer, _into_consumer, _into_affine)
    for attempt in attempts:
        fold = attempted(partial(attempt, bn, scope))
        if isinstance(fold, Fold):
            return fold, tuple(reasons)
        reasons.append(fold.reason)
    raise Refusal("; ".join(dict.fromkeys(reasons)))


def _refuse_other_modes(node: NodeProto, scope: Scope) -> None:
    if len(node.input) != 5 or not node.output:
        raise Refusal(f"it has {len(node.input)} inputs, a BatchNormalization node has 5")
    _refuse_linked(node)
    if any(node.output[1:]):
        raise Refusal("it has more than one output: it normalises by batch statistics")
    if scope.opset >= _FIRST_OPSET["mode is an attribute"] and _attribute(node, "training_mode", 0):
        raise Refusal("training_mode is 1: it normalises by batch statistics")
    if scope.opset < _FIRST_OPSET["broadcasting"] and not _attribute(node, "is_test", 0):
        raise Refusal("is_test is 0: it normalises by batch statistics")
    if scope.opset < _FIRST_OPSET["always per channel"] and not _attribute(node, "spatial", 1):
        raise Refusal("spatial is 0: it has statistics per position, not per channel")


def _refuse_linked(node: NodeProto) -> None:
    if any(attribute.ref_attr_name for attribute in node.attribute):
        raise Refusal(f"{node.op_type} takes an attribute from the call of the function it is in")


def _into_producer(bn: BatchNormNode, scope: Scope) -> Fold:
    """Return the fold into the linear node that feeds only the BN."""
    linear = _linear_before(bn, scope)
    weight = _Weight.of(linear, scope)
    groups = _groups(linear, weight)
    transposed = linear.op_type == "ConvTranspose"
    channels = weight.plain.shape[1] * groups if transposed else weight.plain.shape[0]
    if channels != len(bn.scale):
        raise Refusal(f"{linear.op_type} makes {channels} channels, the BN has {len(bn.scale)}")
    if linear.op_type == "MatMul" and scope.rank(linear.output[0]) != 2:
        raise Refusal("the output of MatMul is not known to have 2 dimensions")
    folded = fold_into_producer(
        *bn.tensors, weight.tensor, _bias(linear, channels, scope), transposed=transposed, groups=groups
    )
    node, values = _rebuilt(linear, weight, bn, scope, folded)
    node.output[0] = bn.result
    return Fold(
        before=(linear, bn.node),
        after=(node,),
        at=linear,
        values=values,
        source=str(linear.input[0]),
        result=bn.result,
        outcome=f"folded into {_name_and_kind(linear)}" + (", now a Gemm" if node.op_type != linear.op_type else ""),
    )


def _linear_before(bn: BatchNormNode, scope: Scope) -> NodeProto:
    linear = scope.producer(bn.source)
    if linear is None:
        raise Refusal("nothing in its graph feeds it")
    if not is_standard(linear, *_LINEAR):
        raise Refusal(f"{linear.op_type} feeds it")
    if bn.source in scope.outputs:
        raise Refusal(f"the output of the {linear.op_type} that feeds it is an output of the graph")
    if len(scope.consumers(bn.source)) != 1:
        raise Refusal(f"the {linear.op_type} that feeds it feeds another node too")
    return linear


def _into_consumer(bn: BatchNormNode, scope: Scope) -> Fold:
    """Return the fold into the Conv or Gemm that alone uses the output of the BN.

    The Conv must not pad, because BN does not map zeros to zeros.
    """
    linear = _linear_behind(bn, scope)
    weight = _Weight.of(linear, scope)
    groups = _groups(linear, weight)
    channels = weight.plain.shape[1] * groups
    if channels != len(bn.scale):
        raise Refusal(f"the {linear.op_type} behind it takes {channels} channels, the BN has {len(bn.scale)}")
    folded = fold_into_consumer(*bn.tensors, weight.tensor, _bias(linear, weight.plain.shape[0], scope), groups=groups)
    node, values = _rebuilt(linear, weight, bn, scope, folded)
    node.input[0] = bn.source
    return Fold(
        before=(bn.node, linear),
        after=(node,),
        at=linear,
        values=values,
        source=bn.source,
        result=str(linear.output[0]),
        outcome=f"folded into {_name_and_kind(linear)} behind it",
    )


def _linear_behind(bn: BatchNormNode, scope: Scope) -> NodeProto:
    consumers = scope.consumers(bn.result)
    if bn.result in scope.outputs:
        raise Refusal("its output is an output of the graph")
    if len(consumers) != 1:
        raise Refusal(f"its output is used {len(consumers)} times")
    (linear,) = consumers
    if not is_standard(linear, "Conv", "Gemm") or linear.input[0] != bn.result:
        raise Refusal(f"{linear.op_type} is behind it")
    if not scope.owns(bn.source):
        raise Refusal("its input lies outside the subgraph")
    if linear.op_type == "Gemm" and _attribute(linear, "transA", 0):
        raise Refusal("the Gemm behind it transposes its output")
    padding = _attribute(linear, "auto_pad", b"NOTSET")
    if padding not in (b"NOTSET", b"VALID") or any(_attribute(linear, "pads", ())):
        raise Refusal("the Conv behind it pads with zeros, which BN does not map to zeros")
    return linear


def _into_affine(bn: BatchNormNode, scope: Scope) -> Fold:
    """Return the replacement by a multiplication and an addition per channel."""
    from onnx import helper

    if scope.opset < _FIRST_OPSET["broadcasting"]:
        raise Refusal(f"Mul and Add do not broadcast in opset {scope.opset}")
    if not scope.owns(bn.source):
        raise Refusal("its input lies outside the subgraph")
    rank = scope.rank(bn.source) or scope.rank(bn.result)
    if rank is None or rank < 2:
        raise Refusal("the number of dimensions of its input is not known")
    dtype = _input_dtype(bn, scope)
    shape = (len(bn.scale), *([1] * (rank - 2)))
    scale, shift, scaled = (scope.unique(f"{bn.name}.{part}") for part in ("scale", "shift", "scaled"))
    multiply = helper.make_node("Mul", [bn.source, scale], [scaled], scope.unique(f"{bn.name}.mul"))
    add = helper.make_node("Add", [scaled, shift], [bn.result], scope.unique(f"{bn.name}.add"))
    return Fold(
        before=(bn.node,),
        after=(multiply, add),
        at=bn.node,
        values={scale: _rounded(bn.scale, dtype).reshape(shape), shift: _rounded(bn.shift, dtype).reshape(shape)},
        source=bn.source,
        result=bn.result,
        outcome="Mul and Add",
    )


def _input_dtype(bn: BatchNormNode, scope: Scope) -> np.dtype[Any]:
    """Return the dtype of the input of a BN. Before opset 15, the scale has the same dtype."""
    from onnx import helper

    if scope.opset < _FIRST_OPSET["parameters of own dtype"]:
        return bn.dtype
    kind = scope.element_type(bn.source)
    dtype: np.dtype[Any] | None = None if kind is None else np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    if dtype is None or dtype not in DTYPES:
        raise Refusal("the dtype of its input is not known" if dtype is None else f"its input is of dtype {dtype}")
    return dtype


@dataclass(frozen=True)
class _Weight:
    """The weight of a linear node, as stored and in float64 as (out, in/groups, *kernel), multiplied by alpha."""

    name: str
    dtype: np.dtype[Any]
    is_transposed: bool
    plain: NDArray[np.float64]

    @classmethod
    def of(cls, linear: NodeProto, scope: Scope) -> _Weight:
        if len(linear.input) < 2:
            raise Refusal(f"the {linear.op_type} has no weight")
        name = linear.input[1]
        stored = scope.constant(name)
        if stored is None:
            raise Refusal(f"the weight of the {linear.op_type}, {scope.why_no_constant(name)}")
        is_matrix = is_standard(linear, "Gemm", "MatMul")
        if stored.dtype not in DTYPES or (stored.ndim != 2 if is_matrix else stored.ndim < 3):
            raise Refusal(f"the weight of the {linear.op_type} has dtype {stored.dtype}, shape {stored.shape}")
        _refuse_linked(linear)
        if is_matrix and scope.opset < _FIRST_OPSET["broadcasting"]:
            raise Refusal(f"the bias of Gemm does not broadcast in opset {scope.opset}")
        is_transposed = is_matrix and not _attribute(linear, "transB", 0)
        wide = widen(stored) * _attribute(linear, "alpha", 1.0)
        return cls(str(name), stored.dtype, is_transposed, wide.T if is_transposed else wide)

    @property
    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.plain))

    def stored(self, folded: torch.Tensor) -> NDArray[Any]:
        return _rounded(folded.numpy().T if self.is_transposed else folded.numpy(), self.dtype)


def _groups(linear: NodeProto, weight: _Weight) -> int:
    groups = int(_attribute(linear, "group", 1))
    if groups < 1 or weight.plain.shape[0] % groups:
        raise Refusal(f"the {linear.op_type} has {groups} groups for a weight of shape {weight.plain.shape}")
    return groups


def _bias(linear: NodeProto, channels: int, scope: Scope) -> torch.Tensor | None:
    """Return the bias of a linear node with that many output channels, multiplied by beta, or None if it has none."""
    if len(linear.input) < 3 or not linear.input[2]:
        return None
    stored = scope.constant(linear.input[2])
    if stored is None:
        raise Refusal(f"the bias of the {linear.op_type}, {scope.why_no_constant(linear.input[2])}")
    broadcasts = linear.op_type == "Gemm" and stored.ndim <= 2 and stored.shape[-1:] in ((), (1,), (channels,))
    if stored.shape != (channels,) and not broadcasts:
        raise Refusal(f"the bias of the {linear.op_type} has the shape {stored.shape}")
    return torch.from_numpy(np.ascontiguousarray(widen(stored) * _attribute(linear, "beta", 1.0)))


def _rebuilt(
    linear: NodeProto, weight: _Weight, bn: BatchNormNode, scope: Scope, folded: tuple[torch.Tensor, torch.Tensor]
) -> tuple[NodeProto, dict[str, NDArray[Any]]]:
    """Return the linear node with its folded weight and bias, under names that nothing else uses."""
    from onnx import NodeProto

    node = NodeProto()
    node.CopyFrom(linear)
    if linear.op_type == "MatMul":
        node.op_type = "Gemm"  # only a Gemm has a bias
    for index in reversed([i for i, attribute in enumerate(node.attribute) if attribute.name in ("alpha", "beta")]):
        del node.attribute[index]  # the weight and the bias contain them now
    old_bias = linear.input[2] if len(linear.input) > 2 else ""
    names = [
        old if scope.is_own_initializer(old) else scope.unique(f"{bn.name}.folded_{part}")
        for old, part in ((weight.name, "weight"), (old_bias, "bias"))
    ]
    del node.input[1:]
    node.input.extend(names)
    return node, {names[0]: weight.stored(folded[0]), names[1]: _rounded(folded[1].numpy(), weight.dtype)}


def _rounded(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round once to the dtype of the file. The check of the fold detects an overflow."""
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def _attribute(node: NodeProto, name: str, default: Value) -> Value:
    from onnx import helper

    attribute = next((attribute for attribute in node.attribute if attribute.name == name), None)
    value: Value = default if attribute is None else helper.get_attribute_value(attribute)
    return value


def _name_and_kind(linear: NodeProto) -> str:
    """Return the type of a linear node with its name in torch if the weight has that name, else with its own name."""
    weight = str(linear.input[1])
    own = weight.removesuffix(".weight") if weight.endswith(".weight") else linear.name or linear.output[0]
    return f"{linear.op_type} {own}"
