"""Resolves the tensors of an ONNX graph that are known without running it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.errors import TooMuchWork
from bnlab.observe.files.onnx_model.constant_operators import OPERATORS, compute
from bnlab.observe.files.onnx_model.external_data import ModelFile
from bnlab.observe.files.onnx_model.tensor_values import (
    dense,
    dtype_name,
    holds_numbers,
    number_of_values,
    tensor_values,
)
from bnlab.observe.files.tensors import FLOATING, MAX_CHANNELS, coarser

if TYPE_CHECKING:
    from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, SparseTensorProto, TensorProto

__all__ = ["Allowance", "Constants", "Place", "is_standard"]

Values = tuple[str, NDArray[Any]]

_STANDARD = ("", "ai.onnx")
_CONSTANT_OPERATORS = frozenset({"Constant", "ConstantOfShape", "Identity", *OPERATORS})
_MAX_STEPS = 64
"""Operators between an initializer and its use. No exporter writes more than a few."""
_MAX_RENAMES = 64
_FLOAT, _INT64 = 1, 7


def is_standard(node: NodeProto, *kinds: str) -> bool:
    """Return whether a node is one of these operators in the standard domain of ONNX."""
    return node.op_type in kinds and node.domain in _STANDARD


@dataclass
class Allowance:
    """How many values may still be read from one file, so that a small file cannot fill the memory.

    Attributes:
        left: Number of values.
    """

    left: int

    def take(self, count: int) -> None:
        """Count values that are about to be read.

        Raises:
            TooMuchWork: If they are more than what is left.
        """
        self.left -= count
        if self.left < 0:
            raise TooMuchWork(
                "file must hold BN parameters of a size that networks have, got one whose nodes ask for far more."
            )


@dataclass(frozen=True)
class Place:
    """Where a tensor is defined: the constants of a scope, and its name there."""

    scope: Constants
    name: str


class Constants:
    """The tensors of a graph or function whose values are known without running it, by name.

    Initializers, sparse ones too, and Constant, ConstantOfShape and Identity nodes are constants, and so are Cast,
    Reshape, Squeeze, Unsqueeze, Flatten, Transpose and DequantizeLinear of constants.

    Attributes:
        tensors: The initializers of this scope.
        sparse: The sparse initializers of this scope.
        nodes: The nodes of this scope that may compute a constant, by their output.
        file: The file of the model, which leads to external data.
        own_names: The names that this scope defines, which hide those around it; empty without a scope around it.

    Args:
        scope: A graph or function.
        folder: The folder of external data, or the file of a model whose tensors `skim` left in it.
        around: The constants of the graph around a subgraph.
        limit: The largest number of values to read. A tensor with more values is read as one of shape (0,).
        allowance: How many values may be read in total; None for any number.
        replaceable: Names of initializers that a caller may replace at run time, so they are not constants.
        arguments: Where the inputs of a function come from in a call of it, as far as they are constants.
        attributes: The attributes of a call of a function, to which the attributes of its nodes refer.
    """

    def __init__(
        self,
        scope: GraphProto | FunctionProto,
        folder: Path | ModelFile,
        around: Constants | None = None,
        *,
        limit: int = MAX_CHANNELS,
        allowance: Allowance | None = None,
        replaceable: AbstractSet[str] = frozenset(),
        arguments: Mapping[str, Place] | None = None,
        attributes: Mapping[str, AttributeProto] | None = None,
    ) -> None:
        self.file = folder if isinstance(folder, ModelFile) else ModelFile(folder)
        self.around = around
        self._limit = limit
        self._allowance = allowance
        self.replaceable = replaceable
        self.arguments = arguments or {}
        self._attributes = attributes or {}
        self.tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in getattr(scope, "initializer", ())}
        self.sparse: dict[str, SparseTensorProto] = {
            tensor.values.name: tensor for tensor in getattr(scope, "sparse_initializer", ())
        }
        self.nodes: dict[str, NodeProto] = {
            node.output[0]: node for node in scope.node if node.output and _may_be_constant(node)
        }
        self._places: dict[str, tuple[Constants | None, str]] = {}
        # A name of this scope hides the same name outside. Only a subgraph has an outside.
        self.own_names = frozenset(_names(scope)) if around is not None else frozenset()

    def inside(self, scope: GraphProto) -> Constants:
        """Return the constants of a subgraph of a node in this scope, which can use the names of this scope."""
        return Constants(
            scope,
            self.file,
            self,
            limit=self._limit,
            allowance=self._allowance,
            attributes=self._attributes,
        )

    def of_function(
        self, function: FunctionProto, arguments: Mapping[str, Place], attributes: Mapping[str, AttributeProto]
    ) -> Constants:
        """Return the constants of a function as a call of it sees them.

        Args:
            function: The function, which sees no other names than its own.
            arguments: Where its inputs come from, as far as they are constants.
            attributes: The attributes of the call.
        """
        return Constants(
            function,
            self.file,
            limit=self._limit,
            allowance=self._allowance,
            arguments=arguments,
            attributes=attributes,
        )

    def find(self, name: str) -> Values | None:
        """Return stored dtype and values of a tensor, or None if the tensor is computed or fed at run time.

        The dtype is the coarsest floating dtype in which the values are stored on their way. The values have the dtype
        that the graph gives them.

        Raises:
            ValueError: If a tensor does not hold the values that its dims promise.
            DamagedFile: If external data cannot be read.
        """
        return self._find(name, [_MAX_STEPS])

    def root(self, name: str) -> str:
        """Return the name of a tensor before the Identity nodes that rename it."""
        return self._before_renames(name)[1]

    def place(self, name: str) -> Place | None:
        """Return where a tensor that may be constant is defined; None if it is computed or fed at run time."""
        scope, root = self._before_renames(name)
        return None if scope is None else Place(scope, root)

    def attribute(self, node: NodeProto, name: str) -> AttributeProto | None:
        """Return an attribute of a node in this scope, in a function that of its call; None if it is not set."""
        for attribute in node.attribute:
            if attribute.name == name:
                return self._attributes.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
        return None

    def attributes(self, node: NodeProto) -> dict[str, AttributeProto]:
        """Return the attributes of a node in this scope that are set, by name."""
        own = {part.name: self.attribute(node, part.name) for part in node.attribute}
        return {name: attribute for name, attribute in own.items() if attribute is not None}

    def _find(self, name: str, steps: list[int]) -> Values | None:
        scope, root = self._before_renames(name)
        if scope is None or root in scope.replaceable:
            return None
        if root in scope.tensors:
            return scope.read(scope.tensors[root])
        if root in scope.sparse:
            return scope.read_sparse(scope.sparse[root])
        steps[0] -= 1
        return scope.computed(scope.nodes[root], steps) if steps[0] >= 0 else None

    def _before_renames(self, name: str) -> tuple[Constants | None, str]:
        """Return the scope that defines a tensor as a constant, with its name before Identity nodes."""
        if name not in self._places:
            self._places[name] = self._follow(name)
        return self._places[name]

    def _follow(self, name: str) -> tuple[Constants | None, str]:
        scope, root = self.defining(name)
        for _ in range(_MAX_RENAMES):
            node = None if scope is None or root in scope.tensors else scope.nodes.get(root)
            if scope is None or node is None or node.op_type != "Identity" or not node.input:
                return scope, root
            scope, root = scope.defining(node.input[0])
        return None, root

    def defining(self, name: str) -> tuple[Constants | None, str]:
        """Return the scope in which a tensor is an initializer or the output of a constant node, and its name there."""
        scope: Constants | None = self
        while scope is not None:
            if name in scope.tensors or name in scope.nodes or name in scope.sparse:
                return scope, name
            if name in scope.arguments:
                return scope.arguments[name].scope, scope.arguments[name].name
            if name in scope.own_names:
                return None, name
            scope = scope.around
        return None, name

    def computed(self, node: NodeProto, steps: list[int]) -> Values | None:
        """Return the output of a node of this scope whose inputs are all constants."""
        if node.op_type == "Constant":
            return self._constant(node)
        operands = [self._find(name, steps) if name else None for name in node.input]
        if not operands or any(name and operand is None for name, operand in zip(node.input, operands, strict=True)):
            return None
        if node.op_type == "ConstantOfShape":
            return self._constant_of_shape(node, operands[0])
        arrays = [None if operand is None else operand[1] for operand in operands]
        first = operands[0]
        if first is None or not first[1].size:
            return first
        self._take(first[1].size)
        values = compute(node.op_type, arrays, self.attributes(node))
        return None if values is None else (_stored_dtype(node, operands, values), values)

    def _constant(self, node: NodeProto) -> Values | None:
        for part in node.attribute:
            attribute = self.attribute(node, part.name)
            if attribute is None:
                continue
            if part.name == "value":
                return self.read(attribute.t)
            if part.name == "sparse_value":
                return self.read_sparse(attribute.sparse_tensor)
            if part.name in _NUMBERS:
                field, dtype, kind = _NUMBERS[part.name]
                return dtype_name(kind), np.asarray(getattr(attribute, field), dtype=dtype)
        return None

    def _constant_of_shape(self, node: NodeProto, shape: Values | None) -> Values | None:
        if shape is None or shape[1].ndim != 1 or not shape[1].size:
            return None
        sides = [int(side) for side in shape[1]]
        if min(sides) <= 0 or len(sides) > _MAX_STEPS or math.prod(sides) > self._limit:
            return None
        self._take(math.prod(sides))
        value = self.attribute(node, "value")
        dtype, filled = self.read(value.t) if value is not None else ("float32", np.zeros(1, dtype=np.float32))
        return (dtype, np.broadcast_to(filled.reshape(-1)[:1], sides)) if filled.size else None

    def read(self, tensor: TensorProto) -> Values:
        """Return stored dtype and values of a tensor; shape (0,) for one over the limit or without numbers."""
        dtype, count = dtype_name(tensor.data_type), number_of_values(tensor.dims)
        if count > self._limit or not holds_numbers(tensor.data_type):
            return dtype, np.empty((0,))
        self._take(count)
        return dtype, tensor_values(tensor, self.file)

    def read_sparse(self, tensor: SparseTensorProto) -> Values:
        """Return stored dtype and values of a sparse tensor, likewise."""
        dtype, count = dtype_name(tensor.values.data_type), number_of_values(tensor.dims)
        if count > self._limit or not holds_numbers(tensor.values.data_type):
            return dtype, np.empty((0,))
        self._take(count)
        return dtype, dense(tensor, self.file)

    def _take(self, count: int) -> None:
        if self._allowance is not None:
            self._allowance.take(count)


_NUMBERS: Mapping[str, tuple[str, type[np.generic], int]] = {
    "value_float": ("f", np.float32, _FLOAT),
    "value_floats": ("floats", np.float32, _FLOAT),
    "value_int": ("i", np.int64, _INT64),
    "value_ints": ("ints", np.int64, _INT64),
}
"""The attributes of Constant that hold numbers: field of the attribute, numpy dtype, ONNX data type."""


def _may_be_constant(node: NodeProto) -> bool:
    operator = node.op_type
    if operator not in _CONSTANT_OPERATORS:
        return False
    return node.domain in _STANDARD or (operator == "DequantizeLinear" and node.domain == "com.microsoft")


def _names(scope: GraphProto | FunctionProto) -> Iterator[str]:
    """Yield the names that a scope defines by its inputs and nodes."""
    for value in scope.input:
        yield getattr(value, "name", str(value))
    for node in scope.node:
        yield from node.output


def _stored_dtype(node: NodeProto, operands: list[Values | None], values: NDArray[Any]) -> str:
    """Return the coarsest floating dtype on the way of the values."""
    first = operands[0][0] if operands[0] is not None else ""
    if node.op_type == "DequantizeLinear" and operands[1] is not None:
        return operands[1][0]
    if node.op_type not in ("Cast", "CastLike"):
        return first
    target = values.dtype.name
    if target not in FLOATING:
        from onnx import helper

        return dtype_name(helper.np_dtype_to_tensor_dtype(values.dtype))
    return coarser(first, target) if first in FLOATING else target
